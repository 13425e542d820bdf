"""Digests of prepared files, so that no damaged one is used.

`digests.json` in a prepared folder, and in each of its folders of squares, holds the digest of
every file beside it, the path that the data came from, and a digest of itself.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sync_jax.runtime.files import write_text

FILE = "digests.json"
_PIECE = 1 << 23  # bytes


def write(folder: Path, files: Mapping[str, Path], source: str = "") -> None:
    """Computes and writes the digests of files, by name, beside those that are known."""
    known = read(folder)
    digests = known["files"] | {name: _digest(path) for name, path in files.items()}
    write_text(folder / FILE, _text({"files": digests, "source": source or known["source"]}))


def verify(folder: Path, wanted: Callable[[str], bool]) -> bool:
    """Compares the wanted files with their digests; False where no digest is known.

    Raises a ValueError or an OSError where a file is not as it was.
    """
    digests = {name: digest for name, digest in read(folder)["files"].items() if wanted(name)}
    for name, digest in digests.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is not as it was prepared")
    return bool(digests)


def read(folder: Path) -> dict[str, Any]:
    """Reads `files` and `source`, as `write` wrote them; both are empty where there is nothing."""
    try:
        text = (folder / FILE).read_text()
    except FileNotFoundError:
        return {"files": {}, "source": ""}
    known: dict[str, Any] = json.loads(text)
    del known["itself"]
    if text != _text(known):
        raise ValueError(f"{FILE} is not as it was written")
    return known


def _text(known: dict[str, Any]) -> str:
    itself = hashlib.sha256(json.dumps(known).encode()).hexdigest()
    return json.dumps(known | {"itself": itself}, indent=1) + "\n"


def _digest(path: Path) -> str:
    status = path.stat()
    return _computed(path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@functools.cache  # one process reads a file once, also for a sweep of many runs
def _computed(path: Path, device: int, inode: int, size: int, time: int) -> str:
    """SHA-256 of the SHA-256 digests of a file's pieces, which all cores compute together."""
    del device, inode, time

    def piece(start: int) -> bytes:
        with path.open("rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(_PIECE)).digest()

    # Python lets go of its lock while it hashes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return hashlib.sha256(b"".join(pool.map(piece, range(0, size, _PIECE)))).hexdigest()
