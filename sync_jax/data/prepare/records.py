"""Encoded pictures as ArrayRecord files: written through a TFDS builder, read without TensorFlow.

A prepared folder holds, beside what TFDS puts there:

    sync_jax.json           what `DatasetInfo` says of it, and the digest of what it was made from
    labels_<split>.npy      all labels, for reading every record for them would take minutes
    bad_files.txt           pictures that cannot be decoded, and why; only if there are any
    squares_*/              see prepare.squares
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Sequence
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
from sync_jax.data.info import Pictures
from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.staging import damage, tfds_info
from sync_jax.errors import InputError
from sync_jax.runtime.console import printable
from sync_jax.runtime.files import flush, write_atomically

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
    sums: list[list[float]]
    num_bytes: int


class PictureBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes encoded pictures as they are, in the listed order, once each has been decoded.

    Files of `SHARD` pictures are finished one by one in a folder that outlives the process: a
    preparation that was stopped goes on after the last finished one. TFDS's own generators of
    examples begin anew after every interruption, and of a split of more than a gigabyte they keep
    temporary files that are read with TensorFlow.
    """

    def __init__(
        self,
        *,
        name: str,
        version: str,
        listing: Listing,
        digest: str,
        work: Path,
        largest_side: int | None,
        data_dir: str,
    ):
        """Takes what to write.

        Args:
            name: of the dataset.
            version: of the prepared format.
            listing: the pictures.
            digest: of the listing, kept in `INFO`.
            work: the folder for finished files.
            largest_side: pixels; of pictures with a longer short side this is made of it.
            data_dir: where TFDS builds.
        """
        self.name, self.VERSION = name, tfds.core.Version(version)
        self._listing, self._digest, self._work = listing, digest, work
        self._largest_side = largest_side
        self._shards: dict[str, list[Shard]] = {}
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=len(self._listing.class_names)),
            "file": tfds.features.Text(),
        }
        return tfds_info(self, features)

    def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
        del dl_manager, download_config
        self._work.mkdir(parents=True, exist_ok=True)
        serializer = example_serializer.ExampleSerializer(self.info.features.get_serialized_info())
        splits = []
        # Pillow lets go of Python's lock while it decodes, so threads do.
        with ThreadPool(os.cpu_count()) as pool, progress_bar() as progress:
            for split, pictures in self._listing.splits.items():
                task = progress.add_task(f"{split}: reading", total=len(pictures))
                self._shards[split] = []
                for number, start in enumerate(range(0, len(pictures), SHARD)):
                    part = pictures[start : start + SHARD]
                    path = self._work / f"{split}-{number:05}"
                    shard = _finished(path) or self._write(path, part, pool, serializer)
                    self._shards[split].append(shard)
                    progress.update(task, advance=len(part))
                splits.append(self._adopt(split))
        self.info.set_splits(tfds.core.SplitDict(splits))
        self._write_info()

    def _write(
        self, path: Path, pictures: Sequence[Picture], pool: ThreadPool, serializer: Any
    ) -> Shard:
        labels, bad, sums, num_bytes = [], [], np.zeros((2, 3)), 0
        temporary = path.with_suffix(".incomplete")
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        load = functools.partial(load_picture, largest_side=self._largest_side)
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
        shard = Shard(path, labels, bad, sums.tolist(), num_bytes)
        known = dataclasses.asdict(shard) | {"path": str(path)}
        # From now on it is finished.
        write_atomically(path.with_suffix(".json"), lambda f: f.write(json.dumps(known).encode()))
        return shard

    def _adopt(self, split: str) -> tfds.core.SplitInfo:
        """Takes a split's finished files into TFDS's folder, under its names."""
        template = naming.ShardedFileTemplate(
            dataset_name=self.name,
            data_dir=self.data_path,
            split=split,
            filetype_suffix="array_record",
        )
        # A file without a record is left out; TFDS knows none such.
        shards = [shard for shard in self._shards[split] if shard.labels]
        for number, shard in enumerate(shards):
            target = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            os.replace(shard.path, target)
        labels = [label for shard in shards for label in shard.labels]
        np.save(Path(self.data_path) / f"labels_{split}.npy", np.asarray(labels, np.int32))
        lost = sorted(set(range(len(self._listing.class_names))) - set(labels))
        if lost:
            shutil.rmtree(self._work)  # files must change, and then nothing here can be used
            bad = [line for shard in self._shards[split] for line in shard.bad]
            raise InputError(
                f"{split} has no readable picture of {self._listing.class_names[lost[0]]!r}"
                f"{'; ' if bad else ''}{'; '.join(bad[-3:])}"
            )
        return tfds.core.SplitInfo(
            name=split,
            shard_lengths=[len(shard.labels) for shard in shards],
            num_bytes=sum(shard.num_bytes for shard in shards),
            filename_template=template,
        )

    def _write_info(self) -> None:
        folder, shards = Path(self.data_path), self._shards
        counts = {split: sum(len(s.labels) for s in shards[split]) for split in shards}
        mean, squares = np.sum([s.sums for s in shards["train"]], axis=0) / counts["train"]
        bad = self.bad_files
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
            "digest": self._digest,
        }
        (folder / INFO).write_text(json.dumps(known, indent=1) + "\n")

    @property
    def bad_files(self) -> list[str]:
        """A line for each picture that was left out."""
        return [line for shards in self._shards.values() for shard in shards for line in shard.bad]


