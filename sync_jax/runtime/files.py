"""Files that are whole or absent, also after a power cut."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file beside its place, makes sure that it is on the disk, and puts it there.

    Args:
        path: in a folder that exists; a file there is replaced.
        write: writes the content.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f"{path.name}.incomplete")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes sure that names given in a folder outlast a power cut, where its file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # a file system without that, as a mounted bucket
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `write_atomically` does."""
    write_atomically(path, lambda file: file.write(text.encode()))
