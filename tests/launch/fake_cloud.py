"""What answers to gcloud, ssh and scp in the tests: a cloud in a folder, its hosts processes.

The programs on the laptop's PATH hand their arguments to a thread here, by a connection, and run
the shell commands that it answers with: they are called some twenty times in every test, and to
start Python each time would be most of what the tests cost. Below hosts/<machine>/<worker>/ lies
the home folder of each host. A process belongs to the host that its environment names, and dies
with it as it would there: TERM, some grace, KILL.
"""

import contextlib
import datetime
import os
import re
import shlex
import shutil
import signal
import socketserver
import threading
import time
from pathlib import Path
from typing import Any

JAX = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")  # what shortens compilation, see conftest.py
QUEUED = ("ACCEPTED", "WAITING_FOR_RESOURCES")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

# The connection carries the number of words, and each with a NUL after it.
CLIENT = """#!/bin/bash
exec 3<>/dev/tcp/127.0.0.1/{port}
printf '%s\\0' $(($# + 2)) {program} "$PWD" "$@" >&3
IFS= read -r -d '' answer <&3
exec 3>&-
eval "$answer"
"""


class RefusedError(Exception):
    """A call that fails: its message, and its exit status."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


class HangsError(Exception):
    """A call that is not answered."""


class FakeCloud:
    """Google's cloud, and a GPU server.

    Attributes:
        account: who is logged in, if anybody.
        workers: of each machine.
        requests: the states from now on of each queued resource; each look takes the next, and
            the last stays. After a tab may come the reason of a failure. HIDDEN: it is there, and
            not in the lists yet.
        nodes: of each machine, likewise.
        lives, node_lives: such lists, for the requests and machines to come.
        suspension: the states of a request whose machine was taken away.
        grace: seconds between TERM and KILL.
        preempt_at: steps; once the first is saved, the machine is taken away.
        fail: how many times each verb fails; "start": the ssh that starts a run.
        hang: how many times each verb does not answer.
        cut: bytes of the next files that scp copies, which does not notice.
        calls: every command line.
    """

    def __init__(self, root: Path, *, workers: int):
        self.root = root
        self.environment: dict[str, str] = {}
        self.account = "me@example.org"
        self.workers = workers
        self.requests: dict[str, list[str]] = {}
        self.nodes: dict[str, list[str]] = {}
        self.lives: list[list[str]] = []
        self.node_lives: list[list[str]] = []
        self.suspension = ["SUSPENDED"]
        self.grace = 20.0
        self.preempt_at: list[int] = []
        self.fail: dict[str, int] = {}
        self.hang: dict[str, int] = {}
        self.cut: list[int] = []
        self.calls: list[list[str]] = []
        self._deadlines: dict[str, float] = {}
        self._made: dict[str, tuple[str, str, str]] = {}  # type, whether spot, when
        self._folders: dict[str, Path] = {}
        self._serial = 0
        self._lock = threading.Lock()
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def client(self, program: str) -> str:
        """The script that is the program."""
        return CLIENT.format(port=self._server.server_address[1], program=program)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def preempt(self) -> None:
        """Takes every machine away: what no command does."""
        with self._lock:
            self._take_away()

    def _handler(self) -> type[socketserver.StreamRequestHandler]:
        fake = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                words: list[str] = []
                data = b""
                while not words or len(words) <= int(words[0]):
                    received = self.request.recv(1 << 16)
                    if not received:  # who asked was killed
                        return
                    data += received
                    words = data.decode().split("\0")[:-1]
                with fake._lock:
                    try:
                        answer = fake._answer(words[1], Path(words[2]), words[3:])
                    except RefusedError as error:
                        message = shlex.quote(f"ERROR: (gcloud) {error}")
                        answer = f"echo {message} >&2; exit {error.status}"
                    except HangsError:
                        answer = 'touch "$FAKE_ROOT/hangs"; trap "" TERM; while :; do sleep 9; done'
                    except Exception as error:  # a test that looks finds it
                        answer = f"echo {shlex.quote(f'the fake broke: {error!r}')} >&2; exit 99"
                with contextlib.suppress(OSError):
                    self.wfile.write(answer.encode())

        return Handler

    def _answer(self, program: str, folder: Path, arguments: list[str]) -> str:
        self.calls.append([program, *arguments])
        if program == "gcloud":
            return self._gcloud(folder, arguments)
        self._may_fail("ssh", "ssh: connect to host 192.0.2.1 port 22: Connection timed out", 255)
        home = self.root / "hosts" / "server"
        home.mkdir(parents=True, exist_ok=True)
        if program == "scp":
            assert arguments[-1] == "me@server:", arguments
            self._copy(folder / arguments[-2], home)
            return "exit 0"
        assert arguments[-2] == "me@server", arguments
        return self._on([(0, home)], arguments[-1])

    def _gcloud(self, folder: Path, arguments: list[str]) -> str:
        options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
        words = [a for a in arguments if not a.startswith("--")]
        if words[:2] == ["auth", "list"]:
            return f"echo {self.account}"
        assert words[:2] == ["compute", "tpus"], words
        assert (options["project"], options["zone"]) == ("my-project", "us-west4-a")
        group, verb, *rest = words[2:]
        if verb in ("ssh", "scp"):
            return self._remote(verb, folder, rest, options)
        self._may_fail(verb, "UNAVAILABLE: the service is not there")
        if verb == "list":
            self._happen()
            return f"printf %s {shlex.quote(self._listed(group))}"
        (name,) = rest
        if verb == "create":
            if name in self.nodes or name in self.requests:
                raise RefusedError(f"ALREADY_EXISTS: {name}")
            made = datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")
            self._made[name] = (options["accelerator-type"], "True" * ("spot" in options), made)
            if group == "tpu-vm":
                self._start(name)
            else:
                assert options["node-id"] == name
                self.requests[name] = self.lives.pop(0) if self.lives else ["ACTIVE"]
                wait = re.findall(r"(\d+)([smhd])", options.get("valid-until-duration", ""))
                seconds = sum(int(number) * UNITS[unit] for number, unit in wait)
                self._deadlines[name] = time.time() + seconds if wait else float("inf")
        else:
            assert verb == "delete"
            assert "quiet" in options, "it would ask"
            if group == "queued-resources":
                assert "force" in options, "it has a node"
                del self.requests[name]
            elif name in self.requests:
                raise RefusedError("FAILED_PRECONDITION: delete the queued resource")
            self._end(name)
            self.nodes.pop(name, None)
        return "exit 0"

    def _listed(self, group: str) -> str:
        lines = []
        of = self.nodes if group == "tpu-vm" else self.requests
        for name, states in list(of.items()):
            if of is self.requests:
                if states[0] == "ACTIVE" and name not in self._folders:
                    self._start(name)
                if states[0] in QUEUED and time.time() > self._deadlines[name]:
                    states[:] = ["FAILED\tthe valid-until constraint expired"]
            state, _, reason = states[0].partition("\t")
            type_, spot, made = self._made[name]
            if state != "HIDDEN":
                fields = [name, state, made, type_, reason]
                if of is self.nodes:
                    fields = [name, state, str(self.workers), type_, spot]
                lines.append("\t".join(fields) + "\n")
            if len(states) > 1:
                states.pop(0)
            if states[0] == "GONE":  # deleted by somebody else
                del of[name]
                if of is self.requests:
                    self._end(name)
                    del self.nodes[name]
        return "".join(lines)

    def _remote(self, verb: str, folder: Path, rest: list[str], options: dict[str, str]) -> str:
        self._may_fail(verb, "ssh: connect to host 192.0.2.1 port 22: Connection timed out", 255)
        name = rest[-1].removesuffix(":")
        if self.nodes.get(name, [""])[0] != "READY":
            raise RefusedError(f"{name} is not READY")
        assert options["worker"] == "all", "a slice that is told one by one hangs"
        homes = [(i, self._folders[name] / str(i)) for i in range(self.workers)]
        if verb == "ssh":
            if "host.sh run " in options["command"]:
                self._may_fail("start", "Connection reset by 192.0.2.1 port 22", 255)
            return self._on(homes, options["command"])
        for _, home in homes:
            self._copy(folder / rest[0], home)
        return "exit 0"

    def _on(self, homes: list[tuple[int, Path]], command: str) -> str:
        """Runs a command on each host, as gcloud does: on all, and the first bad status counts."""
        lines = ["umask 022; status=0; children=()"]
        for worker, home in homes:
            variables = host_environment(self.environment, str(home), worker)
            words = ["env", "-i", *(f"{k}={v}" for k, v in variables.items()), "bash", "-c"]
            lines.append(f"(cd {shlex.quote(str(home))} && exec {shlex.join([*words, command])}) &")
            lines.append("children+=($!)")
        lines.append('for child in "${children[@]}"; do wait $child || status=$?; done')
        return "\n".join([*lines, "exit $status"])

    def _copy(self, file: Path, home: Path) -> None:
        copied = Path(shutil.copy(file, home))
        if self.cut:
            os.truncate(copied, self.cut.pop(0))

    def _may_fail(self, what: str, message: str, status: int = 1) -> None:
        self.hang[what] = self.hang.get(what, 0) - 1
        if self.hang[what] >= 0:
            raise HangsError
        self.fail[what] = self.fail.get(what, 0) - 1
        if self.fail[what] >= 0:
            raise RefusedError(message, status)

    def _start(self, name: str) -> None:
        self._serial += 1
        self._folders[name] = self.root / "hosts" / f"{name}-{self._serial}"
        for worker in range(self.workers):
            (self._folders[name] / str(worker)).mkdir(parents=True)
        self.nodes[name] = self.node_lives.pop(0) if self.node_lives else ["READY"]

    def _end(self, name: str) -> None:
        if (folder := self._folders.pop(name, None)) is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes(str(folder)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + self.grace
            while processes(str(folder)) and time.monotonic() < deadline:
                time.sleep(0.02)
        shutil.rmtree(folder)

    def _happen(self) -> None:
        """Preempts what is to be preempted, once its run has saved the step that the test names."""
        if not self.preempt_at:
            return
        found = (p.name for p in self.root.glob("mnt/*/**/checkpoints/*"))
        if max((int(name) for name in found if name.isdigit()), default=0) < self.preempt_at[0]:
            return
        self.preempt_at.pop(0)
        self._take_away()

    def _take_away(self) -> None:
        for name in self._folders.copy():
            self._end(name)
            self.nodes[name] = ["PREEMPTED"]
            if name in self.requests:
                self.requests[name] = list(self.suspension)


def processes(folder: str) -> list[int]:
    """Of a host, or of all below a folder of hosts."""
    found = []
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                variables = file.read().split(b"\0")
        except OSError:
            continue
        if any(f"{v.decode()}/".startswith(f"FAKE_HOST={folder}/") for v in variables):
            found.append(int(pid))
    return found


def host_environment(laptop: dict[str, str], home: str, worker: int) -> dict[str, Any]:
    """Of a command on a host."""
    kept = (*JAX, "FAKE_ROOT", "SYNC_JAX_DEVICES", "SYNC_JAX_LIBTPU_LOCK", "SYNC_JAX_HOST_LIMIT")
    return {name: laptop[name] for name in kept if name in laptop} | {
        "PATH": f"{laptop['FAKE_ROOT']}/host-bin:/usr/bin:/bin",
        "HOME": home,
        "FAKE_HOST": home,
        "FAKE_WORKER": str(worker),
        "HOSTNAME": f"t1v-n-0123abcd-w-{worker}",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SYNC_JAX_HOST_POLL": "0.05",
        # For there are several hosts on this machine.
        "SYNC_JAX_LOCK": f"{laptop['FAKE_ROOT']}/{'-'.join(Path(home).parts[-2:])}.lock",
    }
