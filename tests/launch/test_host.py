"""host.sh, on a host that is a folder: one run at a time, installed whole, stopped for certain."""

import contextlib
import os
import pwd
import re
import signal
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.launch.cloud import REPOSITORY, Cloud, dead_mounts, hanging_mounts
from tests.launch.fake_cloud import host_environment

CODE = ("setup.cfg", "pyproject.toml", "constraints.txt", "launch/venv.sh", "launch/host.sh")


class Host:
    """A host of its own, and what tpu.sh would say to it."""

    def __init__(self, cloud: Cloud, name: str = "server"):
        self.cloud = cloud
        self.home = cloud.root / "hosts" / name
        self.home.mkdir(parents=True)
        self.state = self.home / ".sync_jax"
        self.environment = host_environment(cloud.environment, str(self.home), 0)

    def pack(self, *files: str) -> None:
        with tarfile.open(self.home / "sync_jax.tar.gz", "w:gz") as archive:
            for file in (*CODE, *files):
                archive.add(REPOSITORY / file, file)

    def start(self, *words: str, stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(REPOSITORY / "launch" / "host.sh"), *words],
            env=self.environment,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def do(self, *words: str) -> tuple[int, str]:
        child = self.start(*words)
        output, errors = child.communicate(timeout=1000)
        return child.returncode, output + errors

    def ready(self) -> "Host":
        self.pack()
        assert self.do("unpack") == (0, "")
        status, output = self.do("setup", "tpu")
        assert status == 0, output
        return self

    def signal(self, *numbers: int) -> int:
        """To the trainer and all above it in its session; returns the session's first process."""
        pid = int((self.state / "run").read_text().split()[1])
        session = os.getsid(pid)
        chain = [pid]
        while chain[-1] != session:
            chain.append(int(Path(f"/proc/{chain[-1]}/stat").read_text().split()[3]))
        assert len(chain) > 1
        for number in numbers:
            for pid in reversed(chain):
                with contextlib.suppress(ProcessLookupError):  # it may have ended by the first
                    os.kill(pid, number)
        return session

    def ended(self) -> int:
        self.cloud.wait((self.state / "exit").exists)
        return int((self.state / "exit").read_text())


@pytest.fixture
def host(cloud: Cloud) -> Host:
    return Host(cloud)


PATIENT = "trap 'exit 75' TERM\necho begun\nfor i in $(seq 9999); do sleep 0.05; done"
STUBBORN = "trap '' TERM\nsleep 300 & echo begun\nwait"


