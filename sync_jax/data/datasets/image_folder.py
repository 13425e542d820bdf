"""The user's own pictures: a folder per class.

    folder/<class>/<picture>                 a fifth of each class becomes the test split
    folder/train/<class>/..., folder/test/<class>/...
                                             the test split as given; also called val or validation

Where there are train, val and test, val joins train: the calibration split is held out of both.
"""

import functools
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.images import SUFFIXES
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import Listing, Picture, is_picture
from sync_jax.data.prepare.download import check_folder
from sync_jax.data.prepare.pictures import PictureDataset
from sync_jax.data.prepare.staging import Log, expand
from sync_jax.data.splits import stratified_split
from sync_jax.errors import InputError

_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_TEST_SHARE = 5  # one in so many, where the tree has no split folders


class ImageFolder(PictureDataset):
    """Pictures of a folder per class, prepared in `data_dir/image_folder/<folder>/<version>`.

    Attributes:
        pictures: the folder.
    """

    VERSION = "2.0.0"
    LARGEST_SIDE = 512  # photographs of a telephone's size would take minutes an epoch to decode

    def __init__(self, section: ConfigDict):
        """See `PictureDataset`; raises an InputError where the section names no folder."""
        if not section.folder:
            raise InputError(
                "config.data.folder is empty; say --config.data.folder=FOLDER, which holds one "
                "folder of pictures per class"
            )
        super().__init__(section)
        self.pictures = expand(section.folder)
        word = re.sub(r"[^A-Za-z0-9_-]+", "-", self.pictures.name)[:40] or "root"
        path = os.fsencode(os.path.realpath(self.pictures))
        self.key = f"{word}-{hashlib.sha256(path).hexdigest()[:8]}"
        self.folder = self.root / self.name / self.key / self.VERSION

    @functools.cached_property
    def _tree(self) -> "Tree":
        """The pictures: found once, however often they are asked for."""
        return scan(self.pictures)

    @functools.cached_property
    def _digest(self) -> str:
        return self._tree.listing.digest()

    def _expected(self) -> DatasetInfo | None:
        """Upper bounds of the sizes, for a file may turn out to be no picture."""
        if not os.path.isdir(self.pictures):
            return None
        listing = self._tree.listing
        counts = {split: len(pictures) for split, pictures in listing.splits.items()}
        return self._describe(listing.class_names, counts)

    def _check_source(self, digest: str) -> None:
        # The pictures need not be there any more; if they are, they must be the same.
        if os.path.isdir(self.pictures) and self._digest != digest:
            raise InputError(
                f"the pictures in {self.pictures} have changed since they were prepared; delete "
                f"{self.folder} to prepare them again, or name another --config.data.data_dir"
            )

    def _find(self, log: Log) -> Listing:
        tree = self._tree
        counts = ", ".join(f"{len(files):,} for {x}" for x, files in tree.listing.splits.items())
        ignored = f"; {tree.ignored:,} other files ignored" if tree.ignored else ""
        log(f"{len(tree.listing.class_names)} classes in {self.pictures}: {counts}{ignored}")
        return tree.listing

    def _absent(self) -> str:
        return f"`{self.command} --config.data.folder=FOLDER` prepares it"


class Tree(NamedTuple):
    """The pictures of a folder.

    Attributes:
        listing: the pictures; classes are the folders' names, sorted; paths in each split too.
        ignored: number of files that are no pictures by their names.
    """

    listing: Listing
    ignored: int


def scan(folder: Path) -> Tree:
    """Finds the pictures of a folder; opens none.

    Raises:
        InputError: it cannot be read, or is not laid out as above; says what was found.
    """
    where = f"config.data.folder={str(folder)!r}"
    check_folder(folder, where)
    try:
        splits, stray = _split_folders(folder)
        found = {
            split: [entry for path in paths for entry in _pictures(folder, path)]
            for split, paths in splits.items()
        }
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror} ({error.filename})") from error
    classes = sorted({name for entries in found.values() for name, *_ in entries})
    pictures = {
        split: sorted((path, name) for name, path, _ in entries if path)
        for split, entries in found.items()
    }
    ignored = sum(count for entries in found.values() for *_, count in entries)
    if len(classes) < 2:
        loose = f"{stray} pictures directly in it and " if stray else ""
        raise InputError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    for split, entries in pictures.items():
        empty = sorted(set(classes) - {name for _, name in entries})
        if empty:
            raise InputError(
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
    return Tree(Listing(tuple(classes), listed), ignored)


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
        raise InputError(
            f"{where}: a class has {smallest} pictures; at least {_TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )
    kept, held_out = stratified_split(labels, holdout=len(files) // _TEST_SHARE, seed=0)
    return {"train": [files[i] for i in kept], "test": [files[i] for i in held_out]}
