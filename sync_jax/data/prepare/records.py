"""Reads prepared pictures: encoded records, decoded when they are sliced, or raw squares.

    <prepared>/<name>-<split>.array_record-*                one record for each picture
    <prepared>/labels_<split>.npy                           `[n]` int32
    <prepared>/squares_<short side>_<square>/<split>.npy    `[n, square, square, 3]` uint8

Squares are made once and memory-mapped. Reading them costs no decoding and no memory of the host.
"""

import dataclasses
import math
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_data_source
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from sync_jax.data.images import BadImageError, Layout, centre, decode, square
from sync_jax.data.info import Pictures
from sync_jax.data.prepare import digests
from sync_jax.data.prepare.staging import Log, check_disk, damage, progress_bar
from sync_jax.errors import InputError
from sync_jax.runtime.files import flush

_AT_ONCE = 512  # squares made between two notes of how far it is
_HEADER = 128  # bytes of an .npy file's header, or more


class Records:
    """The encoded pictures of a prepared split, by position; opened when first read.

    Can be sent to another process, which opens it for itself.
    """

    def __init__(self, prepared: Path, split: str):
        self.prepared, self.split = prepared, split
        self._source: Any = None

    def labels(self) -> np.ndarray:
        """Reads all labels: every record would have to be read for them, which takes minutes."""
        path = self.prepared / f"labels_{self.split}.npy"
        with damage(self.prepared):
            labels: np.ndarray = np.load(path, allow_pickle=False)
            if labels.ndim != 1 or labels.dtype != np.int32 or not len(labels) or labels.min() < 0:
                raise ValueError(f"{path.name} holds no labels")
        return labels

    def __getitem__(self, position: int) -> bytes:
        with damage(self.prepared):
            if self._source is None:
                # Not by TFDS, which imports the Python modules that a prepared folder names.
                paths = sorted(map(str, self.prepared.glob(f"*-{self.split}.array_record-*-of-*")))
                source = array_record_data_source.ArrayRecordDataSource(paths)
                if len(source) != len(self.labels()):  # a file that is missing shifts the others
                    raise ValueError(f"it has {len(source)} records, not one for each label")
                self._source = source
            record = tf_example_pb2.Example.FromString(self._source[int(position)])
            data: bytes = record.features.feature["image"].bytes_list.value[0]
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"prepared": self.prepared, "split": self.split, "_source": None}


@dataclasses.dataclass(frozen=True)
class DecodedPictures(Pictures):
    """The middles of squares, decoded when they are asked for."""

    records: Records
    layout: Layout

    def __getitem__(self, wanted: Any) -> np.ndarray:
        with ThreadPool(os.cpu_count()) as pool:
            positions = np.arange(len(self.rows))[wanted].tolist()
            images = pool.map(self.square, positions, chunksize=4)
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def picture(self, position: int) -> Image.Image:
        """Decodes one of them as it is, RGB."""
        row = int(self.rows[position])
        try:
            return decode(self.records[row])
        except BadImageError as error:
            raise InputError(f"{self.records.prepared}: picture {row}: {error}") from error

    def square(self, position: int) -> np.ndarray:
        """Decodes the middle of one of them: `[size, size, 3]` uint8."""
        image = square(self.picture(position), self.layout.short_side, self.layout.stored)
        return centre(image, self.size)


class DecodedSquares(DecodedPictures):
    """The same as `Squares`, decoded when they are asked for: where no file of them can be made."""

    def uncut(self) -> "DecodedSquares":
        """See `Pictures.uncut`."""
        return dataclasses.replace(self, size=self.layout.stored)


@dataclasses.dataclass(frozen=True)
class Squares(Pictures):
    """The middles of rows of a memory-mapped array `[m, stored, stored, 3]`."""

    mapped: np.ndarray

    def __getitem__(self, wanted: Any) -> np.ndarray:
        return centre(np.asarray(self.mapped[self.rows[wanted]]), self.size)

    def uncut(self) -> "Squares":
        """See `Pictures.uncut`."""
        return dataclasses.replace(self, size=self.mapped.shape[1])


def squares_path(prepared: Path, layout: Layout, split: str) -> Path:
    """The file of a split's squares."""
    return prepared / f"squares_{layout.short_side}_{layout.stored}" / f"{split}.npy"


def open_squares(records: Records, layout: Layout) -> np.ndarray:
    """The squares of a split, memory-mapped and read-only."""
    path = squares_path(records.prepared, layout, records.split)
    expected = (len(records.labels()), layout.stored, layout.stored, 3)
    with damage(path):
        mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        if mapped.shape != expected or mapped.dtype != np.uint8:
            raise ValueError(f"it holds {mapped.dtype} {mapped.shape}, expected uint8 {expected}")
    return mapped


def missing_bytes(prepared: Path, layout: Layout, counts: dict[str, int]) -> int:
    """Bytes that the squares of splits of so many pictures have yet to take."""
    return sum(
        3 * count * layout.stored**2 + _HEADER
        for split, count in counts.items()
        if not squares_path(prepared, layout, split).exists()
    )


def make_squares(records: Records, layout: Layout, *, log: Log) -> None:
    """Decodes all pictures of a split into squares, on all cores, if that was not done.

    A process that was stopped, even by a power cut, leaves a file that the next one goes on with.
    """
    target = squares_path(records.prepared, layout, records.split)
    if target.exists():
        return
    count = len(records.labels())
    shape = (count, layout.stored, layout.stored, 3)
    target.parent.mkdir(exist_ok=True)
    temporary, note = target.with_suffix(".incomplete"), target.with_suffix(".done")
    done = _done(temporary, note, shape)
    if not done:
        what = f"for squares of {layout.stored} pixels"
        check_disk(target.parent, math.prod(shape) + _HEADER, what)
    log(f"making {count:,} squares of {layout.stored} pixels in {target.parent}")
    mode = "r+" if done else "w+"
    mapped = np.lib.format.open_memmap(temporary, mode=mode, dtype=np.uint8, shape=shape)
    decoded = DecodedPictures(np.arange(count), layout.stored, records, layout)
    with progress_bar() as progress:
        task = progress.add_task(f"{records.split}: squares", total=count, completed=done)
        for start in range(done, count, _AT_ONCE):
            stop = min(start + _AT_ONCE, count)
            mapped[start:stop] = decoded[start:stop]
            mapped.flush()
            note.write_text(str(stop))
            progress.update(task, completed=stop)
    flush(temporary)
    digests.write(target.parent, {target.name: temporary})
    temporary.replace(target)
    note.unlink()
    flush(target.parent)


def _done(temporary: Path, note: Path, shape: tuple[int, ...]) -> int:
    """Number of squares that an earlier process has finished."""
    try:
        done = int(note.read_text())
        fits = np.load(temporary, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        return 0
    return done if fits and 0 <= done <= shape[0] else 0