def lives(pid: int) -> bool:
    """Not so what has ended and waits for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text() != ""
    except OSError:
        return False


def begin(host: Host, text: str) -> None:
    host.cloud.trainer(text)
    status, output = host.do("run", "--", "--workdir=runs/a")
    assert (status, output) == (0, "worker 0: started\n")
    host.cloud.wait(lambda: "begun" in (host.state / "log").read_text())


def test_setup_brings_a_python_and_says_ready_last(host: Host):
    host.pack()
    host.do("unpack")
    (host.cloud.root / "pip-fails").touch()
    status, output = host.do("setup", "tpu")
    assert status == 1
    assert "the packages cannot be installed" in output
    assert not (host.state / "ready").exists()
    status, output = host.do("run", "--", "--workdir=runs/a")
    assert status == 1
    assert "not set up, or not for this code" in output
    status, output = host.do("setup", "tpu")
    assert (status, output.splitlines()[-1]) == (0, "worker 0: ready")
    # The versions of constraints.txt, with what a TPU needs.
    for line in (host.home / "installed").read_text().splitlines():
        assert line.endswith("-c constraints.txt -e .[tpu]")
    assert (host.state / "uv" / "bin" / "uv").exists()


def test_newer_requirements_want_setup_again_and_newer_code_does_not(host: Host):
    host.ready()
    host.cloud.trainer("exit 0")
    host.pack("README.md")
    host.do("unpack")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0
    host.ended()
    (host.home / "sync_jax" / "constraints.txt").write_text("numpy==1\n")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 1


def test_push_removes_what_was_pushed_and_nothing_else(host: Host):
    host.pack("README.md", "sync_jax/main.py")
    host.do("unpack")
    run = host.home / "sync_jax" / "runs" / "a" / "report.json"
    run.parent.mkdir(parents=True)
    run.write_text("{}")
    host.pack("README.md")
    host.do("unpack")
    assert run.exists()
    assert (host.home / "sync_jax" / "README.md").exists()
    assert not (host.home / "sync_jax" / "sync_jax" / "main.py").exists()


def test_an_archive_that_was_cut_off_changes_nothing(host: Host):
    host.ready()
    code = host.home / "sync_jax" / "launch" / "host.sh"
    code.write_text("old")
    host.pack("README.md")
    archive = host.home / "sync_jax.tar.gz"
    whole = archive.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        archive.write_bytes(whole[:size])
        status, output = host.do("unpack")
        assert (status, "sync_jax.tar.gz is not whole: push it again" in output) == (1, True)
        assert code.read_text() == "old"
        assert not (host.home / "sync_jax" / "README.md").exists()
    archive.write_bytes(whole)
    assert host.do("unpack") == (0, "")
    assert code.read_text() == (REPOSITORY / "launch" / "host.sh").read_text()


def test_what_another_pushes_meanwhile_is_not_mixed_in(host: Host):
    host.ready().pack("README.md")
    host.cloud.script(
        "host-bin/tar",
        '/usr/bin/tar "$@" || exit\n'
        "case $* in *-tzf*) touch listed; until [ -e go ]; do sleep 0.02; done ;; esac",
    )
    child = host.start("unpack")
    host.cloud.wait((host.home / "listed").exists)
    host.pack("Makefile")  # as if it were another checkout's
    status, output = host.do("unpack")
    assert (status, "a run, or its setup, is going on here" in output) == (1, True)
    (host.home / "go").touch()
    child.communicate(timeout=1000)
    assert child.returncode == 0
    code = host.home / "sync_jax"
    assert [(code / name).exists() for name in ("README.md", "Makefile")] == [True, False]
    assert host.do("unpack") == (0, "")
    assert [(code / name).exists() for name in ("README.md", "Makefile")] == [False, True]


def test_code_of_two_versions_is_not_run(host: Host):
    """Unpacking was cut off, by a full disk or a power cut."""
    host.ready().pack("README.md")
    host.cloud.script("host-bin/tar", 'case $1 in -x*) exit 2 ;; esac\nexec /usr/bin/tar "$@"')
    assert host.do("unpack")[0] == 2
    for words in (["setup", "tpu"], ["run", "--", "--workdir=runs/a"]):
        status, output = host.do(*words)
        assert (status, "a part of what was pushed: push it again" in output) == (1, True), output
    (host.cloud.root / "host-bin" / "tar").unlink()
    assert host.do("unpack") == (0, "")
    assert host.do("setup", "tpu")[0] == 0


def test_host_sh_is_there_while_the_code_around_it_is_replaced(host: Host):
    """Whoever asks how a run stands calls it."""
    host.ready().pack("README.md")
    script = host.home / "sync_jax" / "launch" / "host.sh"
    script.write_text("old")
    seen = host.home / "seen"
    host.cloud.script(
        "host-bin/tar",
        f'/usr/bin/tar "$@" || exit\n'
        f'case $1 in -x*) cat {script}; stat -c " %i" {script} ;; esac >>{seen}',
    )
    before = script.stat().st_ino
    assert host.do("unpack") == (0, "")
    assert (host.home / "sync_jax" / "README.md").exists()
    assert seen.read_text() == f"old {before}\n" * 2
    assert script.read_text() == (REPOSITORY / "launch" / "host.sh").read_text()
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize(
    ("earlier", "look"),
    [("none", 1), ("runs/a", 1), ("runs/a", 2), ("runs/b", 1), ("runs/b", 2)],
)
def test_a_run_that_starts_while_status_looks_is_that_run(earlier, look, host: Host):
    """Not lost, nor another's: what was noted of an earlier one does not count."""
    host.ready().cloud.trainer("exit 0")
    if earlier != "none":
        assert host.do("run", "--", f"--workdir={earlier}")[0] == 0
        host.ended()
        assert host.do("stop", "120")[0] == 0  # waits until no process of it is left
    host.cloud.trainer(PATIENT)
    looks = host.home / "looks"
    # Processes are looked for by grep; what the start itself looks for does not count.
    host.cloud.script(
        "host-bin/grep",
        f"""if [ -n "$COUNTED" ]; then
  echo >>{looks}
  if [ $(wc -l <{looks}) = {look} ]; then
    env -u COUNTED bash {REPOSITORY}/launch/host.sh run -- --workdir=runs/a >/dev/null
  fi
fi
exec /usr/bin/grep "$@" """,
    )
    host.environment["COUNTED"] = "1"
    assert host.do("status", "runs/a") == (0, "worker=0 state=running exit=- step=0\n")
    assert len(looks.read_text()) > look


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


