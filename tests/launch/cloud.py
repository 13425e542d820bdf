"""A cloud in a folder, to launch into: see fake_cloud.py for what is in it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.launch.fake_cloud import JAX, FakeCloud

REPOSITORY = Path(__file__).parents[2]
WHERE = ["--name=sync", "--project=my-project", "--zone=us-west4-a"]
MACHINE = [*WHERE, "--type=v5litepod-16", "--spot"]
CONFIG = "--config=configs/quickstart.py"
WORKDIR = "--workdir=gs://bucket/run"

# The host's python3 is 3.10, as in the TPU images: it can only install uv, which brings a newer
# one, which can only make .venv, which runs the tests' own interpreter.
HOST_BIN = {
    "sudo": '[ "$1" = -n ] && shift; exec "$@"',
    "mountpoint": 'grep -qx "$2" "$HOME/mounted" 2>/dev/null',
    "gcsfuse": (
        'while [ $# -gt 2 ]; do shift; done; [ -d "$2" ] && [ "${2##*/}" = bucket ] || exit 1\n'
        'echo "$2" >>"$HOME/mounted"'
    ),
    "python3": (
        'case "$*" in *sys.version_info*) exit 1 ;; "-m pip --version") ;;\n'
        '  "-m pip install --quiet --target "*" --upgrade uv=="[0-9]*)\n'
        '    mkdir -p "$6/bin" && cp "$FAKE_ROOT/uv" "$6/bin/uv" ;;\n'
        "  *) exit 1 ;; esac"
    ),
    **dict.fromkeys(("python3.11", "python3.12", "python3.13"), "exit 127"),
}
# Where a script stands for the trainer, the hosts need no more than this: packing and unpacking
# everything was most of what a push cost.
GIT = """
if [ -f "$FAKE_ROOT/trainer" ]; then
  set -- "$@" -- launch setup.cfg pyproject.toml constraints.txt
fi
exec /usr/bin/git "$@"
"""
# The limit of a call, in seconds, that is over as soon as one hangs: however slow the machine, none
# that is answered runs into it.
LIMIT = "301"
SLEEP = f"""
[ "$1" = {LIMIT} ] || exec /usr/bin/sleep "$@"
until [ -e "$FAKE_ROOT/hangs" ]; do /usr/bin/sleep 0.05; done
rm "$FAKE_ROOT/hangs"
"""
UV = 'case "$*" in *find*) echo "$FAKE_ROOT/python3.11-uv" ;; esac'
PYTHON = """
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c from ensurepip"* | "-c import pip" | "-c import sys; sys.exit("*) ;;
  -V) echo "Python 3.11.7" ;;
  "-c import sys; print("*) echo "3.11 /opt/uv" ;;
  "-m pip install"*)
    echo "$*" >>"$HOME/installed"
    if [ -f "$FAKE_ROOT/pip-hangs" ] && [ ! -s "$FAKE_ROOT/pip-hangs" ]; then
      echo $$ >"$FAKE_ROOT/pip-hangs"
      touch "$FAKE_ROOT/hangs"
      exec setsid sleep 300
    fi
    if [ -f "$FAKE_ROOT/pip-fails" ]; then rm "$FAKE_ROOT/pip-fails"; exit 1; fi ;;
  "-u -m sync_jax.main"*)
    if [ -f "$FAKE_ROOT/trainer" ]; then shift 3; exec bash "$FAKE_ROOT/trainer" "$@"; fi
    # What a slice's hosts learn from each other, where the test has a port for it.
    if [ -f "$FAKE_ROOT/port" ]; then
      set -- "$@" --coordinator="localhost:$(cat "$FAKE_ROOT/port")" --processes=2
      set -- "$@" --process="$FAKE_WORKER"
    fi
    exec REAL "$@" ;;
  *) exit 1 ;;
