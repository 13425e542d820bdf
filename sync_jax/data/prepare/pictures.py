"""Datasets of encoded pictures, kept as records, and as squares for what does not decode.

data_dir/<name>/<version>/                  prepared; there if and only if it is complete
data_dir/incomplete-*/                      a preparation in progress or stopped
"""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.images import Layout
from sync_jax.data.info import DatasetInfo, Pictures
from sync_jax.data.prepare.archives import Listing
from sync_jax.data.prepare.download import check_folder
from sync_jax.data.prepare.records import BAD_FILES, INFO, DecodedPictures, PictureBuilder, Records
from sync_jax.data.prepare.squares import (
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
    disk_errors,
    exclusive,
    expand,
    incomplete_prefix,
    remove_leftovers,
)
from sync_jax.errors import InputError
from sync_jax.runtime.console import say

# ImageNet's mean and deviation, which the field's codes use for the published datasets.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SPLITS = ("train", "test")
_OVERHEAD = 1.05  # records take a little more than what is in them
_RESERVE = 10_000_000  # bytes


class PictureDataset(Prepared):
    """A dataset of encoded pictures; subclasses list them.

    Attributes:
        layout: of the squares.
        scratch: a folder for temporary files while preparing.
    """

    LAST = INFO
    LARGEST_SIDE: ClassVar[int | None] = None  # see `PictureBuilder`

    def __init__(self, section: ConfigDict):
        """Reads nothing yet.

        Raises:
            InputError: the sizes of the pictures decrease, or `data_dir` can be no path.
        """
        super().__init__(section)
        self.layout = Layout.of(section)

    @property
    def scratch(self) -> Path:
        """A folder for temporary files, removed in the end."""
        return self.root / f"{incomplete_prefix(self.key)}unpacked"

    def info(self) -> DatasetInfo | None:
        """See `Dataset.info`."""
        path = self.folder / INFO
        if not path.is_file():
            return self._expected()
        try:
            known = json.loads(path.read_text())
            info = self._describe(
                tuple(known["class_names"]),
                {split: known[f"num_{split}"] for split in SPLITS},
                tuple(known["mean"]),
                tuple(known["std"]),
            )
            digest = known["digest"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path} is damaged ({error}); delete {self.folder}") from error
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
            stored_shape=(stored, stored, 3),
            squares_bytes=missing_bytes(self.folder, self.layout, counts),
        )

    def _expected(self) -> DatasetInfo | None:
        """What is known before it is prepared."""
        raise NotImplementedError

    def _check_source(self, digest: str) -> None:
        """Raises an InputError where pictures that can be looked at are no longer the same."""

    def load(self, split: str, *, decode: bool = False) -> tuple[Pictures, np.ndarray]:
        """See `Dataset.load`."""
        if split not in SPLITS:
            raise InputError(f"{self.name} has no split {split!r}; choose from train, test")
        self._require()
        records, labels = self._records(split)
        rows = np.arange(len(labels))
        if decode:
            return DecodedPictures(rows, self.layout.size, records, self.layout), labels
        if not all(squares_path(self.folder, self.layout, x).exists() for x in SPLITS):
            for each in SPLITS:
                self._records(each)[0][0]  # where they cannot be opened nothing is written
            with exclusive(self.root, self.key, self._say):
                make_squares(self.folder, self.layout, SPLITS, log=self._say)
        mapped = open_squares(self.folder, self.layout, split)
        return Squares(rows, self.layout.size, mapped), labels

    def _say(self, line: str) -> None:
        say(f"{self.name}: {line}")

    def _records(self, split: str) -> tuple[Records, np.ndarray]:
        """The records of a split, and their labels."""
        records = Records(self.folder, split)
        labels = records.labels()
        info = self.info()
        if info is not None and labels.max() >= info.num_classes:
            raise InputError(
                f"{self.folder} is damaged: {split} has labels beyond its classes; delete it"
            )
        return records, labels

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
            self,
            lambda staging: PictureBuilder(
                name=re.sub(r"\W", "_", self.name),  # of its files
                version=self.VERSION,
                listing=source,
                digest=digest,
                work=work,
                largest_side=self.LARGEST_SIDE,
                data_dir=staging,
            ),
        )
        for leftover in (work, self.scratch):
            shutil.rmtree(leftover, ignore_errors=True)
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
        """The pictures in a folder that holds `NEEDED`, in the order in which they are kept.

        Raises:
            InputError: it does not.
        """
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
        line = ", ".join(f"{count:,} for {split}" for split, count in counts.items())
        log(f"{len(listing.class_names)} classes: {line}")
        if counts != {"train": self.NUM_TRAIN, "test": self.NUM_TEST}:
            log(f"published are {self.NUM_TRAIN:,} and {self.NUM_TEST:,}")
        return listing

    def _absent(self) -> str:
        return (
            f"put into a folder {self.NEEDED} ({self.HOW}) and prepare it with "
            f"`{self.command} --config.data.source=FOLDER`"
        )