def test_the_mount_outlives_a_setup_that_is_ended(host: Host):
    """stop knows by its environment what a setup has started; gcsfuse has another."""
    host.cloud.script("host-bin/gcsfuse", GCSFUSE)
    host.pack()
    host.do("unpack")
    (host.cloud.root / "pip-hangs").touch()
    child = host.start("setup", "tpu", f"bucket:{host.cloud.bucket}")
    host.cloud.wait(lambda: bool((host.cloud.root / "pip-hangs").read_text()))
    assert host.do("stop", "120")[0] == 0
    child.communicate(timeout=1000)
    assert lives(int((host.home / "gcsfuse").read_text()))


def test_how_a_run_ended_is_told_of_its_workdir_only(host: Host):
    host.ready().cloud.trainer("exit 0")
    assert host.do("run", "--", "--workdir=runs/a")[0] == 0
    host.ended()
    host.cloud.wait(lambda: "exited" in host.do("status")[1])
    assert host.do("status", "runs/a")[1] == "worker=0 state=exited exit=0 step=0\n"
    assert host.do("status", "runs/b")[1] == "worker=0 state=ready exit=- step=0\n"
    assert host.do("stop", "120")[0] == 0  # until no process of it is left
    (host.state / "exit").unlink()
    assert host.do("status", "runs/a")[1] == "worker=0 state=lost exit=- step=0\n"
    assert host.do("status", "runs/b")[1] == "worker=0 state=ready exit=- step=0\n"