def load_picture(picture: Picture, *, largest_side: int | None) -> tuple[bytes, np.ndarray] | str:
    """Reads a picture and makes sure that it can be decoded.

    Args:
        picture: where it is.
        largest_side: of a picture whose short side has more pixels, what it is resized to; a JPEG
            of quality 95 then takes its place.

    Returns:
        Its bytes, and `[2, 3]` the mean of each channel and of its square; or what is wrong.

    Raises:
        InputError: the file that holds it cannot be read.
    """
    try:
        data = picture.read()
        image = decode(data)
    except BadImageError as error:
        return str(error)
    except PermissionError as error:
        return error.strerror or str(error)
    except OSError as error:  # a disk that fails must not pass for thousands of bad pictures
        raise InputError(f"{picture.where} cannot be read: {error.strerror or error}") from error
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
        return Shard(**known | {"path": path})
    except FileNotFoundError:
        return None


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
            InputError: the prepared folder is damaged.
        """
        name = f"labels_{self.split}.npy"
        with damage(self.prepared):
            labels: np.ndarray = np.load(self.prepared / name, allow_pickle=False)
            if labels.ndim != 1 or labels.dtype != np.int32 or not len(labels) or labels.min() < 0:
                raise ValueError(f"{name} holds no labels")
        return labels

    def __getitem__(self, position: int) -> bytes:
        """A picture's bytes.

        Raises:
            InputError: the prepared folder is damaged.
        """
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
    """Pictures as squares, decoded when they are asked for.

    Attributes:
        records: of the split.
        layout: of the squares, of which the middle is wanted.
    """

    records: Records
    layout: Layout

    def __getitem__(self, wanted: Any) -> np.ndarray:
        """`[..., size, size, 3]`, decoded by threads."""
        with ThreadPool(os.cpu_count()) as pool:
            positions = np.arange(len(self.rows))[wanted].tolist()
            images = pool.map(self.square, positions, chunksize=4)
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def picture(self, position: int) -> Image.Image:
        """One of them as it is, RGB.

        Raises:
            InputError: it can no longer be read.
        """
        row = int(self.rows[position])
        try:
            return decode(self.records[row])
        except BadImageError as error:
            raise InputError(f"{self.records.prepared}: picture {row}: {error}") from error

    def square(self, position: int) -> np.ndarray:
        """The middle of one of them: `[size, size, 3]` uint8.

        Raises:
            InputError: it can no longer be read.
        """
        image = square(self.picture(position), self.layout.short_side, self.layout.stored)
        return centre(image, self.size)


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
