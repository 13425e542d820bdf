"""Datasets of encoded pictures, kept as records, and as squares for what does not decode.

A prepared folder holds, beside what TFDS puts there and what prepare.records reads:

    sync_jax.json           the facts of `DatasetInfo`, and the digest of what it was made from
    pictures.csv            the names and fingerprints of the pictures, see prepare.copies
    data_report.json, .html copies among them, counted and shown
    moments_train.npy       `[n, 2, 3]`, of each training picture the channels' means and squares
    bad_files.txt           pictures that cannot be decoded, and why; only if there are any
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from ml_collections import ConfigDict
from tensorflow_datasets.core import dataset_builder, example_serializer, naming

from sync_jax.data.images import BadImageError, Layout, decode, reduced, square
from sync_jax.data.info import DatasetInfo, Pictures, contents
from sync_jax.data.prepare import copies
from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.layouts import SPLITS
from sync_jax.data.prepare.records import (
    DecodedPictures,
    DecodedSquares,
    Records,
    Squares,
    make_squares,
    missing_bytes,
    open_squares,
    squares_path,
)
from sync_jax.data.prepare.staging import (
    Log,
    Prepared,
    build,
    check_disk,
    check_folder,
    damage,
    disk_errors,
    expand,
    incomplete_prefix,
    progress_bar,
    remove_leftovers,
    tfds_info,
)
from sync_jax.data.preprocessing import Preprocessing
from sync_jax.errors import InputError
from sync_jax.runtime.console import printable
from sync_jax.runtime.files import flush, write_text

INFO, BAD_FILES, MOMENTS = "sync_jax.json", "bad_files.txt", "moments_train.npy"
SHARD = 1024  # pictures in a file: of ImageNet's, 110 MB
# ImageNet's mean and deviation, which the field's codes use for the published datasets.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_MEASURED = 64  # pixels of the squares that means and deviations are computed of
_OVERHEAD = 1.05  # records take a little more than what is in them
_RESERVE = 10_000_000  # bytes


class PictureDataset(Prepared):
    """A dataset of encoded pictures; subclasses list them."""

    LAST = INFO
    LARGEST_SIDE: ClassVar[int | None] = None  # pixels of a picture's short side; made of longer

    def __init__(self, section: ConfigDict):
        super().__init__(section)
        self.layout = Layout.of(section)

    @property
    def scratch(self) -> Path:
        """A folder for temporary files, removed in the end."""
        return self.root / f"{incomplete_prefix(self.key)}unpacked"

    def info(self) -> DatasetInfo | None:
        """See `Dataset.info`."""
        path = self.folder / INFO
        if not self.is_prepared():
            return self._expected()
        with damage(path):
            known = json.loads(path.read_text())
            info = self._describe(
                tuple(known["class_names"]),
                {split: len(rows) for split, (_, rows) in self._division.items()},
                tuple(known["mean"]),
                tuple(known["std"]),
            )
            info = dataclasses.replace(info, note=known.get("note", ""))  # of earlier versions none
            digest = known["digest"]
        self._check_source(digest)
        return info

    def _describe(
        self,
        class_names: tuple[str, ...],
        counts: dict[str, int],
        mean: tuple[float, ...] = MEAN,
        std: tuple[float, ...] = STD,
    ) -> DatasetInfo:
        size, stored = self.layout.size, self.layout.stored
        return DatasetInfo(
            name=self.name,
            num_classes=len(class_names),
            image_shape=(size, size, 3),
            class_names=class_names,
            mean=mean,
            std=std,
            num_train=counts["train"],
            num_test=counts["test"],
            num_calibration=counts.get("calibration", 0),
            stored_shape=(stored, stored, 3),
            squares_bytes=missing_bytes(
                self.folder, self.layout, self._stored if self.is_prepared() else counts
            ),
        )

    @property
    def _stored(self) -> dict[str, int]:
        """The numbers of pictures in the prepared folder, by split of the records."""
        known = json.loads((self.folder / INFO).read_text())
        return {x: known[f"num_{x}"] for x in SPLITS if f"num_{x}" in known}

    @functools.cached_property
    def _division(self) -> dict[str, tuple[str, np.ndarray]]:
        """Where each split is: in which split of the records, and its rows there."""
        return {split: (split, np.arange(count)) for split, count in self._stored.items()}

    @functools.cached_property
    def _pictures(self) -> copies.Table | None:
        """pictures.csv; None where an earlier version has prepared the folder."""
        with damage(self.folder / copies.TABLE):
            table = copies.read_table(self.folder)
            if table is not None and len(table.file) != sum(self._stored.values()):
                raise ValueError("it has not a line for each picture")
            return table

    def digest(self) -> str:
        """See `Dataset.digest`: of labels and pixels, '' where an earlier version prepared it."""
        table, digest = self._pictures, hashlib.sha256()
        if table is None:
            return ""
        for split, (of, rows) in self._division.items():
            of_split = np.flatnonzero(table.split == of)[rows]
            pairs = zip(
                table.label[of_split].tolist(), table.pixels[of_split].tolist(), strict=True
            )
            digest.update("".join(f"{split},{label},{x}\n" for label, x in pairs).encode())
        return digest.hexdigest()

    def files(self, split: str) -> np.ndarray | None:
        """See `Dataset.files`; None where an earlier version has prepared it."""
        of, rows = self._division[split]
        table = self._pictures
        return None if table is None else table.file[table.split == of][rows]

    def reports(self) -> list[Path]:
        """See `Dataset.reports`."""
        files = (self.folder / name for name in (copies.REPORT, copies.GALLERY))
        return [path for path in files if path.is_file()]  # an earlier version wrote none

    def _expected(self) -> DatasetInfo | None:
        """The info before it is prepared."""
        raise NotImplementedError

    def _check_source(self, digest: str) -> None:
        """Raises an InputError where pictures that can be looked at are no longer the same."""

    def load(self, split: str, *, decode: bool = False) -> tuple[Pictures, np.ndarray]:
        """See `Dataset.load`."""
        self._require()
        info = self.info()
        assert info is not None
        self._require(split, info.splits)
        self._verify(*((self._division[split][0],) if decode else ()))
        every = {x: Records(self.folder, x) for x in self._stored}
        split, rows = self._division[split]
        labels = every[split].labels()
        if labels.max() >= info.num_classes:
            raise InputError(
                f"{self.folder} is damaged: {split} has labels beyond its classes; delete it"
            )
        labels = labels[rows]
        if decode:
            return DecodedPictures(rows, self.layout.size, every[split], self.layout), labels
        if info.squares_bytes:
            self._verify(*every)
            for records in every.values():
                records[0]  # where they cannot be opened nothing is written

            def make() -> None:
                for records in every.values():
                    make_squares(records, self.layout, log=self._say)

            if problem := self._make(make):
                self._say(f"{problem}; without squares, pictures are decoded each time")
                return DecodedSquares(rows, self.layout.size, every[split], self.layout), labels
        path = squares_path(self.folder, self.layout, split)
        self._verify_files(path.parent, lambda name: name == path.name)
        return Squares(rows, self.layout.size, open_squares(every[split], self.layout)), labels

    def _build(self, source: Listing, log: Log) -> None:
        with disk_errors(self.root):
            digest = source.digest()
        work = self.root / f"{incomplete_prefix(self.key)}{digest[:16]}"
        remove_leftovers(self.root, self.key, keep=(work, self.scratch))
        written = 0
        if work.is_dir():
            log("going on with a preparation that was stopped")
            written = sum(path.stat().st_size for path in work.glob("*"))
        needed = int(source.num_bytes() * _OVERHEAD) + _RESERVE - written
        check_disk(self.root, needed, f"to prepare {self.key}")
        builder: PictureBuilder = build(
            self, lambda staging: PictureBuilder(self, source, digest, work, data_dir=staging)
        )
        for leftover in (work, self.scratch):
            shutil.rmtree(leftover, ignore_errors=True)
        if line := copies.describe(builder.copies):
            log(line)
        bad, total = builder.bad_files, sum(map(len, source.splits.values()))
        for line in bad[:5]:
            log(f"cannot be read, left out: {line}")
        if bad:
            log(f"{len(bad):,} of {total:,} pictures left out; all are in {BAD_FILES}")


class PublishedPictures(PictureDataset):
    """A published dataset, which the user must fetch; subclasses find its pictures."""

    NUM_CLASSES: ClassVar[int]
    NUM_TRAIN: ClassVar[int]
    NUM_TEST: ClassVar[int]
    NEEDED: ClassVar[str]  # what the user's folder must hold, in words
    HOW: ClassVar[str]  # where that can be had

    def find(self, folder: Path, log: Log) -> Listing:
        """Finds the pictures in a folder that holds `NEEDED`."""
        raise NotImplementedError

    def info(self) -> DatasetInfo | None:
        """See `Dataset.info`."""
        info = super().info()
        return info and dataclasses.replace(info, mean=MEAN, std=STD)

    def _expected(self) -> DatasetInfo:
        names = tuple(map(str, range(self.NUM_CLASSES)))
        return self._describe(names, {"train": self.NUM_TRAIN, "test": self.NUM_TEST})

    def _find(self, log: Log) -> Listing:
        if not self.section.source:
            self._require()
        folder = expand(self.section.source)
        check_folder(
            folder, f"data.source={self.section.source!r}", f"; it must hold {self.NEEDED}"
        )
        log(f"looking for the pictures in {folder}")
        with disk_errors(self.root):
            listing = self.find(folder, log)
        counts = {split: len(pictures) for split, pictures in listing.splits.items()}
        log(contents(listing.class_names, counts))
        if counts != {"train": self.NUM_TRAIN, "test": self.NUM_TEST}:
            log(f"published are {self.NUM_TRAIN:,} and {self.NUM_TEST:,}")
        return listing

    def _absent(self) -> str:
        return (
            f"put into a folder {self.NEEDED} ({self.HOW}) and prepare it with "
            f"`{self.command} --config.data.source=FOLDER`"
        )


@dataclasses.dataclass(frozen=True)
class Shard:
    """A finished file of records."""

    path: Path
    labels: list[int]
    bad: list[str]  # a line for each picture that was left out
    rows: list[list[str]]  # of each kept one file, fingerprint and extra columns
    moments: list[list[list[float]]]  # `[n, 2, 3]`, each channel's mean and mean square
    num_bytes: int


class PictureBuilder(dataset_builder.FileReaderBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes encoded pictures as they are, in the listed order, once each has been decoded.

    Files of `SHARD` pictures are finished one by one in the folder `work`, which outlives the
    process: a preparation that was stopped goes on after the last finished one. TFDS's own
    generators begin anew, and keep large splits in temporary files that need TensorFlow.
    """

    def __init__(
        self, dataset: PictureDataset, listing: Listing, digest: str, work: Path, *, data_dir: str
    ):
        self.name = re.sub(r"\W", "_", dataset.name)  # of its files
        self.VERSION = tfds.core.Version(dataset.VERSION)
        self._listing, self._digest, self._work = listing, digest, work
        self._largest_side = dataset.LARGEST_SIDE
        self._shards: dict[str, list[Shard]] = {}
        self.copies: dict[str, Any] = {}
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
        labels, bad, rows, moments, num_bytes = [], [], [], [], 0
        temporary = path.with_suffix(".incomplete")
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        load = functools.partial(load_picture, largest_side=self._largest_side)
        for picture, loaded in zip(pictures, pool.map(load, pictures, chunksize=8), strict=True):
            if isinstance(loaded, str):
                bad.append(f"{picture.name}: {loaded}")
                continue
            data, own, fingerprint = loaded
            example = {"image": data, "label": picture.label, "file": _text(picture.name)}
            record = serializer.serialize_example(self.info.features.encode_example(example))
            writer.write(record)
            labels.append(picture.label)
            extra = [printable(_text(value)) for value in picture.extra]
            rows.append([printable(_text(picture.name)), *fingerprint, *extra])
            num_bytes += len(record)
            moments.append(own.tolist())
        writer.close()
        flush(temporary)
        temporary.replace(path)
        shard = Shard(path, labels, bad, rows, moments, num_bytes)
        # From now on it is finished.
        known = dataclasses.asdict(shard) | {"path": str(path)}
        write_text(path.with_suffix(".json"), json.dumps(known))
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
        # Other splits than train may lack a class.
        needed = {picture.label for picture in self._listing.splits[split]} | (
            {*range(len(self._listing.class_names))} if split == "train" else set()
        )
        lost = sorted(needed - {*labels})
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
        moments = np.asarray([x for shard in shards["train"] for x in shard.moments])
        np.save(folder / MOMENTS, moments)
        mean, std = mean_and_std(moments)
        bad = self.bad_files
        if bad:
            (folder / BAD_FILES).write_text("".join(f"{printable(line)}\n" for line in bad))
        copies.write_table(folder, self._rows(), self._listing.columns)
        table = copies.read_table(folder)
        assert table is not None
        self.copies = copies.report(table)
        every = (x for pictures in self._listing.splits.values() for x in pictures)
        wanted, named = copies.shown(self.copies), ((printable(_text(x.name)), x) for x in every)
        copies.write_report(folder, self.copies, {k: x.read for k, x in named if k in wanted})
        known = {
            "class_names": [_text(name) for name in self._listing.class_names],
            "mean": mean,
            "std": std,
            **{f"num_{split}": count for split, count in counts.items()},
            "note": _text(self._listing.note),
            "bad_files": len(bad),
            "digest": self._digest,
        }
        (folder / INFO).write_text(json.dumps(known, indent=1) + "\n")

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        """The rows of pictures.csv."""
        for split, shards in self._shards.items():
            for shard in shards:
                for label, (file, *rest) in zip(shard.labels, shard.rows, strict=True):
                    yield (split, file, label, *rest)

    @property
    def bad_files(self) -> list[str]:
        """A line for each picture that was left out."""
        return [line for shards in self._shards.values() for shard in shards for line in shard.bad]


