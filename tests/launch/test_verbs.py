"""Every verb by itself: on a slice with the real trainer, on a GPU server."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests import processes, tiny
from tests.launch.cloud import CONFIG, DELETE, MACHINE, REPOSITORY, WHERE, WORKDIR, Cloud

STEPS = 18


def command(*arguments: str) -> list[str]:
    """Of a run of the real trainer, with a checkpoint after every six steps."""
    changes = {**tiny.OVERRIDES, "method": "ce"}
    options = [f"--config.{path}={value}" for path, value in changes.items()]
    return [WORKDIR, CONFIG, *arguments, "--", *options, "--config.data.data_dir=gs://bucket/data"]


def saved(run: Path) -> int:
    names = [p.name for p in run.glob("checkpoints/*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_finished(run: Path) -> None:
    """Once, however often it was started."""
    assert json.loads((run / "report.json").read_text())["training"]["steps"] == STEPS
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == saved(run) == STEPS


def is_asked(pid: int) -> bool:
    """Whether a SIGTERM waits for a process that is paused."""
    (pending,) = re.findall(r"^ShdPnd:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return bool(int(pending, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
def test_every_verb_with_the_real_trainer(cloud: Cloud, tmp_path):
    """Stop saves, status tells, supervise resumes, delete leaves the workdir."""
    tiny.prepare(tmp_path).rename(cloud.bucket / "data")
    run = cloud.bucket / "run"
    created = cloud.tpu("create", "--type=v4-8", "--yes")
    assert created.returncode == 0, created.stderr
    assert created.stdout.splitlines()[-1] == f"  launch/tpu.sh delete {' '.join(WHERE)}"
    assert cloud.tpu("create", "--type=v4-8", "--yes").returncode == 1
    assert cloud.tpu("run", WORKDIR, CONFIG).returncode == 1  # nothing is there yet
    for verb in ("setup", "push"):
        result = cloud.tpu(verb, WORKDIR)
        assert result.returncode == 0, result.stderr
    fresh = cloud.tpu("status", WORKDIR)
    assert (fresh.returncode, "run new" in fresh.stdout) == (1, True)

    assert cloud.tpu("run", *command()).returncode == 0
    # From here on it minds SIGTERM; and it would be done before all of the following is.
    cloud.wait((run / "config.json").exists)
    trainer = int((cloud.home() / ".sync_jax" / "run").read_text().split()[1])
    os.kill(trainer, signal.SIGSTOP)
    status = cloud.tpu("status", WORKDIR)
    assert status.returncode == 0
    assert "worker=0 state=running exit=- step=" in status.stdout
    again = cloud.tpu("run", *command())
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "worker 0: already running"
    other = cloud.tpu("run", *command(), "--config.seed=7")
    assert other.returncode == 1
    assert "a run, or its setup, is going on here" in other.stderr
    stop = cloud.start("launch/tpu.sh", "stop", *WHERE, "--grace=1000")
    cloud.wait(lambda: is_asked(trainer))
    os.kill(trainer, signal.SIGCONT)
    _, errors = stop.communicate(timeout=1000)
    assert stop.returncode == 0, errors
    assert "[worker 0] ce on fashion_mnist: 190 training" in cloud.tpu("logs").stdout
    status = cloud.tpu("status", WORKDIR)
    assert status.returncode == 75
    assert "run saved" in status.stdout
    (log,) = [path.read_text() for path in (run / "logs").iterdir()]
    (stopped,) = re.findall(r"stopped by SIGTERM, saved at step (\d+)", log)
    assert 0 < saved(run) == int(stopped) < STEPS

    result = cloud.tpu("supervise", *command("--type=v4-8", "--yes"), SYNC_JAX_POLL="1")
    assert result.returncode == 0, result.stderr
    assert f"started at step {stopped}\n" in result.stderr
    (log,) = [path.read_text() for path in (run / "logs").iterdir()]
    assert f"resuming at step {stopped} of {STEPS}" in log
    check_finished(run)
    status = cloud.tpu("status", WORKDIR)
    assert (status.returncode, "run done" in status.stdout) == (0, True)
    assert f"step={STEPS}" in status.stdout

    assert cloud.tpu("unlock").returncode == 0
    kept = sorted(cloud.bucket.rglob("*"))
    assert cloud.tpu("delete", stdin="n\n").returncode == 1
    assert not cloud.calls("delete")
    assert cloud.tpu("delete", "--yes").returncode == 0
    assert sorted(cloud.bucket.rglob("*")) == kept
    gone = cloud.tpu("status", WORKDIR)
    assert (gone.returncode, gone.stdout) == (1, "machine gone\n")
    assert "there is no machine sync" in cloud.tpu("delete", "--yes").stderr


@pytest.mark.slow
def test_a_preempted_slice_of_two_with_the_real_trainer(tmp_path):
    """Two processes that train one network, saved by one SIGTERM each and resumed on new hosts."""
    cloud = Cloud(tmp_path / "cloud", workers=2)
    cloud.set(grace=300.0)  # it may have much to compile before its first step
    try:
        (cloud.root / "port").write_text(str(processes.free_port()))
        tiny.prepare(tmp_path).rename(cloud.bucket / "data")
        run = cloud.bucket / "run"
        spot = ["--type=v5litepod-8", "--spot", "--yes"]
        words = ["supervise", *WHERE, *command(*spot)]
        child = cloud.start("launch/tpu.sh", *words, SYNC_JAX_POLL="2")
        cloud.wait((run / "config.json").exists)  # written when both mind SIGTERM
        cloud.fake.preempt()
        _, shown = child.communicate(timeout=1000)
        assert child.returncode == 0, shown
        assert re.search("the machine is (SUSPENDED|PREEMPTED): preemption 1\n", shown)
        assert "failure" not in shown
        for worker in range(2):
            log = (cloud.home(worker) / ".sync_jax" / "log").read_text()
            assert "ended with exit status 0" in log
        # What the machines that are gone said last: they had saved, and the run went on from there.
        log = (cloud.home() / ".sync_jax" / "log").read_text()
        assert "2 CPU devices of 2 processes" in log
        (resumed,) = re.findall(rf"resuming at step (\d+) of {STEPS}", log)
        assert 0 < int(resumed) < STEPS
        assert f"started at step {resumed}\n" in shown
        check_finished(run)
    finally:
        cloud.close()


def test_a_venv_that_is_a_link_is_not_pushed(tmp_path):
    """It may lie on a larger disk; a host that got the link would install, and delete, there."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(REPOSITORY / ".gitignore", tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / ".venv").symlink_to("disk")
    listed = ["git", "ls-files", "--others", "--exclude-standard"]  # what push packs
    result = subprocess.run(listed, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout == ".gitignore\n"


def test_a_dataset_in_the_checkout_is_not_pushed(cloud: Cloud, tmp_path):
    """And nothing is created for it."""
    checkout = tmp_path / "checkout"
    for name in ("launch", "configs"):
        shutil.copytree(REPOSITORY / name, checkout / name)
    for name in ("setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, checkout)
    subprocess.run(["git", "init", "-q", str(checkout)], check=True)
    push = [f"{checkout}/launch/gpu.sh", "push", "--host=me@server"]
    assert cloud.run(*push).returncode == 0
    images = checkout / "prepared" / "cifar 10" / "images.npy"
    images.parent.mkdir(parents=True)
    with images.open("wb") as file:
        file.truncate(101_000_000)
    (checkout / "prepared" / "labels.npy").write_bytes(b"0" * 2_000_000)
    supervise = [f"{checkout}/launch/tpu.sh", "supervise", *MACHINE, WORKDIR, CONFIG, "--yes"]
    for command in (push, supervise):
        before = len(cloud.calls())
        result = cloud.run(*command)
        assert (result.returncode, result.stdout) == (2, "")
        assert re.fullmatch(
            r"launch/.pu\.sh: to every host would go 103 MB, most of it in prepared/ \(103 MB; "
            r"the largest file: prepared/cifar 10/images\.npy, 101 MB\): data belong outside .*; "
            r"SYNC_JAX_PUSH_MB=100 is the limit\n",
            result.stderr,
        ), result.stderr
        assert [call[1:3] for call in cloud.calls()[before:]] in ([], [["auth", "list"]])
    images.unlink()
    assert cloud.run(*push, SYNC_JAX_PUSH_MB="1").returncode == 2
    assert cloud.run(*push).returncode == 0


@pytest.mark.parametrize("script", ["tpu", "gpu"])
def test_a_push_that_was_cut_off_fails_and_changes_nothing(script, cloud: Cloud):
    """Whatever of it arrived, also where the copy did not notice."""
    if script == "tpu":
        assert cloud.tpu("create", "--type=v4-8", "--yes").returncode == 0
    command = [f"launch/{script}.sh", "push", *(WHERE if script == "tpu" else ["--host=me@server"])]
    assert cloud.run(*command).returncode == 0
    code = cloud.home() / "sync_jax"
    (code / "README.md").write_text("old")
    cloud.set(cut=[0, 100, 200_000])
    for _ in range(3):
        assert cloud.run(*command).returncode == 1  # 2 is bad usage
        assert (code / "README.md").read_text() == "old"
    assert cloud.run(*command).returncode == 0
    assert (code / "README.md").read_text() == (REPOSITORY / "README.md").read_text()
    assert not list(cloud.home().glob("sync_jax.*"))


def test_delete_finds_out_what_it_is(cloud: Cloud):
    """A spot machine needs no --spot to be deleted: forgetting it would cost money."""
    assert cloud.tpu("create", "--type=v4-8", "--spot", "--yes").returncode == 0
    assert cloud.tpu("delete", "--yes").returncode == 0
    assert [call[3] for call in cloud.calls("delete")] == ["queued-resources"]


def test_nothing_is_deleted_while_the_cloud_does_not_answer(cloud: Cloud):
    """It would be the machine without its request."""
    assert cloud.tpu("create", "--type=v4-8", "--spot", "--yes").returncode == 0
    cloud.set(fail={"list": 1})
    result = cloud.tpu("delete", "--yes")
    assert (result.returncode, cloud.calls("delete")) == (1, [])
    assert "so nothing is deleted: ERROR: (gcloud) UNAVAILABLE" in result.stderr
    assert cloud.tpu("delete", "--yes").returncode == 0


def test_nothing_is_created_while_the_cloud_does_not_answer(cloud: Cloud):
    """There may be one of the name."""
    cloud.set(fail={"list": 1})
    result = cloud.tpu("create", "--type=v4-8", "--yes")
    assert (result.returncode, cloud.calls("create")) == (1, [])
    assert "so nothing is created: ERROR: (gcloud) UNAVAILABLE" in result.stderr
    assert result.stdout.splitlines()[-1].strip() == DELETE


def test_a_creation_that_breaks_off_ends_with_how_to_delete(cloud: Cloud):
    cloud.set(fail={"create": 1})
    result = cloud.tpu("create", "--type=v4-8", "--yes")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1].strip() == DELETE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("verb", ["create", "supervise"])
def test_an_interrupted_creation_ends_with_how_to_delete(verb, number, cloud: Cloud):
    """At once, also while gcloud does not answer."""
    cloud.set(hang={"create": 1})
    more = [*MACHINE, WORKDIR, CONFIG, "--yes"]
    child = cloud.start("env", "--default-signal", "launch/tpu.sh", verb, *more)
    cloud.wait(lambda: bool(cloud.calls("create")))
    child.send_signal(number)
    output, errors = child.communicate(timeout=250)  # and not 300, or 1,800
    assert child.returncode == 1, errors
    assert output.splitlines()[-1].strip() == DELETE
    left = ("sleep", "gcloud")
    cloud.wait(
        lambda: not [x for x in cloud.left().values() if any(word in x for word in left)], 250
    )


def test_a_workdir_on_a_spot_machines_own_disk_is_refused(cloud: Cloud):
    """Also where the call that runs does not say that it is one."""
    cloud.trainer("exit 0")
    stat = 'if [ "$1" = -f ]; then echo ext2/ext3; else exec /usr/bin/stat "$@"; fi'
    cloud.script("host-bin/stat", stat)
    workdir = f"--workdir={cloud.root}/run"
    for spot, status in ((["--spot"], 2), ([], 0)):
        assert cloud.tpu("create", "--type=v4-8", *spot, "--yes").returncode == 0
        assert cloud.tpu("setup").returncode == 0
        result = cloud.tpu("run", workdir, CONFIG)
        assert result.returncode == status, result.stderr
        assert ("lies on this host's own disk (ext2/ext3)" in result.stderr) == bool(spot)
        assert cloud.tpu("delete", "--yes").returncode == 0


def test_a_request_that_will_not_be_served_ends_the_wait(cloud: Cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES", "FAILED\tno quota"]])
    result = cloud.tpu("create", "--type=v4-8", "--valid-until=1h", "--yes")
    assert result.returncode == 1
    assert "it will not come: FAILED (no quota); delete the request" in result.stderr


def test_a_request_that_expires_ends_the_wait(cloud: Cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES"]])
    result = cloud.tpu("create", "--type=v4-8", "--valid-until=1s", "--yes")
    assert result.returncode == 1
    assert "it was not served within 1s: FAILED (the valid-until" in result.stderr
    assert result.stdout.splitlines()[-1] == f"  launch/tpu.sh delete {' '.join(WHERE)}"
    assert not cloud.calls("delete")


def test_a_cloud_that_never_answers_ends_the_wait(cloud: Cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES"]])
    child = cloud.start("launch/tpu.sh", "create", *MACHINE, "--yes")
    cloud.wait(lambda: bool(cloud.calls("create")))
    cloud.set(fail={"list": 1000})
    _, errors = child.communicate(timeout=1000)
    assert child.returncode == 1
    assert "UNAVAILABLE: the service is not there (6 in a row)" in errors


def test_every_worker_has_its_log(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer("echo I am $HOSTNAME")
    for verb in (["create", "--type=v4-32", "--yes"], ["setup"], ["run", CONFIG, WORKDIR]):
        result = cloud.tpu(*verb)
        assert result.returncode == 0, result.stderr
    for worker in range(3):
        cloud.wait(lambda w=worker: (cloud.home(w) / ".sync_jax" / "exit").exists())
    shown = cloud.tpu("logs").stdout
    for worker in range(3):
        assert f"[worker {worker}] I am t1v-n-0123abcd-w-{worker}\n" in shown


GPU = ["--host=me@server", "--workdir=runs/a"]


def test_a_gpu_server(cloud: Cloud):
    cloud.trainer(
        'trap "exit 75" TERM; echo begun; save 3; for i in $(seq 9999); do sleep 0.05; done'
    )

    def gpu(verb: str, *arguments: str):
        return cloud.run("launch/gpu.sh", verb, *GPU, *arguments)

    assert gpu("status").returncode == 1
    for verb in ("setup", "push", "run"):
        result = gpu(verb, CONFIG)
        assert result.returncode == 0, result.stderr
    cloud.wait(lambda: "step=3" in gpu("status").stdout)
    assert "[worker 0] begun" in gpu("logs").stdout
    assert gpu("stop").returncode == 0
    status = gpu("status")
    assert (status.returncode, "run saved" in status.stdout) == (75, True)
    installed = (cloud.home() / "installed").read_text()
    assert "-e .[cuda]" in installed
    assert (cloud.home() / "sync_jax" / "runs" / "a" / "checkpoints" / "3").is_dir()


def test_a_supervised_gpu_server(cloud: Cloud):
    """ssh fails for a while, the server is restarted, a run fails, the next is done."""
    cloud.trainer(
        'n=$(ls "$workdir/checkpoints" 2>/dev/null | wc -l); save $((n + 1))\n'
        "case $n in 0) exit 75 ;; 1) kill -KILL $PPID $$ ;; 2) exit 1 ;; esac"
    )
    cloud.set(fail={"ssh": 2})
    result = cloud.run("launch/gpu.sh", "supervise", *GPU, CONFIG, "--yes")
    assert result.returncode == 0, result.stderr
    assert "Connection timed out (2 in a row)" in result.stderr
    assert "preemption 1" in result.stderr
    assert "worker 0 lost its run: failure 1" in result.stderr
    assert "worker 0 ended with exit status 1: failure 2" in result.stderr
    assert "me@server is left as it is" in result.stdout.splitlines()[-1]
    assert not cloud.calls("gcloud")
