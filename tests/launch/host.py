"""A host that is a folder, and what tpu.sh would say to its host.sh."""

import contextlib
import os
import subprocess
import tarfile
from pathlib import Path

from tests.launch.cloud import REPOSITORY, Cloud
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
