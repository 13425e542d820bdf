"""tpu.sh and host.sh: every verb against a cloud in a folder, once with the real trainer."""

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests import tiny
from tests.launch.cloud import CONFIG, TPU, WHERE, WORKDIR, Cloud

DELETE = f"  {TPU} delete {' '.join(WHERE)}\n"
STEPS = 18
# Scripts in the place of the trainer.
PATIENT = "trap 'exit 75' TERM\necho begun\nfor i in $(seq 9999); do sleep 0.05; done"
STUBBORN = "trap '' TERM\nsleep 300 & echo $! >$HOME/child; echo begun\nwait"


def begin(cloud: Cloud, trainer: str) -> None:
    cloud.trainer(trainer)
    if not cloud.get("slices"):
        cloud.ready()
    assert "worker 0: started\n" in cloud.tpu("run", WORKDIR, CONFIG)
    cloud.wait(lambda: "begun" in cloud.log())


def ended(cloud: Cloud, worker: int = 0) -> str:
    cloud.wait(cloud.notes("exit", worker).exists)
    subprocess.run(["flock", cloud.notes("lock", worker), "true"], check=True)
    return cloud.notes("exit", worker).read_text().strip()


@pytest.mark.slow
def test_every_verb_with_the_real_trainer(cloud: Cloud, tmp_path):
    """Stop saves, status tells, run resumes, delete leaves the workdir."""
    tiny.prepare(tmp_path).rename(cloud.bucket / "data")
    run = cloud.bucket / "run"
    changes = [f"--config.{path}={value}" for path, value in tiny.OVERRIDES.items()]
    more = ["--config.method=ce", "--config.data.data_dir=gs://bucket/data"]
    command = [WORKDIR, CONFIG, "--", *changes, *more]

    cloud.set(states=["ACCEPTED", "WAITING_FOR_RESOURCES", "ACTIVE"])
    created = cloud.tpu("create", "--type=v5litepod-4", "--spot")
    assert "the request is WAITING_FOR_RESOURCES" in created
    cloud.tpu("run", *command, status=1)  # nothing is there yet
    assert cloud.tpu("setup", WORKDIR).endswith("worker 0: ready\n")
    assert "worker 0: no run; last checkpoint: none\n" in cloud.tpu("status", status=1)

    assert cloud.tpu("run", *command).endswith("worker 0: started\n")
    # From here on it minds SIGTERM; and it would be done before all of the following is.
    cloud.wait((run / "config.json").exists)
    os.kill(cloud.pid(), signal.SIGSTOP)
    assert "READY\nworker 0: running; last checkpoint: " in cloud.tpu("status")
    assert cloud.tpu("run", *command).endswith("worker 0: already running\n")
    other = cloud.tpu("run", *command, "--config.seed=7", status=1)
    assert "another run, or a setup, is going on here; stop ends it" in other
    assert "a run, or a setup, is going on here" in cloud.tpu("setup", WORKDIR, status=1)
    stop = cloud.start(TPU, "stop", *WHERE, "--grace=600")
    cloud.wait(cloud.notes("asked").exists)
    os.kill(cloud.pid(), signal.SIGCONT)
    output, errors = stop.communicate(timeout=600)
    assert (stop.returncode, output) == (0, "worker 0: stopped\n"), errors
    ended_with = r"worker 0: ended with exit status 75; last checkpoint: (\d+)\n"
    (step,) = re.findall(ended_with, cloud.tpu("status", status=75))
    assert 0 < int(step) < STEPS
    assert f"worker 0: sync_jax: stopped by SIGTERM, saved at step {step}" in cloud.tpu("logs")

    cloud.tpu("run", *command)
    assert ended(cloud) == "0"
    assert f"ended with exit status 0; last checkpoint: {STEPS}\n" in cloud.tpu("status")
    assert f"resuming at step {step} of {STEPS}" in cloud.tpu("logs")
    assert json.loads((run / "report.json").read_text())["training"]["steps"] == STEPS
    (kept,) = (run / "logs").iterdir()
    assert kept.read_text() == cloud.log()

    contents = sorted(cloud.bucket.rglob("*"))
    assert "nothing is deleted" in cloud.tpu("delete", stdin="n\n", status=1)
    assert not cloud.calls("delete")
    cloud.tpu("delete", stdin="y\n")
    assert cloud.get("slices") == []
    assert sorted(cloud.bucket.rglob("*")) == contents


