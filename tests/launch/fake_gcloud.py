"""What answers to gcloud, ssh and scp in the tests: a cloud in a folder, its hosts processes here.

The folder holds cloud.json (see `Cloud` in cloud.py), calls.jsonl with every command line, and
hosts/<machine>/<worker>/, the home folder of each host. A process belongs to the host that its
environment names, and dies with it as it would there: TERM, some grace, KILL.
"""

# It is started some twenty times in every test: what only some calls need is imported there.
import fcntl
import json
import os
import sys

ROOT = os.environ.get("FAKE_ROOT", "")
GRACE = 20.0
JAX = ("JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")  # what shortens compilation, see conftest.py


class cloud:  # noqa: N801
    """A context: the state, which nobody else changes meanwhile."""

    def __enter__(self) -> dict:
        self.file = open(f"{ROOT}/cloud.json", "r+")
        fcntl.flock(self.file, fcntl.LOCK_EX)
        self.state = json.load(self.file)
        return self.state

    def __exit__(self, *error: object) -> None:
        self.file.seek(0)
        self.file.truncate()
        json.dump(self.state, self.file)
        self.file.close()


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


def kill(folder: str) -> None:
    import contextlib
    import signal
    import time

    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + GRACE
        while processes(folder) and time.monotonic() < deadline:
            time.sleep(0.02)


def start_node(state: dict, name: str) -> None:
    state["serial"] += 1
    folder = f"{ROOT}/hosts/{name}-{state['serial']}"
    for worker in range(state["workers"]):
        os.makedirs(f"{folder}/{worker}")
    state["nodes"][name] = {"state": "READY", "folder": folder}


def end_node(state: dict, name: str) -> None:
    import shutil

    folder = state["nodes"][name]["folder"]
    kill(folder)
    shutil.rmtree(folder)


def happen(state: dict) -> None:
    """Preempts what is to be preempted, once its run has saved the step that the test names."""
    if not state["preempt_at"]:
        return
    from pathlib import Path

    steps = [int(p.name) for p in Path(ROOT).glob("mnt/*/**/checkpoints/*") if p.name.isdigit()]
    if max(steps, default=0) < state["preempt_at"][0]:
        return
    state["preempt_at"].pop(0)
    for name, node in state["nodes"].items():
        if node["state"] == "READY":
            end_node(state, name)
            node["state"] = "PREEMPTED"
            if name in state["requests"]:
                state["requests"][name] = ["SUSPENDED"]


def fails(state: dict, what: str) -> bool:
    """Whether the test wants the next of these commands to fail."""
    state["fail"][what] = state["fail"].get(what, 0) - 1
    return state["fail"][what] >= 0


def environment(
    laptop: os._Environ[str] | dict[str, str], home: str, worker: int
) -> dict[str, str]:
    """Of a command on a host."""
    kept = (*JAX, "FAKE_ROOT", "SYNC_JAX_DEVICES", "SYNC_JAX_LIBTPU_LOCK")
    return {name: laptop[name] for name in kept if name in laptop} | {
        "PATH": f"{laptop['FAKE_ROOT']}/host-bin:/usr/bin:/bin",
        "HOME": home,
        "FAKE_HOST": home,
        "FAKE_HOSTNAME": f"t1v-n-0123abcd-w-{worker}",
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "SYNC_JAX_HOST_POLL": "0.05",
    }


def run_on(homes: list[tuple[int, str]], command: str) -> int:
    """Runs a command on each host, as gcloud does: on all, and the first bad status counts."""
    import subprocess

    children = [
        subprocess.Popen(
            ["bash", "-c", command],
            cwd=home,
            env=environment(os.environ, home, worker),
            umask=0o022,
        )
        for worker, home in homes
    ]
    return next((status for child in children if (status := child.wait())), 0)


def stop(message: str, status: int = 1) -> None:
    print(f"ERROR: (gcloud) {message}", file=sys.stderr)
    sys.exit(status)


def gcloud(arguments: list[str]) -> None:
    options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
    words = [a for a in arguments if not a.startswith("--")]
    if words[:2] == ["auth", "list"]:
        with cloud() as state:
            print(state["account"], end="")
        return
    assert words[:2] == ["compute", "tpus"], words
    assert (options["project"], options["zone"]) == ("my-project", "us-west4-a")
    group, verb, *rest = words[2:]
    if verb in ("ssh", "scp"):
        remote(verb, rest, options)
        return
    with cloud() as state:
        if fails(state, verb):
            stop("UNAVAILABLE: the service is not there")
        if verb == "list":
            happen(state)
            listed(state, group)
        elif verb == "create":
            name = rest[0]
            if name in state["nodes"] or name in state["requests"]:
                stop(f"ALREADY_EXISTS: {name}")
            if group == "tpu-vm":
                start_node(state, name)
            else:
                assert options["node-id"] == name
                state["requests"][name] = state["lives"].pop(0) if state["lives"] else ["ACTIVE"]
        elif verb == "delete":
            name = rest[0]
            assert "quiet" in options, "it would ask"
            if group == "queued-resources":
                assert "force" in options, "it has a node"
                del state["requests"][name]
            elif name in state["requests"]:
                stop("FAILED_PRECONDITION: delete the queued resource")
            if state["nodes"].get(name, {}).get("state") == "READY":
                end_node(state, name)
            state["nodes"].pop(name, None)


def listed(state: dict, group: str) -> None:
    if group == "tpu-vm":
        for name, node in state["nodes"].items():
            print(name, node["state"], state["workers"], sep="\t")
        return
    for name, states in state["requests"].items():
        if states[0] == "ACTIVE" and name not in state["nodes"]:
            start_node(state, name)
        print(name, states[0], sep="\t")
        if len(states) > 1:
            states.pop(0)


def remote(verb: str, rest: list[str], options: dict[str, str]) -> None:
    with cloud() as state:
        if fails(state, verb):
            stop("ssh: connect to host 192.0.2.1 port 22: Connection timed out", 255)
        name = rest[-1].removesuffix(":")
        node = state["nodes"].get(name, {"state": ""})
        if node["state"] != "READY":
            stop(f"{name} is not READY")
        chosen = options["worker"]
        workers = range(state["workers"]) if chosen == "all" else [int(chosen)]
        homes = [(i, f"{node['folder']}/{i}") for i in workers]
    if verb == "scp":
        import shutil

        for _, home in homes:
            shutil.copy(rest[0], home)
        return
    sys.exit(run_on(homes, options["command"]))


def ssh(program: str, arguments: list[str]) -> None:
    """The GPU server: one host, whose home is hosts/server."""
    with cloud() as state:
        if fails(state, "ssh"):
            stop("ssh: connect to host 192.0.2.1 port 22: Connection timed out", 255)
    home = f"{ROOT}/hosts/server"
    os.makedirs(home, exist_ok=True)
    if program == "scp":
        import shutil

        assert arguments[-1] == "me@server:", arguments
        shutil.copy(arguments[-2], home)
        return
    assert arguments[-2] == "me@server", arguments
    sys.exit(run_on([(0, home)], arguments[-1]))


if __name__ == "__main__":
    _, program, *words = sys.argv
    with open(f"{ROOT}/calls.jsonl", "a") as log:
        log.write(json.dumps([program, *words]) + "\n")
    if program == "preempt":  # what no command does, now
        with cloud() as state:
            state["preempt_at"] = [0]
            happen(state)
    elif program == "gcloud":
        gcloud(words)
    else:
        ssh(program, words)
