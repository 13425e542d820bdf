"""Several processes that train one network, on this machine, with simulated devices."""

import os
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(
    commands: list[list[str]], *, devices: int = 1, stdin: int | None = None, **environment: str
) -> list[subprocess.Popen[str]]:
    """Starts the processes of one job; stdout and stderr of each are one pipe.

    Args:
        commands: one for each process; what tells them of each other is added.
        devices: of each.
        stdin: as Popen's.
        environment: more variables.
    """
    variables = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    variables |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", **environment}
    options: list[list[str]] = [[]]
    if len(commands) > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        options = [
            [f"--coordinator=localhost:{port}", f"--processes={len(commands)}", f"--process={i}"]
            for i in range(len(commands))
        ]
    return [
        subprocess.Popen(
            [*command, *more],
            cwd=ROOT,
            env=variables,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, more in zip(commands, options, strict=True)
    ]


def finish(children: list[subprocess.Popen[str]], *, timeout: float = 240) -> list[str]:
    """Waits for all; what each printed. None is left behind."""
    try:
        return [child.communicate(timeout=timeout)[0] for child in children]
    finally:
        for child in children:
            child.kill()
