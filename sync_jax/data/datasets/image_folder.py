"""The user's own pictures: a folder per class.

    folder/<class>/<picture>                 a fifth of each class becomes the test split
    folder/train/<class>/..., folder/test/<class>/...
                                             the test split as given; also called val or validation

Where there are train, val and test, val joins train: the calibration split is held out of both.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from sync_jax.data.images import SUFFIXES
from sync_jax.data.prepare.archives import Listing, Picture, is_picture
from sync_jax.data.prepare.download import DataError
from sync_jax.data.prepare.records import PictureBuilder
from sync_jax.data.splits import stratified_split

NAME = "image_folder"
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_TEST_SHARE = 5  # one in so many, where the tree has no split folders


@dataclasses.dataclass(frozen=True)
class Tree:
    """The pictures of a folder.

    Attributes:
        folder: absolute.
        listing: the pictures; classes are the folders' names, sorted; paths in each split too.
        ignored: files that are no pictures by their names.
    """

    folder: Path
    listing: Listing
    ignored: int

    def describe(self) -> str:
        """One line."""
        splits = self.listing.splits
        counts = ", ".join(f"{len(files):,} for {split}" for split, files in splits.items())
        ignored = f"; {self.ignored:,} other files ignored" if self.ignored else ""
        return f"{len(self.listing.class_names)} classes in {self.folder}: {counts}{ignored}"


def scan(folder: Path) -> Tree:
    """Finds the pictures of a folder; opens none.

    Raises:
        DataError: it cannot be read, or is not laid out as above; says what was found.
    """
    where = f"config.data.folder={str(folder)!r}"
    if not os.path.isdir(folder):  # unlike Path's, these never raise
        exists = os.path.exists(folder)
        raise DataError(f"{where} {'is not a folder' if exists else 'does not exist'}")
    try:
        splits, stray = _split_folders(folder)
        found = {
            split: [entry for path in paths for entry in _pictures(folder, path)]
            for split, paths in splits.items()
        }
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror} ({error.filename})") from error
    classes = sorted({name for entries in found.values() for name, *_ in entries})
    pictures = {
        split: sorted((path, name) for name, path, _ in entries if path)
        for split, entries in found.items()
    }
    ignored = sum(count for entries in found.values() for *_, count in entries)
    if len(classes) < 2:
        loose = f"{stray} pictures directly in it and " if stray else ""
        raise DataError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    for split, entries in pictures.items():
        empty = sorted(set(classes) - {name for _, name in entries})
        if empty:
            raise DataError(
                f"{where}: {split} has no picture of {', '.join(map(repr, empty[:5]))}"
                f"{' and others' if len(empty) > 5 else ''}; known are {', '.join(SUFFIXES)}"
            )
    label = {name: i for i, name in enumerate(classes)}
    files = {split: [(p, label[name]) for p, name in pictures[split]] for split in pictures}
    if "test" not in files:
        files = _hold_out(files["train"], len(classes), where)
    listed = {
        split: [Picture(path, number, folder / path) for path, number in entries]
        for split, entries in files.items()
    }
    return Tree(folder, Listing(tuple(classes), listed), ignored)


def _split_folders(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The folders that hold class folders, by split, and how many pictures lie beside them."""
    below = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    folders = [path for path in below if path.is_dir()]
    stray = sum(path.suffix.lower() in SUFFIXES for path in below if not path.is_dir())
    train = [path for path in folders if path.name.lower() in _TRAIN]
    test = [path for path in folders if path.name.lower() in _TEST]
    if not train or len(train) + len(test) < len(folders):
        return {"train": [folder]}, stray
    if not test:
        return {"train": train}, stray
    # Of test and val, test is the test split.
    chosen = [path for path in test if path.name.lower().startswith("test")] or test
    rest = [path for path in test if path not in chosen]
    return {"train": train + rest, "test": chosen}, stray


def _pictures(folder: Path, root: Path) -> Iterator[tuple[str, str, int]]:
    """(class, path relative to the folder, 0) of each picture; ("", 1) for other files' paths."""
    for class_folder in sorted(root.iterdir()):
        if class_folder.name.startswith(".") or not class_folder.is_dir():
            continue
        yield class_folder.name, "", 0  # the class, even when it is empty
        for parent, names, files in os.walk(class_folder):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                if name.startswith("."):
                    continue
                file = os.path.join(parent, name)
                if is_picture(name) and os.path.isfile(file):  # no pipe, and no link to nothing
                    yield class_folder.name, os.path.relpath(file, folder), 0
                else:
                    yield class_folder.name, "", 1


def _hold_out(
    files: list[tuple[str, int]], num_classes: int, where: str
) -> dict[str, list[tuple[str, int]]]:
    """A fifth of each class for test: the same one every time."""
    labels = np.asarray([label for _, label in files])
    smallest = int(np.bincount(labels, minlength=num_classes).min())
    if smallest < _TEST_SHARE:
        raise DataError(
            f"{where}: a class has {smallest} pictures; at least {_TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )
    kept, held_out = stratified_split(labels, holdout=len(files) // _TEST_SHARE, seed=0)
    return {"train": [files[i] for i in kept], "test": [files[i] for i in held_out]}


def key(folder: Path) -> str:
    """The name under which a folder's pictures are prepared."""
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:40] or "root"
    path = os.fsencode(os.path.realpath(folder))
    return f"{word}-{hashlib.sha256(path).hexdigest()[:8]}"


class ImageFolder(PictureBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Pictures of a folder per class."""

    VERSION = tfds.core.Version("2.0.0")
    largest_side = 512  # photographs of a telephone's size would take minutes an epoch to decode
