"""Several processes that train one network, on this machine, with simulated devices."""

import contextlib
import os
import random
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    """Below those that the system hands out by itself, so that nothing else takes it meanwhile."""
    chosen = random.Random(time.time_ns() ^ os.getpid()).sample(range(20000, 32000), 100)
    for port in chosen:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("", port))
            return port
    raise AssertionError(f"none of {chosen} is free")


def start(
    commands: list[list[str]], *, devices: int = 1, stdin: int | None = None, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts a job, each process with so many devices; stdout and stderr of each are one pipe."""
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment}
    options: list[list[str]] = [[]]
    if len(commands) > 1:
        job = (f"--coordinator=localhost:{free_port()}", f"--processes={len(commands)}")
        options = [[*job, f"--process={i}"] for i in range(len(commands))]
    pipes: Any = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        subprocess.Popen([*command, *more], cwd=ROOT, env=variables, text=True, **pipes)
        for command, more in zip(commands, options, strict=True)
    ]


def finish(children: list[subprocess.Popen[str]], *, timeout: float = 900) -> list[str]:
    """Waits for all; what each printed. None is left behind."""
    try:
        return [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
