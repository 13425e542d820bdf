"""A cloud in a folder, to launch into: see fake_gcloud.py for what it answers."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
TPU = "launch/tpu.sh"
WHERE = ["--name=sync", "--project=my-project", "--zone=us-west4-a"]
CONFIG = "--config=configs/quickstart.py"
WORKDIR = "--workdir=gs://bucket/run"

# What hosts have instead of the system's. python3 is 3.10 there, as in the images of TPUs: it can
# only install uv, which finds a newer one, which makes .venv, which runs a script or real Python.
HOST_BIN = {
    "sudo": '[ "$1" = -n ] && shift; exec "$@"',
    "mountpoint": 'grep -qx "$2" "$HOME/mounted" 2>/dev/null',
    "gcsfuse": (
        "while [ $# -gt 2 ]; do shift; done\n"
        '[ "$1" = bucket ] && [ "${2##*/}" = bucket ] && echo "$2" >>"$HOME/mounted"'
    ),
    "df": 'case $2 in "$FAKE_ROOT"/mnt/*) echo "$FAKE_ROOT/mnt" ;; *) echo / ;; esac',
    "python3": (
        'case "$*" in "-m pip install --quiet --target "*" --upgrade uv=="[0-9]*)\n'
        '  mkdir -p "$6/bin" && cp "$FAKE_ROOT/uv" "$6/bin/uv" ;; *) exit 1 ;; esac'
    ),
}
UV = 'case "$*" in "python find"*) echo "$FAKE_ROOT/python3.11" ;; esac'
PYTHON = """
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-c from ensurepip"* | "-c import pip" | "-c import sys; sys.exit("*) ;;
  -V) echo "Python 3.11.7" ;;
  "-c import sys; print("*) echo "3.11 /opt/uv" ;;
  "-m pip install"*) echo "$*" >>"$HOME/installed"; [ ! -f "$FAKE_ROOT/pip-fails" ] ;;
  "-u -m sync_jax.main"*)
    if [ -f "$FAKE_ROOT/trainer" ]; then shift 3; exec bash "$FAKE_ROOT/trainer" "$@"; fi
    exec REAL "$@" ;;
  "-m sync_jax.main "*" --mode=check") [ -f "$FAKE_ROOT/trainer" ] || exec REAL "$@" ;;
  *) exit 1 ;;
esac
"""


class Cloud:
    """A cloud in the folder `root`, with gs://bucket in `bucket`; `environment` is the laptop's."""

    def __init__(self, root: Path):
        self.root = root
        self.children: list[subprocess.Popen[str]] = []
        self.bucket = root / "mnt" / "bucket"
        self.bucket.mkdir(parents=True)
        fake = Path(__file__).with_name("fake_gcloud.py")
        self.script("bin/gcloud", f"exec '{sys.executable}' -S -E '{fake}' \"$@\"")
        for name, text in HOST_BIN.items():
            self.script(f"host-bin/{name}", text)
        self.script("uv", UV)
        self.script("bin/python3", "exit 0")  # takes every config: `check` is the trainer's
        self.script("python3.11", PYTHON.replace("REAL", f"'{sys.executable}'"))
        (root / "calls").touch()
        start = {"workers": 1, "states": ["ACTIVE"], "fails": {}, "modes": []}
        (root / "cloud.json").write_text(json.dumps({"requests": {}, "slices": [], **start}))
        kept = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")  # what shortens compilation: conftest.py
        self.environment = {
            "PATH": f"{root}/bin:/usr/bin:/bin",
            "HOME": str(root),
            "FAKE_ROOT": str(root),
            "SYNC_JAX_MOUNTS": str(root / "mnt"),
            "SYNC_JAX_POLL": "0.05",
            "PYTHON": str(root / "bin" / "python3"),
            **{name: os.environ[name] for name in kept if name in os.environ},
        }

    def script(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def trainer(self, text: str) -> None:
        """Puts a script in the place of sync_jax.main."""
        (self.root / "trainer").write_text(f"{text}\n")

    def set(self, **values: Any) -> None:
        """Before anything runs: workers, states of the requests to come, how often actions fail."""
        path = self.root / "cloud.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def get(self, name: str) -> Any:
        return json.loads((self.root / "cloud.json").read_text())[name]

    def calls(self, *words: str) -> list[list[str]]:
        """The command lines so far that have these words."""
        lines = [json.loads(line) for line in (self.root / "calls").read_text().splitlines()]
        return [line for line in lines if set(words) <= set(line)]

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        options: Any = {"cwd": REPOSITORY, "env": self.environment | environment, **pipes}
        child = subprocess.Popen(command, text=True, start_new_session=True, **options)
        self.children.append(child)
        return child

    def tpu(self, verb: str, *arguments: str, stdin: str = "", status: int = 0, **more: str) -> str:
        """Returns what launch/tpu.sh prints; it must end with this status."""
        child = self.start(TPU, verb, *WHERE, *arguments, **more)
        output, errors = child.communicate(stdin, timeout=600)
        assert child.returncode == status, output + errors
        return output + errors

    def ready(self, *options: str) -> None:
        """Creates a slice and sets it up."""
        self.tpu("create", "--type=v4-8", *options)
        self.tpu("setup", WORKDIR)

    def home(self, worker: int = 0) -> Path:
        return self.root / "hosts" / "sync" / str(worker)

    def notes(self, name: str, worker: int = 0) -> Path:
        return self.home(worker) / ".sync_jax" / name

    def log(self) -> str:
        return self.notes("log").read_text()

    def pid(self) -> int:
        return int(self.notes("pid").read_text())

    def wait(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.02)

    def close(self) -> None:
        """Nothing that a test started outlives it."""
        mark = f"FAKE_ROOT={self.root}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
        for child in self.children:
            child.communicate()