NASTY = [
    "--config.a=two words",
    '--config.b=it\'s "quoted"',
    "--config.c=$HOME `id` $(id) \\ !",
    "--config.d=(1, 2); rm -rf x & | > < * ? [a] {b,c} ~ #",
    "--config.e=two\nlines",
    "--config.f=",
    "--config.g=naïve",
    "--config.h=a=b",
]


def test_arguments_and_secrets_arrive_on_every_host_and_secrets_are_shown_nowhere(cloud: Cloud):
    """Through this shell, gcloud, the host's shell and host.sh, to the trainer."""
    secret = "hunter2 $HOME 'x'\nsecond line"
    cloud.trainer(
        'for a; do printf "%s\\0" "$a"; done >"$HOME/argv"; printf %s "$SECRET" >"$HOME/secret"\n'
        'echo "I am $HOSTNAME"'
    )
    cloud.set(workers=3)
    workdir = "--workdir=gs://bucket/a run's $x"
    cloud.ready()
    shown = cloud.tpu("run", workdir, CONFIG, "--env=SECRET", "--", *NASTY, SECRET=secret)
    for worker in range(3):
        assert ended(cloud, worker) == "0"
        home = cloud.home(worker)
        expected = [CONFIG, f"--workdir={cloud.bucket}/a run's $x", *NASTY]
        assert (home / "argv").read_text().split("\0")[:-1] == expected
        assert (home / "secret").read_text() == secret
        (home / "secret").unlink()
    shown += cloud.tpu("status") + cloud.tpu("logs")
    for worker in range(3):
        assert f"worker {worker}: ended with exit status 0; " in shown
        assert f"worker {worker}: I am t1v-n-0123abcd-w-{worker}\n" in shown
    for worker, status in ((1, 75), (2, 1)):  # the worst decides
        cloud.notes("exit", worker).write_text(f"{status}\n")
        cloud.tpu("status", status=status)
    for path in cloud.root.rglob("host.sh"):  # no run comes of it, and the secret does not stay
        path.unlink()
    cloud.tpu("run", workdir, CONFIG, "--env=SECRET", status=1, SECRET=secret)
    dry = cloud.tpu("run", workdir, CONFIG, "--env=SECRET", "--dry-run", SECRET=secret)
    assert cloud.get("modes") == ["0o600"] * 6
    assert "hunter2" not in shown + dry + (cloud.root / "calls").read_text()
    files = [p for p in cloud.root.rglob("*") if p.is_file() and ".venv" not in p.parts]
    assert not [p for p in files if b"hunter2" in p.read_bytes() and "tests" not in p.parts]


def test_stop_kills_after_the_grace_and_nothing_but_the_run(cloud: Cloud):
    begin(cloud, STUBBORN)
    bystander = cloud.start("sleep", "300")
    assert cloud.tpu("stop", "--grace=1") == "worker 0: stopped\n"
    assert ended(cloud) == "137"
    assert "ended with exit status 137" in cloud.tpu("status", status=1)
    assert bystander.poll() is None
    child = (cloud.home() / "child").read_text().strip()  # which the run had started
    cloud.wait(lambda: not Path(f"/proc/{child}/exe").exists())
    # Notes of a process that is gone decide nothing: its number may be another process's by now.
    begin(cloud, PATIENT)
    (parent,) = re.findall(r"^PPid:\s(\d+)", Path(f"/proc/{cloud.pid()}/status").read_text(), re.M)
    for pid in (int(parent), cloud.pid()):  # as when the host restarts: nobody notes the end
        os.kill(pid, signal.SIGKILL)
    cloud.wait(lambda: "lost" in cloud.tpu("status", status=1))
    cloud.notes("pid").write_text(f"{bystander.pid}\n")
    assert "worker 0: lost, for it was killed" in cloud.tpu("status", status=1)
    assert cloud.tpu("stop") == "worker 0: stopped\n"
    assert bystander.poll() is None
    begin(cloud, PATIENT)


@pytest.mark.parametrize("who", ["two stops", "the system"])
def test_sigterm_saves_and_is_sent_once(who, cloud: Cloud):
    """A second SIGTERM ends a trainer that is saving; the system's reaches all processes."""
    begin(
        cloud,
        "asked=0; trap 'asked=$((asked + 1)); echo asked' TERM; echo begun\n"
        "until [ $asked -gt 0 ]; do sleep 0.02; done\n"
        "for i in $(seq 30); do sleep 0.02; done; exit $((74 + asked))",
    )
    if who == "two stops":
        first = cloud.start(TPU, "stop", *WHERE)
        cloud.wait(lambda: "asked" in cloud.log())
        assert cloud.tpu("stop") == "worker 0: stopped\n"
        assert first.communicate()[0] == "worker 0: stopped\n"
    else:
        os.killpg(os.getpgid(cloud.pid()), signal.SIGTERM)
    assert ended(cloud) == "75"
    assert len(list((cloud.bucket / "run" / "logs").iterdir())) == 1


