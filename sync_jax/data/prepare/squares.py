"""Pictures prepared once as raw uint8 squares in one memory-mapped file, for device memory.

    <prepared>/squares_<short side>_<square>/<split>.npy    `[n, square, square, 3]`

Reading it costs no decoding and no memory of the host: the system reads what is touched.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sync_jax.data.images import Layout, centre
from sync_jax.data.info import Pictures
from sync_jax.data.prepare.records import DecodedPictures, Records, progress_bar
from sync_jax.data.prepare.staging import check_disk
from sync_jax.errors import InputError
from sync_jax.runtime.files import flush

_AT_ONCE = 512  # pictures between two notes of how far it is
_HEADER = 128  # bytes of an .npy file's header, or more


@dataclasses.dataclass(frozen=True)
class Squares(Pictures):
    """Rows of a memory-mapped array, and the middle of each.

    Attributes:
        mapped: `[m, stored, stored, 3]` uint8, all of the split.
    """

    mapped: np.ndarray

    def __getitem__(self, wanted: Any) -> np.ndarray:
        """`[..., size, size, 3]`."""
        return centre(np.asarray(self.mapped[self.rows[wanted]]), self.size)

    def uncut(self) -> "Squares":
        """The same rows as they are stored."""
        return dataclasses.replace(self, size=self.mapped.shape[1])


def squares_path(prepared: Path, layout: Layout, split: str) -> Path:
    """Where a split's squares are."""
    return prepared / f"squares_{layout.short_side}_{layout.stored}" / f"{split}.npy"


def open_squares(prepared: Path, layout: Layout, split: str) -> np.ndarray:
    """The squares of a split, memory-mapped and read-only.

    Raises:
        InputError: they are damaged.
    """
    path = squares_path(prepared, layout, split)
    try:
        mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it") from error
    expected = (len(Records(prepared, split).labels()), layout.stored, layout.stored, 3)
    if mapped.shape != expected or mapped.dtype != np.uint8:
        raise InputError(f"{path} holds {mapped.dtype} {mapped.shape}, expected uint8 {expected}")
    return mapped


def missing_bytes(prepared: Path, layout: Layout, counts: dict[str, int]) -> int:
    """Bytes that the squares of some splits have yet to take.

    Args:
        prepared: the folder of records.
        layout: of the squares.
        counts: pictures by split.
    """
    return sum(
        3 * count * layout.stored**2 + _HEADER
        for split, count in counts.items()
        if not squares_path(prepared, layout, split).exists()
    )


def make_squares(
    prepared: Path, layout: Layout, splits: tuple[str, ...], *, log: Callable[[str], None]
) -> None:
    """Decodes all pictures of some splits into squares, on all cores.

    A process that was stopped, even by a power cut, leaves a file that the next one goes on with.

    Args:
        prepared: the folder of records.
        layout: of the squares.
        splits: which; those that are there are left alone.
        log: told a line when there is something to do.

    Raises:
        InputError: there is no room, or a picture that could be decoded no longer can.
        OSError: the folder cannot be written.
    """
    for split in splits:
        target = squares_path(prepared, layout, split)
        if target.exists():
            continue
        records = Records(prepared, split)
        shape = (len(records.labels()), layout.stored, layout.stored, 3)
        target.parent.mkdir(exist_ok=True)
        temporary, note = target.with_suffix(".incomplete"), target.with_suffix(".done")
        done = _done(temporary, note, shape)
        if not done:
            check_disk(
                target.parent,
                math.prod(shape) + _HEADER,
                f"for squares of {layout.stored} pixels",
            )
        log(f"making {shape[0]:,} squares of {layout.stored} pixels in {target.parent}")
        try:
            _fill(temporary, note, records, shape, layout, done)
        except InputError:  # the records are damaged
            if not done:
                for path in (temporary, note):
                    path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # there may be the other split's
                    target.parent.rmdir()
            raise
        flush(temporary)
        temporary.replace(target)
        note.unlink(missing_ok=True)
        flush(target.parent)


def _fill(
    temporary: Path,
    note: Path,
    records: Records,
    shape: tuple[int, ...],
    layout: Layout,
    done: int,
) -> None:
    """Decodes what is not done yet into the file, and notes how far it is."""
    mode = "r+" if done else "w+"
    mapped = np.lib.format.open_memmap(temporary, mode=mode, dtype=np.uint8, shape=shape)
    decoded = DecodedPictures(np.arange(shape[0]), layout.stored, records, layout)
    with progress_bar() as progress:
        task = progress.add_task(f"{records.split}: squares", total=shape[0], completed=done)
        for start in range(done, shape[0], _AT_ONCE):
            stop = min(start + _AT_ONCE, shape[0])
            mapped[start:stop] = decoded[start:stop]
            mapped.flush()
            note.write_text(str(stop))
            progress.update(task, completed=stop)


def _done(temporary: Path, note: Path, shape: tuple[int, ...]) -> int:
    """How many squares an earlier process has finished."""
    try:
        done = int(note.read_text())
        fits = np.load(temporary, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        return 0
    return done if fits and 0 <= done <= shape[0] else 0