def _text(name: str) -> str:
    """A file's name, which may hold any bytes, as UTF-8 can write it."""
    return os.fsencode(name).decode(errors="replace")


def load_picture(
    picture: Picture, *, largest_side: int | None
) -> tuple[bytes, np.ndarray, copies.Print] | str:
    """Reads a picture and makes sure that it can be decoded.

    One with a longer short side is resized to `largest_side`, as a JPEG. Returns its bytes, the
    mean of each channel and of its square `[2, 3]`, and its fingerprint; or what is wrong with it.
    """
    try:
        data = picture.read()
        image = decode(data)
    except BadImageError as error:
        return str(error)
    except PermissionError as error:
        return error.strerror or str(error)
    except OSError as error:  # a disk that fails must not pass for thousands of bad pictures
        raise InputError(f"{picture.path} cannot be read: {error.strerror or error}") from error
    short = min(image.size)
    size = min(short, _MEASURED)
    middle = square(image, size, size)
    pixels, fingerprint = middle / 255.0, copies.fingerprint(data, image, middle)
    data = reduced(image, largest_side) or data
    moments = np.stack([pixels.mean(axis=(0, 1)), (pixels**2).mean(axis=(0, 1))])
    return data, moments, fingerprint


@dataclasses.dataclass(frozen=True)
class FilePictures(Pictures):
    """Pictures in files, decoded as if they had been prepared; what cannot be read is black."""

    files: Sequence[Picture]
    preprocessing: Preprocessing
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # by position: what is wrong

    @property
    def shape(self) -> tuple[int, ...]:
        """`[n, size, size, channels]`."""
        return len(self.rows), *self.preprocessing.shape

    def __getitem__(self, wanted: Any) -> np.ndarray:
        with ThreadPool(os.cpu_count()) as pool:
            images = pool.map(self._square, self.rows[wanted].tolist(), chunksize=4)
        return np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)

    def _square(self, row: int) -> np.ndarray:
        try:
            return self.preprocessing.picture(self.files[row].read())
        except (BadImageError, OSError) as error:
            self.bad[row] = str(error)
            return np.zeros(self.shape[1:], np.uint8)


def mean_and_std(moments: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pictures of `moments` `[n, 2, 3]`."""
    mean, squares = moments.mean(axis=0)
    return tuple(mean.tolist()), tuple(np.sqrt(np.maximum(squares - mean**2, 1e-6)).tolist())


def _finished(path: Path) -> Shard | None:
    """A file that an earlier process has finished."""
    known = path.with_suffix(".json")
    if not (path.is_file() and known.is_file()):  # killed processes may have moved it on already
        return None
    return Shard(**json.loads(known.read_text()) | {"path": path})