def test_what_was_set_up_half_way_is_not_run_and_stale_files_go(cloud: Cloud):
    cloud.trainer("exit 0")
    cloud.ready()
    (cloud.home() / "sync_jax" / "removed.py").touch()
    (cloud.root / "pip-fails").touch()
    (cloud.home() / "sync_jax" / ".venv" / ".installed").write_text("another version")
    assert "not every host is set up" in cloud.tpu("setup", WORKDIR, status=1)
    assert "not set up: launch/tpu.sh setup" in cloud.tpu("run", WORKDIR, CONFIG, status=1)
    (cloud.root / "pip-fails").unlink()
    cloud.tpu("setup", WORKDIR)
    assert not (cloud.home() / "sync_jax" / "removed.py").exists()
    installed = (cloud.home() / "installed").read_text().splitlines()
    assert all(line.endswith("-c constraints.txt -e .[tpu]") for line in installed)
    cloud.tpu("run", WORKDIR, CONFIG)
    assert ended(cloud) == "0"
    for workdir, message in {
        "/home/me/run": "--workdir=/home/me/run is on this host's own disk",
        "gs://other/run": "gs://other cannot be mounted: does it exist",
    }.items():
        cloud.script("host-bin/mkdir", '[ "$2" = /home/me/run ] || exec /usr/bin/mkdir "$@"')
        assert message in cloud.tpu("run", f"--workdir={workdir}", CONFIG, status=1)


def test_create_takes_the_runtime_of_the_type_and_ends_with_how_to_delete(cloud: Cloud):
    runtimes = {
        "v2-8": "tpu-ubuntu2204-base",
        "v4-32": "tpu-ubuntu2204-base",
        "v5litepod-16": "v2-alpha-tpuv5-lite",
        "v5p-16": "v2-alpha-tpuv5",
        "v6e-64": "v2-alpha-tpuv6e",
    }
    for type_, runtime in runtimes.items():
        shown = cloud.tpu("create", f"--type={type_}", "--dry-run")
        assert f" --accelerator-type={type_} --version={runtime} " in shown
    assert cloud.tpu("create", "--type=v6e-64").endswith(DELETE)
    assert cloud.tpu("create", "--type=v6e-64", status=1).endswith("ALREADY_EXISTS: sync\n")
    cloud.tpu("delete", "--yes")
    assert [call[2] for call in cloud.calls("delete")] == ["tpu-vm"]
    cloud.tpu("create", "--type=v6e-64", "--spot")
    (call,) = cloud.calls("queued-resources", "create", "--accelerator-type=v6e-64", "--spot")
    assert "--runtime-version=v2-alpha-tpuv6e" in call


def test_a_request_that_is_not_served_or_not_seen_is_deleted_with_its_slice(cloud: Cloud):
    """Delete finds out itself that a slice belongs to a request, or does nothing."""
    cloud.set(states=["WAITING_FOR_RESOURCES", "FAILED"])
    failed = cloud.tpu("create", "--type=v4-8", "--spot", status=1)
    assert "the request is FAILED and will not be served: delete it" in failed
    assert DELETE in failed
    assert "requested: FAILED\n" in cloud.tpu("status", status=1)
    cloud.set(fails={"queued-resources list": 1})
    assert "nothing is deleted" in cloud.tpu("delete", "--yes", status=1)
    assert not cloud.calls("delete")
    cloud.tpu("delete", "--yes")
    assert [call[2] for call in cloud.calls("delete")] == ["queued-resources"]
    cloud.set(fails={"queued-resources describe": 3}, states=["ACTIVE"])
    assert DELETE in cloud.tpu("create", "--type=v4-8", "--spot")  # it is looked up again
    cloud.tpu("delete", "--yes")
    cloud.set(fails={"tpu-vm create": 1})
    assert DELETE in cloud.tpu("create", "--type=v4-8", status=1)
    cloud.set(states=["WAITING_FOR_RESOURCES"])
    before = len(cloud.calls("describe"))
    child = cloud.start("env", "--default-signal", TPU, "create", *WHERE, "--type=v4-8", "--spot")
    cloud.wait(lambda: len(cloud.calls("describe")) > before)
    os.killpg(child.pid, signal.SIGINT)
    assert child.communicate(timeout=60)[0].endswith(DELETE)
