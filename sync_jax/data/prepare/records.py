"""Encoded pictures as ArrayRecord files: written through a TFDS builder, read without TensorFlow.

A prepared folder holds, beside what TFDS puts there:

    sync_jax.json           what `DatasetInfo` says of it, written last
    labels_<split>.npy      all labels, for reading every record for them would take minutes
    bad_files.txt           pictures that cannot be decoded, and why; only if there are any
    squares_*/              see data.squares
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from io import BytesIO
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module
from PIL import Image
from tensorflow_datasets.core import dataset_builder, example_serializer, naming
from tensorflow_datasets.proto import tf_example_pb2

from sync_jax.data.images import BadImageError, Layout, centre, decode, square
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.download import DataError
from sync_jax.runtime.console import printable

INFO = "sync_jax.json"
BAD_FILES = "bad_files.txt"
SHARD = 1024  # pictures in a file: of ImageNet's, 110 MB
_MEASURED = 64  # pixels of the squares that means and deviations are computed of


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records.

    Attributes:
        path: of the file.
        labels: of its records.
        bad: a line for each picture that was left out.
        sums: `[2, 3]`, over its pictures, of the means of a channel and of its square.
        num_bytes: of the records.
    """

    path: Path
    labels: list[int]
    bad: list[str]
    sums: np.ndarray
    num_bytes: int


class PictureBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes encoded pictures as they are, in the listed order, once each has been decoded.

    Files of `SHARD` pictures are finished one by one in a folder that outlives the process: a
    preparation that was stopped goes on after the last finished one. TFDS's own generators of
    examples begin anew after every interruption, and of a split of more than a gigabyte they keep
    temporary files that are read with TensorFlow.
    """

    HOMEPAGE = ""
    largest_side: int | None = None  # pictures with a longer short side are made smaller

    def __init__(self, *, listing: Listing, work: Path, **kwargs: Any):
        """Takes the pictures, the folder for finished files, and what TFDS takes."""
        self._listing, self._work = listing, work
        self.shards: dict[str, list[Shard]] = {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=len(self._listing.class_names)),
            "file": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config
        self._work.mkdir(parents=True, exist_ok=True)
        serializer = example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        splits = []
        # Pillow lets go of Python's lock while it decodes, so threads do.
        with ThreadPool(os.cpu_count()) as pool, progress_bar() as progress:
            for split, pictures in self._listing.splits.items():
                task = progress.add_task(f"{split}: reading", total=len(pictures))
                shards = []
                for number, start in enumerate(range(0, len(pictures), SHARD)):
                    part = pictures[start : start + SHARD]
                    path = self._work / f"{split}-{number:05}"
                    shard = _finished(path)
                    if shard is None:
                        shard = self._write(path, part, pool, serializer)
                    shards.append(shard)
                    progress.update(task, advance=len(part))
                self.shards[split] = shards
                splits.append(self._adopt(split))
        self.info.set_splits(tfds.core.SplitDict(splits))

    def _write(
        self, path: Path, pictures: list[Picture], pool: ThreadPool, serializer: Any
    ) -> Shard:
        labels, bad, sums, num_bytes = [], [], np.zeros((2, 3)), 0
        temporary = path.with_suffix(".incomplete")
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        load = functools.partial(load_picture, largest_side=self.largest_side)
        for picture, loaded in zip(pictures, pool.map(load, pictures, chunksize=8), strict=True):
            if isinstance(loaded, str):
                bad.append(f"{picture.name}: {loaded}")
                continue
            data, moments = loaded
            name = os.fsencode(picture.name).decode(errors="replace")
            example = {"image": data, "label": picture.label, "file": name}
            record = serializer.serialize_example(self.info.features.encode_example(example))
            writer.write(record)
            labels.append(picture.label)
            num_bytes += len(record)
            sums += moments
        writer.close()
        flush(temporary)
        temporary.replace(path)
        known = {"labels": labels, "bad": bad, "sums": sums.tolist(), "num_bytes": num_bytes}
        temporary.write_text(json.dumps(known))
        flush(temporary)
        temporary.replace(path.with_suffix(".json"))  # from now on it is finished
        return Shard(path, labels, bad, sums, num_bytes)

    def _adopt(self, split: str) -> tfds.core.SplitInfo:
        """Takes a split's finished files into TFDS's folder, under its names."""
        template = naming.ShardedFileTemplate(
            dataset_name=self.name,
            data_dir=self.data_path,
            split=split,
            filetype_suffix="array_record",
        )
        # A file without a record is left out; TFDS knows none such.
        shards = [shard for shard in self.shards[split] if shard.labels]
        for number, shard in enumerate(shards):
            target = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            os.replace(shard.path, target)
        labels = [label for shard in shards for label in shard.labels]
        np.save(Path(self.data_path) / f"labels_{split}.npy", np.asarray(labels, np.int32))
        lost = sorted(set(range(len(self._listing.class_names))) - set(labels))
        if lost:
            shutil.rmtree(self._work)  # files must change, and then nothing here can be used
            bad = [line for shard in self.shards[split] for line in shard.bad]
            raise DataError(
                f"{split} has no readable picture of {self._listing.class_names[lost[0]]!r}"
                f"{'; ' if bad else ''}{'; '.join(bad[-3:])}"
            )
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.labels) for shard in shards],
            num_bytes=sum(shard.num_bytes for shard in shards),
            filename_template=template,
        )

    def write_info(self, folder: Path, **more: Any) -> list[str]:
        """Writes the list of bad files, and last what `read_info` reads.

        Args:
            folder: the prepared one.
            **more: kept beside it.

        Returns:
            What to say of bad files: a line each for the first, and how many there are.
        """
        counts = {split: sum(len(s.labels) for s in self.shards[split]) for split in self.shards}
        mean, squares = np.sum([s.sums for s in self.shards["train"]], axis=0) / counts["train"]
        bad = [line for shards in self.shards.values() for shard in shards for line in shard.bad]
        if bad:
            (folder / BAD_FILES).write_text("".join(f"{printable(line)}\n" for line in bad))
        names = [os.fsencode(n).decode(errors="replace") for n in self._listing.class_names]
        known = {
            "class_names": names,
            "mean": mean.tolist(),
            "std": np.sqrt(np.maximum(squares - mean**2, 1e-6)).tolist(),
            "num_train": counts["train"],
            "num_test": counts["test"],
            "bad_files": len(bad),
        }
        (folder / INFO).write_text(json.dumps(known | more, indent=1) + "\n")
        if not bad:
            return []
        total = sum(map(len, self._listing.splits.values()))
        said = [f"cannot be read, left out: {line}" for line in bad[:5]]
        return [*said, f"{len(bad):,} of {total:,} pictures left out; all are in {BAD_FILES}"]


def load_picture(picture: Picture, *, largest_side: int | None) -> tuple[bytes, np.ndarray] | str:
    """Reads a picture and makes sure that it can be decoded.

    Args:
        picture: where it is.
        largest_side: of a picture whose short side has more pixels, what it is resized to; a JPEG
            of quality 95 then takes its place.

    Returns:
        Its bytes, and `[2, 3]` the mean of each channel and of its square; or what is wrong.

    Raises:
        DataError: the file that holds it cannot be read.
    """
    try:
        data = picture.read()
        image = decode(data)
    except BadImageError as error:
        return str(error)
    except PermissionError as error:
        return error.strerror or str(error)
    except OSError as error:  # a disk that fails must not pass for thousands of bad pictures
        raise DataError(f"{picture.path} cannot be read: {error.strerror or error}") from error
    short = min(image.size)
    size = min(short, _MEASURED)
    pixels = square(image, size, size) / 255.0
    if largest_side and short > largest_side:
        width, height = (max(round(x * largest_side / short), 1) for x in image.size)
        out = BytesIO()
        image.resize((width, height), Image.Resampling.BILINEAR).save(
            out, "JPEG", quality=95, subsampling=0
        )
        data = out.getvalue()
    return data, np.stack([pixels.mean(axis=(0, 1)), (pixels**2).mean(axis=(0, 1))])


def _finished(path: Path) -> Shard | None:
    """What an earlier process has finished."""
    if not path.is_file():  # or a process that was killed has moved it on already
        return None
    try:
        known = json.loads(path.with_suffix(".json").read_text())
        sums = np.asarray(known["sums"])
        return Shard(path, known["labels"], known["bad"], sums, known["num_bytes"])
    except FileNotFoundError:
        return None


def read_info(prepared: Path, name: str, image_size: int) -> tuple[DatasetInfo, str] | None:
    """What is known of a prepared folder, and the digest it was made from; None where it is none.

    Raises:
        DataError: it is damaged.
    """
    path = prepared / INFO
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text())
        info = DatasetInfo(
            name=name,
            num_classes=len(known["class_names"]),
            image_shape=(image_size, image_size, 3),
            class_names=tuple(known["class_names"]),
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            num_train=known["num_train"],
            num_test=known["num_test"],
        )
        return info, known["digest"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {prepared}") from error


class Records:
    """The encoded pictures of a prepared split, by position; opened when first read.

    Can be sent to another process, which opens it for itself.
    """

    def __init__(self, prepared: Path, split: str):
        """Args: prepared: the folder; split: "train" or "test"."""
        self.prepared, self.split = prepared, split
        self._source: Any = None

    def labels(self) -> np.ndarray:
        """`[n]` int32.

        Raises:
            DataError: the prepared folder is damaged.
        """
        return self._guarded(self._read_labels)

    def _read_labels(self) -> np.ndarray:
        labels: np.ndarray = np.load(self.prepared / f"labels_{self.split}.npy", allow_pickle=False)
        if labels.ndim != 1 or labels.dtype != np.int32 or not len(labels) or labels.min() < 0:
            raise ValueError(f"labels_{self.split}.npy holds no labels")
        return labels

    def __getitem__(self, position: int) -> bytes:
        """A picture's bytes.

        Raises:
            DataError: the prepared folder is damaged.
        """
        return self._guarded(lambda: self._read(int(position)))

    def _read(self, position: int) -> bytes:
        if self._source is None:
            # Not by TFDS, which imports the Python modules that a prepared folder names.
            paths = sorted(map(str, self.prepared.glob(f"*-{self.split}.array_record-*-of-*")))
            source = array_record_data_source.ArrayRecordDataSource(paths)
            if len(source) != len(self._read_labels()):  # a file that is missing shifts the others
                raise ValueError(f"it has {len(source)} records, not one for each label")
            self._source = source
        feature = tf_example_pb2.Example.FromString(self._source[position]).features.feature
        data: bytes = feature["image"].bytes_list.value[0]
        return data

    def _guarded(self, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except Exception as error:  # TFDS, ArrayRecord and protobuf raise what they like
            raise DataError(
                f"{self.prepared} cannot be read ({type(error).__name__}: "
                f"{' '.join(str(error).split())}); if it is damaged, delete it and prepare again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {"prepared": self.prepared, "split": self.split, "_source": None}


class DecodedPictures:
    """Pictures as squares, decoded when they are asked for; a slice gives an array.

    Attributes:
        records: of the split.
        rows: `[n]`, the positions there.
        layout: of the squares, of which the middle is wanted.
        shape: `[n, size, size, 3]`.
    """

    def __init__(self, records: Records, rows: np.ndarray, layout: Layout):
        """Args: see the attributes."""
        self.records, self.rows, self.layout = records, rows, layout
        self.shape = (len(rows), layout.size, layout.size, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, rows: np.ndarray) -> "DecodedPictures":
        """Some of them, by position."""
        return DecodedPictures(self.records, self.rows[rows], self.layout)

    def __getitem__(self, wanted: Any) -> np.ndarray:
        with ThreadPool(os.cpu_count()) as pool:
            positions = np.arange(len(self.rows))[wanted].tolist()
            images = pool.map(self.square, positions, chunksize=4)
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def picture(self, position: int) -> Image.Image:
        """One of them as it is, RGB.

        Raises:
            DataError: it can no longer be read.
        """
        row = int(self.rows[position])
        try:
            return decode(self.records[row])
        except BadImageError as error:
            raise DataError(f"{self.records.prepared}: picture {row}: {error}") from error

    def square(self, position: int) -> np.ndarray:
        """The middle of one of them: `[size, size, 3]` uint8.

        Raises:
            DataError: it can no longer be read.
        """
        image = square(self.picture(position), self.layout.short_side, self.layout.stored)
        return centre(image, self.layout.size)


def progress_bar() -> rich.progress.Progress:
    """On the terminal; gone when it is done."""
    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # into a file it would write empty lines
    )


def flush(path: Path) -> None:
    """Makes sure that a file or folder is on the disk, so that a power cut cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Makes sure that there is room.

    Raises:
        DataError: there is not; says how much is needed and how much is free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"data.data_dir={str(folder)!r} needs {needed / 1e6:,.1f} MB {what}, "
            f"{free / 1e6:,.1f} MB are free"
        )
