"""host.sh: one run at a time on a machine, whoever starts it."""

import os
import pwd
import re
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.launch.cloud import REPOSITORY
from tests.launch.host import PATIENT, STUBBORN, Host, begin


def test_one_run_per_machine_nor_code_under_it(host: Host):
    begin(host.ready(), PATIENT)
    host.pack()
    log = (host.state / "log").read_text()
    # The same again, as gcloud does where a connection breaks, is no second run.
    assert host.do("run", "--", "--workdir=runs/a") == (0, "worker 0: already running\n")
    for words in (["run", "--", "--workdir=runs/b"], ["setup", "tpu"], ["unpack"]):
        status, output = host.do(*words)
        assert status == 1
        assert "a run, or its setup, is going on here; stop ends it" in output
    assert (host.state / "log").read_text() == log
    assert host.do("status")[1] == "worker=0 state=running exit=- step=0\n"
    assert host.do("status", "runs/a/")[1] == "worker=0 state=running exit=- step=0\n"
    assert host.do("status", "runs/b")[1] == "worker=0 state=other exit=- step=0\n"
    assert host.do("stop", "120") == (0, "worker 0: stopped\n")
    assert host.ended() == 75
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0


@pytest.mark.parametrize("words", [["a", "b", "c", "d"], ["a", "a", "a", "a"]])
def test_of_two_that_start_at_once_one_does(words, host: Host):
    """And who wanted the same has it."""
    host.ready().cloud.trainer(PATIENT)
    children = [host.start("run", "--", f"--workdir=runs/{word}") for word in words]
    said = [child.communicate()[0] for child in children]
    assert said.count("worker 0: started\n") == 1
    others = 0 if words[0] == words[1] else 1
    assert sorted(child.returncode for child in children) == [0, others, others, others]
    assert (host.state / "log").read_text().count("starts") == 1
    assert said.count("worker 0: already running\n") == (0 if others else 3)


def test_an_equal_start_waits_for_a_trainer_that_is_slow_to_begin(host: Host):
    host.ready().cloud.trainer(STUBBORN)
    # What waits for so many looks does not wait long.
    host.cloud.script("host-bin/sleep", '[ "$1" = 0.05 ] || exec /usr/bin/sleep "$@"')
    slowly = 'until [ -e "$HOME/go" ]; do sleep 0.02; done\nexec /usr/bin/setsid "$@"'
    host.cloud.script("host-bin/setsid", slowly)
    first, second = (host.start("run", "--", "--workdir=runs/a") for _ in range(2))
    time.sleep(6)  # longer than for anything but a start
    assert (first.poll(), second.poll()) == (None, None)
    (host.home / "go").touch()
    said = [child.communicate(timeout=1000)[0] for child in (first, second)]
    assert sorted(said) == ["worker 0: already running\n", "worker 0: started\n"]


def test_a_start_that_was_refused_is_not_already_running(host: Host):
    """Nor one whose trainer was killed, and whose children still hold the machine."""
    begin(host.ready(), STUBBORN)
    trainer = int((host.state / "run").read_text().split()[1])
    os.kill(int(Path(f"/proc/{trainer}/stat").read_text().split()[3]), signal.SIGKILL)
    os.kill(trainer, signal.SIGKILL)
    status, output = host.do("run", "--", "--workdir=runs/a")
    assert (status, "a run, or its setup, is going on here; stop ends it" in output) == (1, True)


def other_home(host: Host) -> Host:
    """Of another user, for all that host.sh can see, on the same machine."""
    other = Host(host.cloud, "other")
    other.environment["SYNC_JAX_LOCK"] = host.environment["SYNC_JAX_LOCK"]
    return other.ready()


def test_one_run_per_machine_whoever_starts_it(host: Host):
    other = other_home(host)
    (other.home / "sync_jax" / "runs" / "a" / "checkpoints" / "3").mkdir(parents=True)
    begin(host.ready(), PATIENT)
    # Another test's user has a name, if it comes at the same time.
    theirs = "a run of (another user, or of another home folder,|nobody) goes on here; only they"
    other.pack()
    for words in (["run", "--", "--workdir=runs/a"], ["setup", "tpu"], ["unpack"], ["stop", "1"]):
        status, output = other.do(*words)
        assert status == 1
        assert re.search(theirs, output)
    shown = r"worker=0 state=other exit=- step=3 user=(unknown|nobody)\n"
    assert re.fullmatch(shown, other.do("status", "runs/a")[1])
    assert host.do("status", "runs/a")[1] == "worker=0 state=running exit=- step=0\n"
    assert host.do("stop", "120")[0] == 0
    assert other.do("status", "runs/a")[1] == "worker=0 state=ready exit=- step=3\n"
    assert other.do("run", "--", "--workdir=runs/a")[0] == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be another user")
def test_another_users_run_is_called_theirs(host: Host):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        lock, script = Path(folder) / "lock", Path(folder) / "host.sh"
        host.environment["SYNC_JAX_LOCK"] = str(lock)
        host.ready()
        script.write_text(f"exec 9<'{lock}'; flock 9; echo has it; read -r")
        child = subprocess.Popen(
            ["bash", str(script), "attempt"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=65534,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "has it\n"
        user = pwd.getpwuid(65534).pw_name
        assert host.do("status")[1] == f"worker=0 state=other exit=- step=0 user={user}\n"
        for words in (["run", "--", "--workdir=runs/a"], ["stop", "1"]):
            status, output = host.do(*words)
            assert (status, f"a run of {user} goes on here; only they" in output) == (1, True)
        child.communicate("\n")
        assert host.do("status")[1] == "worker=0 state=ready exit=- step=0\n"


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_a_lock_that_is_no_file_is_not_followed(kind, host: Host):
    lock, precious = Path(host.environment["SYNC_JAX_LOCK"]), host.home / "precious"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(precious)
    if kind == "link":
        precious.write_text("data")
    host.pack()
    status, output = host.do("unpack")
    assert status == 1
    assert "is no file that all may read: remove it" in output
    assert precious.exists() == (kind == "link")


def test_the_lock_is_open_to_others_whatever_the_umask(host: Host):
    host.pack()
    command = f"umask 077; exec bash {REPOSITORY}/launch/host.sh unpack"
    subprocess.run(["bash", "-c", command], env=host.environment, check=True)
    assert Path(host.environment["SYNC_JAX_LOCK"]).stat().st_mode & 0o777 == 0o644
