"""Answers to gcloud in the tests: a cloud in the folder FAKE_ROOT, its hosts folders and processes.

It takes the commands and options that launch/tpu.sh uses and no others. cloud.json holds the slices
and the states of each request: every look takes the next, and the last stays.
"""

import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

ROOT = Path(os.environ["FAKE_ROOT"])
WHERE = {"project", "zone"}
OPTIONS = {
    "tpu-vm create": {"accelerator-type", "version"},
    "tpu-vm describe": {"format"},
    "tpu-vm ssh": {"worker", "quiet", "command"},
    "tpu-vm scp": {"worker", "quiet"},
    "tpu-vm delete": {"quiet"},
    "queued-resources create": {"node-id", "accelerator-type", "runtime-version", "spot"},
    "queued-resources describe": {"format"},
    "queued-resources list": {"format"},
    "queued-resources delete": {"force", "quiet"},
}
VARIABLES = ("FAKE_ROOT", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")


def refuse(message: str, status: int = 1) -> None:
    sys.exit(print(f"ERROR: (gcloud) {message}", file=sys.stderr) or status)


def answer(cloud: dict, action: str, names: list[str], options: dict[str, str]) -> int:
    slices, requests = cloud["slices"], cloud["requests"]
    if cloud["fails"].get(action, 0) > 0:
        cloud["fails"][action] -= 1
        refuse("UNAVAILABLE: the service does not answer")
    if action == "queued-resources list":
        print("\n".join(requests))
        return 0
    name = names[-1].removesuffix(":")
    if action in ("tpu-vm create", "queued-resources create"):
        if name in slices or name in requests:
            refuse(f"ALREADY_EXISTS: {name}")
        if action == "tpu-vm create":
            start(cloud, name)
        else:
            requests[name] = list(cloud["states"])
    elif action == "queued-resources describe":
        states = requests.get(name) or refuse(f"NOT_FOUND: {name}")
        if states[0] == "ACTIVE" and name not in slices:
            start(cloud, name)
        print(states.pop(0) if len(states) > 1 else states[0])
    elif name not in slices and not (action == "queued-resources delete" and name in requests):
        refuse(f"NOT_FOUND: {name}")
    elif action == "tpu-vm describe":
        print("READY")
    elif action == "tpu-vm ssh":
        return on_hosts(homes(name), options["command"])
    elif action == "tpu-vm scp":
        for home in homes(name):
            copied = Path(shutil.copy(names[0], home / Path(names[0]).name))
            if copied.suffix == ".env":
                cloud["modes"].append(oct(stat.S_IMODE(copied.stat().st_mode)))
    else:
        if action == "tpu-vm delete" and name in requests:
            refuse("FAILED_PRECONDITION: it belongs to a queued resource")
        requests.pop(name, None)
        if name in slices:
            slices.remove(name)
            shutil.rmtree(ROOT / "hosts" / name)
    return 0


def start(cloud: dict, name: str) -> None:
    cloud["slices"].append(name)
    for worker in range(cloud["workers"]):
        (ROOT / "hosts" / name / str(worker)).mkdir(parents=True)


def homes(name: str) -> list[Path]:
    return sorted((ROOT / "hosts" / name).iterdir())


def on_hosts(folders: list[Path], command: str) -> int:
    """Runs a command on every host; as gcloud does, it fails where one of them does."""
    children = []
    for home in folders:
        environment = {name: os.environ[name] for name in VARIABLES if name in os.environ} | {
            "PATH": f"{ROOT}/host-bin:/usr/bin:/bin",
            "HOME": str(home),
            "HOSTNAME": f"t1v-n-0123abcd-w-{home.name}",
            "JAX_PLATFORMS": "cpu",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        children.append(subprocess.Popen(["bash", "-c", command], cwd=home, env=environment))
    return max(child.wait() for child in children)


def main(arguments: list[str]) -> int:
    with (ROOT / "calls").open("a") as file:
        file.write(json.dumps(arguments) + "\n")
    options = dict(a[2:].partition("=")[::2] for a in arguments if a.startswith("--"))
    compute, tpus, group, verb, *names = [a for a in arguments if not a.startswith("--")]
    action = f"{group} {verb}"
    assert (compute, tpus) == ("compute", "tpus")
    if options.keys() != OPTIONS[action] | WHERE:
        refuse(f"unrecognized or missing arguments: {sorted(options)}", 2)
    assert options.get("worker", "all") == "all", "a slice whose hosts are told one by one hangs"
    with (ROOT / "cloud.json").open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cloud = json.load(file)
        if action == "tpu-vm ssh":  # which changes nothing, and may take long
            fcntl.flock(file, fcntl.LOCK_UN)
            return answer(cloud, action, names, options)
        try:
            return answer(cloud, action, names, options)
        finally:
            file.seek(0)
            file.truncate()
            json.dump(cloud, file)


sys.exit(main(sys.argv[1:]))
