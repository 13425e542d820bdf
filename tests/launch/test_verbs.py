"""Every verb by itself: on a slice with the real trainer, on a GPU server."""

import json
import re

import pytest

from tests import tiny
from tests.launch.cloud import CONFIG, WHERE, WORKDIR, Cloud


@pytest.mark.slow
def test_a_run_of_the_real_trainer_over_a_stop_and_a_preemption(cloud: Cloud, tmp_path):
    """Every verb: stop saves, status tells, supervise resumes, twice, delete leaves the workdir."""
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

    epochs = ["--config.train.epochs=30", "--config.checkpoint.every_epochs=1"]
    overrides = [f"--config.{path}={value}" for path, value in tiny.OVERRIDES.items()]
    options = [*overrides, *epochs, "--config.method=ce"]
    command = [WORKDIR, CONFIG, "--", *options, "--config.data.data_dir=gs://bucket/data"]

    def saved() -> int:
        names = [p.name for p in run.glob("checkpoints/*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    assert cloud.tpu("run", *command).returncode == 0
    status = cloud.tpu("status", WORKDIR)
    assert status.returncode == 0
    assert "worker=0 state=running exit=- step=" in status.stdout
    again = cloud.tpu("run", *command)
    assert again.returncode == 1
    assert "a run, or its setup, is going on here" in again.stderr
    cloud.wait(lambda: saved() > 0)
    assert cloud.tpu("stop").returncode == 0
    assert "[worker 0] ce on fashion_mnist: 190 training" in cloud.tpu("logs").stdout
    status = cloud.tpu("status", WORKDIR)
    assert status.returncode == 75
    assert "run saved" in status.stdout
    log = (run / "logs" / "worker-0.log").read_text()
    (stopped,) = re.findall(r"stopped by SIGTERM, saved at step (\d+)", log)
    assert saved() == int(stopped)

    # On from there; at its first checkpoint the machine is taken away, by SIGTERM first.
    child = cloud.start("launch/tpu.sh", "supervise", *WHERE, "--type=v4-8", "--yes", *command)
    cloud.wait(lambda: saved() > int(stopped))
    assert cloud.run(f"{cloud.root}/bin/preempt").returncode == 0
    _, shown = child.communicate(timeout=300)
    assert child.returncode == 0, shown
    assert f"started at step {stopped}\n" in shown
    assert "the machine is PREEMPTED: preemption 1" in shown
    (resumed,) = re.findall(
        r"resuming at step (\d+) of 356", (cloud.home() / ".sync_jax" / "log").read_text()
    )
    assert int(stopped) < int(resumed) < 356
    # What the machine that is gone said last: it had saved, and the run went on from there.
    assert f"started at step {resumed}\n" in shown
    report = json.loads((run / "report.json").read_text())
    assert report["training"]["steps"] == 356
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 356
    status = cloud.tpu("status", WORKDIR)
    assert (status.returncode, "run done" in status.stdout) == (0, True)
    assert "step=356" in status.stdout

    assert cloud.tpu("unlock").returncode == 0
    kept = sorted(cloud.bucket.rglob("*"))
    deleted = len(cloud.calls("delete"))
    assert cloud.tpu("delete", stdin="n\n").returncode == 1
    assert len(cloud.calls("delete")) == deleted == 1
    assert cloud.tpu("delete", "--yes").returncode == 0
    assert sorted(cloud.bucket.rglob("*")) == kept
    gone = cloud.tpu("status", WORKDIR)
    assert (gone.returncode, gone.stdout) == (1, "machine gone\n")
    assert "there is no machine sync" in cloud.tpu("delete", "--yes").stderr


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


def test_a_request_that_will_not_be_served_ends_the_wait(cloud: Cloud):
    cloud.set(lives=[["WAITING_FOR_RESOURCES", "FAILED"]])
    result = cloud.tpu("create", "--type=v4-8", "--valid-until=1h", "--yes")
    assert result.returncode == 1
    assert "it will not come: FAILED; delete the request" in result.stderr


def test_every_worker_has_its_log(slice_of_three: Cloud):
    cloud = slice_of_three
    cloud.trainer("echo I am $FAKE_HOSTNAME")
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
        'trap "exit 75" TERM; save 3; echo begun; for i in $(seq 9999); do sleep 0.05; done'
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
    assert gpu("unlock").returncode == 0
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