esac
"""

DELETE = f"launch/tpu.sh delete {' '.join(WHERE)}"


class Cloud:
    """What the tests arrange, and what they look at.

    Attributes:
        root: the cloud's folder.
        bucket: the contents of gs://bucket, the only one there is.
        environment: of the laptop.
    """

    def __init__(self, root: Path, *, workers: int = 1):
        self.root = root
        self.children: list[subprocess.Popen[str]] = []
        self.mounts = root / "mnt"
        self.bucket = self.mounts / "bucket"
        self.bucket.mkdir(parents=True)
        self.fake = FakeCloud(root, workers=workers)
        for name in ("gcloud", "ssh", "scp"):
            self.script(f"bin/{name}", self.fake.client(name))
        self.script("bin/git", GIT)
        self.script("bin/gzip", 'exec /usr/bin/gzip -1 "$@"')
        self.script("bin/sleep", SLEEP)
        for name, text in HOST_BIN.items():
            self.script(f"host-bin/{name}", text)
        self.script("uv", UV)
        self.script("python3.11-uv", PYTHON.replace("REAL", f"'{sys.executable}'"))
        self.environment = {
            "PATH": f"{root}/bin:/usr/bin:/bin",
            "HOME": str(root),
            "FAKE_ROOT": str(root),
            "SYNC_JAX_MOUNTS": str(self.mounts),
            "SYNC_JAX_POLL": "0.05",
            "SYNC_JAX_PATIENCE": "6",
            "SYNC_JAX_DEVICES": f"{root}/accel*",
            "SYNC_JAX_LIBTPU_LOCK": f"{root}/libtpu_lockfile",
            **{name: os.environ[name] for name in JAX if name in os.environ},
        }
        self.fake.environment = self.environment

    def script(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def set(self, **values: object) -> None:
        for name, value in values.items():
            assert hasattr(self.fake, name)
            setattr(self.fake, name, value)

    def trainer(self, text: str) -> None:
        """Puts a script in the place of sync_jax.main; $step saves a checkpoint of that step."""
        save = 'save() { for a; do :; done; mkdir -p "$workdir/checkpoints/$1"; }\n'
        find = "for a; do case $a in --workdir=*) workdir=${a#*=} ;; esac; done\n"
        (self.root / "trainer").write_text(f"{find}{save}{text}\n")

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=self.environment | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.children.append(child)
        return child

    def run(
        self, *command: str, stdin: str = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        child = self.start(*command, **environment)
        try:
            output, errors = child.communicate(stdin, timeout=1000)
        except subprocess.TimeoutExpired:
            self.kill_left()
            output, errors = child.communicate()
            raise AssertionError(f"{command} does not end:\n{output}\n{errors}") from None
        return subprocess.CompletedProcess(command, child.returncode, output, errors)

    def tpu(self, verb: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run("launch/tpu.sh", verb, *WHERE, *arguments, **more)

    def supervise(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        return self.run(
            *("launch/tpu.sh", "supervise", *MACHINE, WORKDIR, CONFIG, "--yes", *arguments), **more
        )

    def calls(self, *words: str) -> list[list[str]]:
        """The command lines so far that have these words."""
        return [call for call in list(self.fake.calls) if set(words) <= set(call)]

    def home(self, worker: int = 0) -> Path:
        (machine,) = (self.root / "hosts").iterdir()
        return machine / str(worker) if machine.name != "server" else machine

    def wait(self, condition: Callable[[], bool], seconds: float = 1000) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.02)

    def left(self) -> dict[int, str]:
        """The command lines of all processes of this cloud, its laptop and hosts."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (entry / "environ").read_bytes().split(b"\0")
                if f"FAKE_ROOT={self.root}".encode() in variables:
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found

    def kill_left(self) -> None:
        for pid in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        self.kill_left()
        for child in self.children:
            child.communicate()
        self.fake.close()


def dead_mounts(cloud: Cloud) -> None:
    """From now on a host whose home holds a file `dead` has a mount whose gcsfuse has ended."""
    for name in ("ls", "stat"):
        cloud.script(
            f"host-bin/{name}",
            f"""case $* in *"$FAKE_ROOT/mnt"*) if [ -f "$HOME/dead" ]; then
  echo "{name}: cannot access '$1': Transport endpoint is not connected" >&2; exit 2
fi ;; esac
exec /usr/bin/{name} "$@" """,
        )
    cloud.script(
        "host-bin/fusermount",
        'rm "$HOME/dead"; grep -vx "$2" "$HOME/mounted" >"$HOME/m"\nmv "$HOME/m" "$HOME/mounted"',
    )


def hanging_mounts(cloud: Cloud) -> None:
    """From now on a host whose home holds a file `hangs` has a mount that does not answer."""
    for name in ("cp", "ls", "mkdir", "mktemp", "mountpoint", "stat"):
        old = cloud.root / "host-bin" / name
        if old.exists():
            old.rename(old.with_suffix(".real"))
        real = old.with_suffix(".real") if old.with_suffix(".real").exists() else f"/usr/bin/{name}"
        cloud.script(
            f"host-bin/{name}",
            f"""case $* in *"$FAKE_ROOT/mnt"*) if [ -f "$HOME/hangs" ]; then
  touch "$HOME/looked"; trap '' TERM; while :; do sleep 9; done
fi ;; esac
exec {real} "$@" """,
        )


def last_line(result) -> str:
    return result.stdout.strip().splitlines()[-1].strip()


def patient(last: int) -> str:
    """Saves five steps further each time, and waits for SIGTERM: the real trainer's manners."""
    return f"""
trap 'exit 75' TERM
n=$(($(ls "$workdir/checkpoints" 2>/dev/null | wc -l) * 5 + 5))
save $n
if [ $n -ge {last} ]; then exit 0; fi
for i in $(seq 9999); do sleep 0.05; done
"""
