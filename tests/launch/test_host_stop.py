"""host.sh stop and unlock: what is ours ends for certain, and nothing else."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.host import PATIENT, STUBBORN, Host, begin, lives


def test_a_setup_that_hangs_is_ended_by_stop(host: Host):
    host.pack()
    host.do("unpack")
    hangs = host.cloud.root / "pip-hangs"
    hangs.touch()
    child = host.start("setup", "tpu")
    host.cloud.wait(lambda: bool(hangs.read_text()))
    bystander = subprocess.Popen(["sleep", "300"], env=host.environment)
    pip = int(hangs.read_text())
    host.cloud.wait(lambda: lives(pip))
    assert host.do("status")[1] == "worker=0 state=busy exit=- step=0\n"
    status, output = host.do("setup", "tpu")
    assert (status, "a run, or its setup, is going on here; stop ends it" in output) == (1, True)
    assert host.do("stop", "120") == (0, "worker 0: stopped\n")
    child.communicate(timeout=1000)
    assert child.returncode != 0
    assert not lives(pip)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
    hangs.unlink()
    assert host.do("status")[1] == "worker=0 state=new exit=- step=0\n"
    assert host.do("setup", "tpu")[0] == 0


def test_stop_kills_what_does_not_end_and_nothing_but_the_run(host: Host):
    bystander = subprocess.Popen(["sleep", "300"], env=host.environment)
    begin(host.ready(), STUBBORN)
    trainer = int((host.state / "run").read_text().split()[1])
    assert host.do("stop", "1") == (0, "worker 0: stopped\n")
    assert host.ended() == 128 + signal.SIGKILL
    assert not Path(f"/proc/{trainer}").exists()
    assert bystander.poll() is None
    left = [pid for pid, line in host.cloud.left().items() if "sleep" in line]
    assert left == [bystander.pid]  # not even the sleep that the run had started
    bystander.kill()
    bystander.wait()


def test_stop_asks_a_run_whose_processes_are_slowly_found(host: Host):
    """Whose numbers are still written when the trainer's is among them already."""
    text = 'if [ "$1" != -lzsxF ]; then exec /usr/bin/grep "$@"; fi\n'
    text += '/usr/bin/grep "$@" | while read -r line; do echo "$line"; sleep 0.05; done'
    host.cloud.script("host-bin/grep", text)
    some = PATIENT.replace("exit 75", "kill $(jobs -p); exit 75")
    begin(host.ready(), f"sleep 300 & sleep 300 & sleep 300 &\n{some}")
    assert host.do("stop", "120") == (0, "worker 0: stopped\n")
    assert host.ended() == 75


def test_stop_asks_a_run_whose_number_is_noted_late(host: Host):
    begin(host.ready(), PATIENT)
    noted = (host.state / "run").read_text()
    (host.state / "run").write_text(noted.splitlines()[0] + "\n")
    child = host.start("stop", "120")
    time.sleep(1)
    (host.state / "run").write_text(noted)
    assert child.communicate(timeout=1000)[0] == "worker 0: stopped\n"
    assert host.ended() == 75


def test_the_end_of_a_killed_run_is_noted_though_its_log_is_copied_slowly(host: Host):
    for name in ("mkdir", "cp"):
        slowly = f'case $* in *logs*) sleep 1 ;; esac\nexec /usr/bin/{name} "$@"'
        host.cloud.script(f"host-bin/{name}", slowly)
    workdir = host.home / "sync_jax" / "runs" / "a"
    begin(host.ready(), f'mkdir -p "{workdir}"\n{STUBBORN}')
    assert host.do("stop", "1") == (0, "worker 0: stopped\n")
    assert (host.state / "exit").read_text() == f"{128 + signal.SIGKILL}\n"
    assert len(list((workdir / "logs").iterdir())) == 1


def test_stop_ends_what_outlived_the_run(host: Host):
    """Its parent and the run itself were killed; a child of the run still holds the machine."""
    begin(host.ready(), STUBBORN)
    trainer = int((host.state / "run").read_text().split()[1])
    parent = int(Path(f"/proc/{trainer}/stat").read_text().split()[3])
    for pid in (parent, trainer):
        os.kill(pid, signal.SIGKILL)
    host.cloud.wait(lambda: not Path(f"/proc/{trainer}").exists())
    assert host.do("run", "--", "--workdir=runs/a")[0] == 1
    assert host.do("stop", "1")[0] == 0
    assert host.do("status")[1] == "worker=0 state=lost exit=- step=0\n"
    host.cloud.trainer("exit 0")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0


def test_a_recorded_number_that_is_another_process_now_is_left_alone(host: Host):
    begin(host.ready(), PATIENT)
    bystander = subprocess.Popen(["sleep", "300"])
    record = (host.state / "run").read_text().splitlines()
    (host.state / "run").write_text(f"{record[0]}\n{bystander.pid}\n")
    assert host.do("stop", "0")[0] == 0
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_term_to_all_processes_saves_and_is_noted(host: Host):
    """As the system does when a spot machine goes; systemd sends a HUP to a login's session too."""
    host.ready()
    for _ in range(3):
        begin(host, PATIENT)
        host.signal(signal.SIGTERM, signal.SIGHUP)
        assert host.ended() == 75
        (host.state / "log").unlink()


SAVING = """
asked=0
trap 'asked=$((asked + 1))' TERM
echo begun
until [ $asked = 1 ]; do sleep 0.02; done
touch "$HOME/saving"
for i in $(seq 40); do sleep 0.02; if [ $asked = 2 ]; then exit 143; fi; done
exit 75
"""


@pytest.mark.parametrize("first", ["stop", "system"])
def test_a_second_stop_does_not_end_a_run_that_is_saving(first, host: Host):
    """The trainer takes a second SIGTERM as an order to end at once."""
    host.ready()
    for _ in range(2):  # and the next run is asked again
        begin(host, SAVING)
        if first == "stop":
            child = host.start("stop", "120")
        else:
            host.signal(signal.SIGTERM)
            host.cloud.wait((host.state / "asked").exists)
        host.cloud.wait((host.home / "saving").exists)
        assert host.do("stop", "120") == (0, "worker 0: stopped\n")
        assert host.ended() == 75
        (host.home / "saving").unlink()
        (host.state / "log").unlink()
        if first == "stop":
            assert child.communicate()[0] == "worker 0: stopped\n"


def test_the_stale_lock_goes_only_when_nobody_holds_the_accelerator(host: Host):
    lock, device = host.cloud.root / "libtpu_lockfile", host.cloud.root / "accel0"
    assert host.do("unlock") == (0, "worker 0: no lock of libtpu here\n")
    lock.touch()
    with device.open("w"):
        status, output = host.do("unlock")
        assert (status, lock.exists()) == (1, True)
        assert f"process {os.getpid()} holds the accelerator: {lock} is left" in output
    assert host.do("unlock") == (0, f"worker 0: removed a stale {lock}\n")
    assert not lock.exists()


def test_stop_removes_the_lock_of_what_it_killed(host: Host):
    lock = host.cloud.root / "libtpu_lockfile"
    lock.touch()
    begin(host.ready(), 'exec 3>"$FAKE_ROOT/accel0"\n' + STUBBORN)
    status, output = host.do("stop", "0")
    assert status == 0
    assert "removed a stale" in output
    assert not lock.exists()