def test_the_steps_of_a_sweep_are_those_of_its_runs(host: Host):
    host.ready()
    sweep = host.home / "sync_jax" / "runs" / "my sweep"
    for name in ("a-0/checkpoints/5", "a-0/checkpoints/20", "a-1/checkpoints/3", "compare"):
        (sweep / name).mkdir(parents=True)
    (sweep / "a-1" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir()
    assert host.do("status", "runs/my sweep")[1] == "worker=0 state=ready exit=- step=23\n"


NETWORK = '''if [ "$1 $2 $3" = "-f -c %T" ] && [ -e "$4" ]; then
  case $4 in
    */nfs*) echo nfs; exit ;;
    */unknown*) echo "UNKNOWN (0x1)"; exit ;;
    */disk) echo xfs; exit ;;
  esac
fi
exec /usr/bin/stat "$@"'''


def test_a_workdir_that_would_go_with_the_machine_is_refused(host: Host):
    host.cloud.script("host-bin/stat", NETWORK)
    host.ready().cloud.trainer("exit 0")
    for name in ("nfs", "unknown", "disk"):
        (host.home / name).mkdir()
    local = f"{host.home}/disk/runs/a"
    status, output = host.do("run", "lasting", "--", f"--workdir={local}")
    assert status == 2
    message = f"worker 0: --workdir={local} lies on this host's own disk (xfs), which no other host"
    assert output.startswith(message)
    assert host.do("status", local)[1] == "worker=0 state=exited exit=2 step=0\n"
    assert message[10:] in (host.state / "log").read_text()
    assert not (host.state / "run").exists()
    for words in (
        ["run", "--", f"--workdir={local}"],
        ["run", "lasting", "--", f"--workdir={host.home}/nfs/runs/a"],
        ["run", "lasting", "--", f"--workdir={host.home}/unknown"],
    ):
        status, output = host.do(*words)
        assert status == 0, output
        host.ended()
        assert host.do("stop", "120")[0] == 0


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


def test_a_bucket_that_cannot_be_mounted_or_written_is_one_line(host: Host):
    host.pack()
    host.do("unpack")
    status, output = host.do("setup", "tpu", f"nowhere:{host.cloud.mounts}/nowhere")
    assert status == 1
    assert "gs://nowhere cannot be mounted: does it exist, and may" in output
    host.cloud.script("host-bin/mktemp", "echo \"mktemp: '$1': Permission denied\" >&2; exit 1")
    status, output = host.do("setup", "tpu", f"bucket:{host.cloud.bucket}")
    assert status == 1
    assert "gs://bucket cannot be written (Permission denied): give this machine's" in output
    assert not (host.state / "ready").exists()


def test_unprepared_data_in_a_bucket_is_refused(host: Host):
    """All hosts would prepare it at once, into one folder."""
    host.ready().cloud.trainer("exit 0")
    mount, data = f"bucket:{host.cloud.bucket}", host.cloud.bucket / "data"
    words = ["run", mount, "--", "--workdir=x", f"--config.data.data_dir={data}"]
    status, output = host.do(*words)
    assert status == 2  # which no second try mends, other than what follows
    assert f"{data} is empty: prepare the data once and copy it there" in output
    assert not (host.state / "run").exists()
    assert host.do("status", "x")[1] == "worker=0 state=exited exit=2 step=0\n"
    host.cloud.script("host-bin/ls", "echo 'ls: Input/output error' >&2; exit 2")
    status, output = host.do(*words)
    assert (status, "cannot be listed: ls: Input/output error" in output) == (1, True)
    (host.cloud.root / "host-bin" / "ls").unlink()
    (data / "fashion_mnist").mkdir(parents=True)
    assert host.do(*words)[0] == 0
    host.ended()
    # Another bucket whose name only begins alike is not this one's to check.
    words[-1] = f"--config.data.data_dir={host.cloud.bucket}-data/a"
    assert host.do(*words)[0] == 0


def test_a_dead_mount_is_called_that_and_mounted_anew(host: Host):
    """As the kernel leaves it when gcsfuse has ended: there, and no file in it."""
    host.ready().cloud.trainer("exit 0")
    mount, workdir = f"bucket:{host.cloud.bucket}", f"{host.cloud.bucket}/run"
    words = ["run", mount, "--", f"--workdir={workdir}"]
    assert host.do(*words)[0] == 0
    host.ended()
    dead_mounts(host.cloud)
    (host.home / "dead").touch()
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=0 step=0 mount=dead\n"
    assert host.do("status", "runs/a")[1] == "worker=0 state=ready exit=- step=0\n"
    status, output = host.do(*words)
    assert status == 0, output
    assert "the mount of gs://bucket is dead, for its gcsfuse has ended: mounting it anew" in output
    assert (host.home / "mounted").read_text() == f"{host.cloud.bucket}\n"
    host.ended()
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=0 step=0\n"
    (host.home / "dead").touch()
    for name in ("fusermount", "umount"):
        host.cloud.script(f"host-bin/{name}", "exit 1")
    status, output = host.do(*words)
    assert status == 1
    assert output.splitlines()[-1] == (
        f"worker 0: the dead mount at {host.cloud.bucket} cannot be removed: "
        f"umount -l {host.cloud.bucket}"
    )


def test_a_mount_that_hangs_holds_up_nothing(host: Host):
    """Neither a look, nor a start, nor the note of how a run ended."""
    host.environment["SYNC_JAX_HOST_LIMIT"] = "5"
    host.ready().cloud.trainer(
        'echo begun; until [ -e "$HOME/hangs" ]; do sleep 0.02; done; exit 9'
    )
    hanging_mounts(host.cloud)
    mount, workdir = f"bucket:{host.cloud.bucket}", f"{host.cloud.bucket}/run"
    (host.cloud.bucket / "run" / "checkpoints" / "7").mkdir(parents=True)
    words = ["run", mount, "--", f"--workdir={workdir}"]
    assert host.do(*words)[0] == 0
    assert host.do("status", workdir)[1] == "worker=0 state=running exit=- step=7\n"
    (host.home / "hangs").touch()
    assert host.ended() == 9
    assert host.do("status", workdir)[1] == "worker=0 state=exited exit=9 step=0 mount=hangs\n"
    status, output = host.do(*words)
    assert status == 1
    assert f"gs://bucket, mounted at {host.cloud.bucket}, does not answer within 5 s" in output


GCSFUSE = """
while [ $# -gt 2 ]; do shift; done
echo "$2" >>"$HOME/mounted"
unmount() { # what is in use stays; what is not is no longer there
  found=$(find /proc/[0-9]*/fd -lname "$2*" 2>/dev/null)
  if [ -z "$found" ]; then mv "$2" "$2-gone"; exit; fi
  touch "$HOME/in-use"
}
(trap 'unmount "$@"' TERM; while :; do sleep 0.02; done) >/dev/null 2>&1 &
echo $! >"$HOME/gcsfuse"
"""


def test_the_bucket_stays_until_the_run_has_saved(host: Host):
    """A shutdown's TERM reaches gcsfuse too, which then unmounts what nobody uses."""
    bucket = host.cloud.bucket
    host.cloud.script("host-bin/gcsfuse", GCSFUSE)
    host.ready().cloud.trainer(
        "ended() { until [ -e $HOME/in-use ]; do sleep 0.02; done; save 7; exit 75; }\n"
        "trap ended TERM\necho begun\nwhile :; do sleep 0.02; done"
    )
    status, output = host.do("run", f"bucket:{bucket}", "--", f"--workdir={bucket}/run")
    assert status == 0, output
    host.cloud.wait(lambda: "begun" in (host.state / "log").read_text())
    gcsfuse = int((host.home / "gcsfuse").read_text())
    os.kill(gcsfuse, signal.SIGTERM)
    parent = host.signal(signal.SIGTERM)
    assert host.ended() == 75
    assert (bucket / "run" / "checkpoints" / "7").is_dir()
    (log,) = (bucket / "run" / "logs").iterdir()
    assert re.fullmatch(r"worker-0-\d{8}T\d{6}Z\.log", log.name)
    assert "ended with exit status 75" in log.read_text()
    gone = bucket.with_name("bucket-gone")
    assert not gone.exists()
    host.cloud.wait(lambda: not Path(f"/proc/{parent}").exists())
    os.kill(gcsfuse, signal.SIGTERM)  # now it may
    host.cloud.wait((gone / "run").exists)


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


def test_a_secret_goes_when_the_run_has_it(host: Host):
    host.ready().cloud.trainer('echo "${#SECRET} characters"')
    file = host.home / "sync_jax.env"
    file.write_text("SECRET= a 'b' $c \n")
    for _ in range(2):
        assert host.do("run", "--", "--workdir=runs/a")[0] == 0
        host.ended()
    assert not file.exists()
    assert not (host.state / "env").exists()
    log = (host.state / "log").read_text()
    assert [line for line in log.splitlines() if "=" not in line] == [
        "10 characters",
        "0 characters",
    ]
    # And where no run comes of it.
    (host.state / "ready").unlink()
    for words in (["run", "--", "--workdir=runs/a"], ["stop", "1"]):
        file.write_text("SECRET=a\n")
        assert host.do(*words)[0] == (words[0] == "run")
        assert not file.exists()


def test_the_help_lists_every_verb(host: Host):
    status, output = host.do("help")
    assert status == 2
    for verb in ("unpack", "setup", "run", "status", "logs", "stop", "unlock"):
        assert f"\n  {verb}" in output
