"""Files that are whole or absent, also after a power cut, and locks between processes."""

import contextlib
import errno
import fcntl
import glob
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from sync_jax.errors import InputError

# Errors of fsync on file systems that do not have it, such as mounted buckets.
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)


_FILES = (".json", ".jsonl", ".npz", ".png", ".lock")  # how a run's files end


class LockedError(Exception):
    """Another process holds a lock; the message names the process."""


def check_plain(workdir: Path) -> None:
    """Raises InputError for a FIFO, socket or device in a run's folder, or a folder for a file.

    Opening or reading these may never end. Symbolic links count as what they lead to.
    """
    for pattern in ("*", "checkpoints/**"):
        for name in glob.iglob(pattern, root_dir=workdir, recursive=True, include_hidden=True):
            try:
                mode = (workdir / name).stat().st_mode
            except FileNotFoundError:  # a link to nothing, or another process's
                continue
            except OSError as error:
                raise InputError(f"{workdir / name} cannot be read: {error.strerror}") from error
            if not (stat.S_ISREG(mode) or (stat.S_ISDIR(mode) and not name.endswith(_FILES))):
                raise InputError(f"{workdir / name} is no plain file; move it away")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside its place, makes sure that it is on the disk, and moves it there.

    On an OSError the file that was there is unchanged.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))


def flush(path: Path) -> None:
    """Makes sure that a file, or the names in a folder, are on the disk, where that can be done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


def hold(folder: Path, *, alone: bool = False) -> int:
    """Locks a folder, which need not be writable, with others or alone, until the result is closed.

    Raises LockedError where others hold it, or another alone. Without locks, nothing is held.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LockedError("another process") from None
    except OSError:
        pass
    return descriptor


@contextlib.contextmanager
def locked(
    path: Path, *, waiting: Callable[[], None] | None = None,
    unsupported: Callable[[], None] = lambda: None,
) -> Iterator[None]:  # fmt: skip
    """Holds the lock of a file, which the system releases even when the process is killed.

    The file names its holder, who may remove it: processes that waited then make a new one. If
    another holds the lock, `waiting` is called and the lock awaited; without it, LockedError is
    raised. `unsupported` is called on a file system without locks, where nothing is held.
    """
    while True:
        with path.open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting is None:
                    file.seek(0)
                    raise LockedError(file.read().strip() or "another process") from None
                waiting()
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                unsupported()
                yield
                return
            # The process that held the lock may have removed the file: then it is nobody's.
            if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
            return
