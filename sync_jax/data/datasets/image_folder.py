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

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.images import SUFFIXES
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import Listing, Picture, is_picture
from sync_jax.data.prepare.pictures import PictureDataset
from sync_jax.data.prepare.staging import Log, check_folder, expand
from sync_jax.data.splits import stratified_split
from sync_jax.errors import InputError

_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_TEST_SHARE = 5  # one in so many, where the tree has no split folders


class ImageFolder(PictureDataset):
    """Pictures of a folder per class, prepared in `data_dir/image_folder/<folder>/<version>`."""

    VERSION = "2.0.0"
    LARGEST_SIDE = 512  # photographs of a telephone's size would take minutes an epoch to decode

    def __init__(self, section: ConfigDict):
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
    def _tree(self) -> tuple[Listing, int]:
        return scan(self.pictures)

    @functools.cached_property
    def _digest(self) -> str:
        return self._tree[0].digest()

    def _expected(self) -> DatasetInfo | None:
        """Upper bounds of the sizes, for a file may turn out to be no picture."""
        if not os.path.isdir(self.pictures):
            return None
        listing, _ = self._tree
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
        listing, others = self._tree
        counts = ", ".join(f"{len(files):,} for {split}" for split, files in listing.splits.items())
        ignored = f"; {others:,} other files ignored" if others else ""
        log(f"{len(listing.class_names)} classes in {self.pictures}: {counts}{ignored}")
        return listing

    def _absent(self) -> str:
        return f"`{self.command} --config.data.folder=FOLDER` prepares it"


def scan(folder: Path) -> tuple[Listing, int]:
    """Finds the pictures of a folder; opens none.

    Classes are the folders' names, sorted, and pictures are sorted by path. Also returns the number
    of files that are no pictures by their names.
    """
    where = f"config.data.folder={str(folder)!r}"
    check_folder(folder, where)
    found: dict[str, list[tuple[str, str]]] = {}  # (path, class) by split
    names, ignored = set(), 0
    try:
        splits, stray = _split_folders(folder)
        for split, roots in splits.items():
            found[split] = []
            for class_folder in (path for root in roots for path in _folders(root)):
                names.add(class_folder.name)  # also when it is empty
                for file in _files(class_folder):
                    if is_picture(file) and os.path.isfile(file):  # no pipe, no link to nothing
                        found[split].append((os.path.relpath(file, folder), class_folder.name))
                    else:
                        ignored += 1
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror} ({error.filename})") from error
    classes = sorted(names)
    if len(classes) < 2:
        loose = f"{stray} pictures directly in it and " if stray else ""
        raise InputError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    for split, entries in found.items():
        empty = sorted(set(classes) - {name for _, name in entries})
        if empty:
            raise InputError(
                f"{where}: {split} has no picture of {', '.join(map(repr, empty[:5]))}"
                f"{' and others' if len(empty) > 5 else ''}; known are {', '.join(SUFFIXES)}"
            )
    label = {name: i for i, name in enumerate(classes)}
    listed = {
        split: [Picture(path, label[name], folder / path) for path, name in sorted(entries)]
        for split, entries in found.items()
    }
    if "test" not in listed:
        listed = _hold_out(listed["train"], where)
    return Listing(tuple(classes), listed), ignored


def _split_folders(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The folders that hold class folders, by split, and how many pictures lie beside them."""
    folders = _folders(folder)
    stray = sum(is_picture(path.name) and not path.is_dir() for path in folder.iterdir())
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


def _folders(root: Path) -> list[Path]:
    """The folders in one, sorted; hidden ones are none."""
    return [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]


def _files(class_folder: Path) -> Iterator[str]:
    """Paths of all files below a folder but hidden ones."""
    for parent, names, files in os.walk(class_folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in sorted(files) if name[0] != ".")


def _hold_out(pictures: list[Picture], where: str) -> dict[str, list[Picture]]:
    """A fifth of each class for test: the same one every time."""
    labels = np.asarray([picture.label for picture in pictures])
    smallest = int(np.bincount(labels).min())
    if smallest < _TEST_SHARE:
        raise InputError(
            f"{where}: a class has {smallest} pictures; at least {_TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )
    kept, held_out = stratified_split(labels, holdout=len(pictures) // _TEST_SHARE, seed=0)
    return {"train": [pictures[i] for i in kept], "test": [pictures[i] for i in held_out]}
