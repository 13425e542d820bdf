"""Compiled programs, kept in a folder that is the user's alone: JAX does not check who wrote it."""

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import jax

_SECONDS = 0.5  # of compilation, from which a program is worth keeping


def use(folder: str) -> str | None:
    """Has JAX keep what it compiles from now on; returns a line if the folder cannot be used.

    The folder is made when needed; '' keeps nothing. JAX's own setting (JAX_COMPILATION_CACHE_DIR)
    takes precedence and is not checked. Of several processes none keeps anything: on GPUs they
    measure kernels together while they compile, and one that found its program would leave the
    others waiting. Programs of one kind of processor are not offered to another.
    """
    settings: Any = jax.config
    if not folder or settings.jax_compilation_cache_dir or jax.process_count() > 1:
        return None
    try:
        path = Path(folder).expanduser().absolute() / _processor()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        reason = _not_ours(path.parent) or _not_ours(path)
        if not os.access(path, os.W_OK):
            reason = reason or f"{path} cannot be written"
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        reason = f"{folder} cannot be used ({error})"
    if reason:
        return f"compiled programs are not kept: {reason}"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    return None


def _not_ours(path: Path) -> str | None:
    """Reason why others could write into a folder, or replace it; None if they cannot."""
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return f"{path} is no folder"
    if status.st_uid != os.geteuid():
        return f"{path} is another user's"
    if status.st_mode & 0o077:
        return f"{path} is open to others (chmod 700 closes it)"
    for parent in path.resolve().parents:
        status = parent.stat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{parent}, above it, is another user's"
        # Where others may write, the sticky bit keeps them from renaming what is ours.
        if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
            return f"{parent}, above it, can be written by others"
    return None


def _processor() -> str:
    """A name for this kind of processor and its instructions, which XLA compiles for."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = {x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]
