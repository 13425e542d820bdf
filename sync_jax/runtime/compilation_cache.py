"""What XLA compiled, kept for the next process in a folder that is the user's alone.

What is in it are programs that the next run executes. JAX does not ask who wrote them, so it is
asked here.
"""

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Any

import jax
from jax._src.compilation_cache import decompress_executable  # it has no public reader

_SECONDS = 0.5  # of compilation, from which a program is worth keeping
_BYTES = 2 << 30  # of all of them; at a start the least recently written go


def use(folder: str) -> str | None:
    """Has JAX keep what it compiles; before it compiles anything.

    A variable or setting of JAX's own (JAX_COMPILATION_CACHE_DIR) goes before this. Of several
    processes none keeps anything: on GPUs they measure kernels together while they compile, and one
    that found its program would leave the others waiting.

    Args:
        folder: made when needed; '' keeps nothing. A program of one kind of processor is not
            offered to another.

    Returns:
        Why nothing is kept though a folder is named, in a line; None where all is well.
    """
    settings: Any = jax.config
    if not folder or settings.jax_compilation_cache_dir or jax.process_count() > 1:
        return None
    try:
        path = Path(folder).expanduser().absolute() / _processor()
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        if reason := _not_ours(path.parent) or _not_ours(path):
            return f"compiled programs are not kept: {reason}"
        if not os.access(path, os.W_OK):
            return f"compiled programs are not kept: {path} cannot be written"
        _prune(path)
        _delete_halves(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        return f"compiled programs are not kept: {folder} cannot be used ({error})"
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    return None


def _not_ours(path: Path) -> str | None:
    """Why others could put something into a folder, or in its place; None if they cannot."""
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
    """A name for what this machine's processor can do, which is compiled for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = {x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))}
    return hashlib.sha256("\n".join(sorted(kinds)).encode()).hexdigest()[:16]


def _prune(folder: Path) -> None:
    """Deletes the oldest files until the rest are small enough; another process may do the same."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                files.append((status.st_mtime, status.st_size, path))
    excess = sum(size for _, size, _ in files) - _BYTES
    for _, size, path in sorted(files):
        if excess <= 0:
            break
        path.unlink(missing_ok=True)
        excess -= size


def _delete_halves(folder: Path) -> None:
    """Deletes what a killed process wrote half: JAX would neither use it nor write it anew.

    Each file is read once, at the first start after it was written.
    """
    marker = folder / "whole-until"
    since = marker.stat().st_mtime if marker.exists() else 0.0
    marker.touch()  # before the files are read: what is written meanwhile is read the next time
    for path in folder.glob("*-cache"):
        try:
            if path.stat().st_mtime >= since - 1:
                decompress_executable(path.read_bytes())
        except Exception:  # of whichever library packs them; or another process deleted it
            path.unlink(missing_ok=True)
