"""What answers to gcloud, ssh and scp in the tests: a cloud in a folder, its hosts processes here.

The folder holds cloud.json (see `Cloud` in cloud.py), calls.jsonl with every command line, and
hosts/<machine>/<worker>/, the home folder of each host. A process belongs to the host that its
environment names, and dies with it as it would there: TERM, some grace, KILL.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(os.environ["FAKE_ROOT"])
GRACE = 20.0


@contextlib.contextmanager
def cloud() -> Iterator[dict]:
    """The state, which nobody else changes meanwhile."""
    with (ROOT / "cloud.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = json.load(file)
        yield state
        file.seek(0)
        file.truncate()
        json.dump(state, file, indent=1)


def processes(host: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for variable in (entry / "environ").read_bytes().split(b"\0"):
                value = variable.partition(b"FAKE_HOST=")[2].decode()
                if value and (Path(value) == host or host in Path(value).parents):
                    found.append(int(entry.name))
    return found


def kill(host: Path) -> None:
    """Ends what runs on a host, or below a folder of hosts."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + GRACE
        while processes(host) and time.monotonic() < deadline:
            time.sleep(0.02)


def start_node(state: dict, name: str) -> None:
    state["serial"] += 1
    folder = ROOT / "hosts" / f"{name}-{state['serial']}"
    for worker in range(state["workers"]):
        (folder / str(worker)).mkdir(parents=True)
    state["nodes"][name] = {"state": "READY", "folder": str(folder)}


def end_node(state: dict, name: str) -> None:
    folder = Path(state["nodes"][name]["folder"])
    kill(folder)
    shutil.rmtree(folder)


def happen(state: dict) -> None:
    """Preempts what is to be preempted, once its run has saved the step that the test names."""
    if not state["preempt_at"]:
        return
    steps = [int(p.name) for p in ROOT.glob("mnt/*/**/checkpoints/*") if p.name.isdigit()]
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


def environment(home: str, worker: int) -> dict[str, str]:
    kept = ("JAX_COMPILATION_CACHE_DIR", "FAKE_ROOT", "SYNC_JAX_DEVICES", "SYNC_JAX_LIBTPU_LOCK")
    return {name: os.environ[name] for name in kept if name in os.environ} | {
        "PATH": f"{ROOT}/host-bin:/usr/bin:/bin",
        "HOME": home,
        "FAKE_HOST": home,
        "FAKE_HOSTNAME": f"t1v-n-0123abcd-w-{worker}",
        "JAX_PLATFORMS": "cpu",
        "SYNC_JAX_HOST_POLL": "0.05",
    }


def run_on(homes: list[tuple[int, str]], command: str) -> int:
    """Runs a command on each host, as gcloud does: on all, and the first bad status counts."""
    children = [
        subprocess.Popen(
            ["bash", "-c", command], cwd=home, env=environment(home, worker), umask=0o022
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
                states = ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
                state["requests"][name] = state["lives"].pop(0) if state["lives"] else states
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
        if len(states) > 1:
            states.pop(0)
        if states[0] == "ACTIVE" and name not in state["nodes"]:
            start_node(state, name)
        print(name, states[0], sep="\t")


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
        for _, home in homes:
            shutil.copy(rest[0], home)
        return
    sys.exit(run_on(homes, options["command"]))


def ssh(arguments: list[str]) -> None:
    """The GPU server: one host, whose home is hosts/server."""
    with cloud() as state:
        if fails(state, "ssh"):
            stop("ssh: connect to host 192.0.2.1 port 22: Connection timed out", 255)
    home = ROOT / "hosts" / "server"
    home.mkdir(parents=True, exist_ok=True)
    if Path(sys.argv[0]).name == "scp":
        shutil.copy(arguments[-2], home)
        return
    assert arguments[-2] == "me@server", arguments
    sys.exit(run_on([(0, str(home))], arguments[-1]))


if __name__ == "__main__":
    with (ROOT / "calls.jsonl").open("a") as log:
        log.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:]]) + "\n")
    (gcloud if Path(sys.argv[0]).name == "gcloud" else ssh)(sys.argv[1:])
