"""The user's own pictures: a folder per class.

    <class>/<picture>                      a fifth of each class becomes the test split, when read
    train/<class>/..., test/<class>/...    the test split as given
    train/..., val/...                     val is the test split
    train/..., val/..., test/...           val is the calibration split, whole
    train/..., calibration/..., test/...   the same

Folders that look like splits and are called otherwise are refused, never taken for classes.
"""

import dataclasses
import functools
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.images import SUFFIXES
from sync_jax.data.info import DatasetInfo, contents, few
from sync_jax.data.prepare import copies
from sync_jax.data.prepare.archives import Listing, Picture, is_picture
from sync_jax.data.prepare.pictures import MOMENTS, SPLITS, PictureDataset, mean_and_std
from sync_jax.data.prepare.staging import Log, check_folder, damage, expand
from sync_jax.data.splits import grouped_split
from sync_jax.errors import InputError

# Hugging Face's names of splits, and ours for calibration.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("calibration", "calib", "cal"), "calibration"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_FILLERS = ("set", "data", "dataset", "images", "pictures")  # beside a split's name
# What programs and file systems leave; hidden folders are left out too.
_LITTER = ("__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found")
_TEST_SHARE = 5  # one in so many, where the tree has no split folders


class ImageFolder(PictureDataset):
    """Pictures of a folder per class, prepared in `data_dir/image_folder/<folder>/<version>`."""

    VERSION = "2.1.0"  # since then the test split is held out when pictures are read
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
        return scan(self.pictures, drop_unknown=self.section.unknown_classes == "drop")

    @functools.cached_property
    def _digest(self) -> str:
        return self._tree[0].digest()

    def info(self) -> DatasetInfo | None:
        """See `Dataset.info`."""
        info = super().info()
        if info is None or not self.is_prepared():
            return info
        with damage(self.folder / MOMENTS):
            moments = np.load(self.folder / MOMENTS, allow_pickle=False)
            mean, std = mean_and_std(moments[self._division["train"][1]])
        note = "; ".join(filter(None, (info.note, *self._notes())))
        return dataclasses.replace(info, mean=mean, std=std, note=note)

    def _notes(self) -> Iterator[str]:
        """Lines on pictures that are left out, and on folders that may be groups."""
        for split, size in self._stored.items():
            kept = sum(len(rows) for of, rows in self._division.values() if of == split)
            if kept < size:
                yield (
                    f"{size - kept:,} pictures of {split} are left out: they equal pictures of "
                    "another split, or are of one of its groups"
                )
        if not self.section.group:
            table = self._table
            places = {
                (label, os.path.dirname(file))
                for label, file in zip(table.label, table.file, strict=True)
            }
            of_class = Counter(label for label, _ in places)
            # In each split a class has a folder.
            nested = sorted(x for label, x in places if of_class[label] > len(self._stored))
            if nested:
                yield (
                    f"pictures of a class lie in several folders ({few(nested)}); if those of one "
                    "folder depend on each other, as of a patient, say --config.data.group=parent"
                )

    def _expected(self) -> DatasetInfo | None:
        """Upper bounds of the sizes, for a file may turn out to be no picture."""
        if not os.path.isdir(self.pictures):
            return None
        listing, _ = self._tree
        return self._describe(listing.class_names, _counts(listing))

    @functools.cached_property
    def _table(self) -> copies.Table:
        table = self._pictures
        if table is None:  # this version writes one
            raise InputError(f"{self.folder} is damaged: it lacks {copies.TABLE}; delete it")
        return table

    @functools.cached_property
    def _division(self) -> dict[str, tuple[str, np.ndarray]]:
        """Whole groups are on one side: test keeps its own, then calibration, and train the rest.

        Without a folder for test a fifth of the rest is held out.
        """
        stored = {split: np.flatnonzero(self._table.split == split) for split in self._stored}
        taken, found = np.empty(0, np.int64), {}
        for split in reversed(stored):
            groups = self._groups[stored[split]]
            found[split] = split, np.flatnonzero(~np.isin(groups, taken))
            taken = np.union1d(taken, groups)
        if "test" not in found:
            rest = found["train"][1]
            labels, groups = (x[stored["train"]][rest] for x in (self._table.label, self._groups))
            size = len(rest) // _TEST_SHARE
            kept, held_out = grouped_split(labels, groups, holdout=size, seed=0)
            found |= {"train": ("train", rest[kept]), "test": ("train", rest[held_out])}
        return {split: found[split] for split in SPLITS if split in found}

    @functools.cached_property
    def _groups(self) -> np.ndarray:
        """The group of every picture in pictures.csv: equal ones, and what `data.group` joins."""
        table, duplicates = self._table, self.section.duplicates
        if duplicates == "refuse" and (report := copies.report(table)["equal"])["groups"]:
            raise InputError(
                f"config.data.duplicates='refuse': {report['pictures']:,} pictures of "
                f"{self.pictures} are equal to others, such as {few(report['files'][0])}; all are "
                f"in {self.folder / copies.REPORT}"
            )
        keys = [] if duplicates == "keep" else [table.pixels]
        if self.section.group:
            keys.append(group_names(self.section.group, table))
        return copies.linked(*keys) if keys else np.arange(len(table.file))

    def groups(self, split: str) -> np.ndarray | None:
        """See `Dataset.groups`; None where no two pictures are linked."""
        if len(np.unique(self._groups)) == len(self._groups):
            return None
        of, rows = self._division[split]
        return self._groups[self._table.split == of][rows]

    def _check_source(self, digest: str) -> None:
        # The pictures need not be there any more; if they are, they must be the same.
        if os.path.isdir(self.pictures) and self._digest != digest:
            raise InputError(
                f"the pictures in {self.pictures} have changed since they were prepared, or an "
                f"earlier version divided them otherwise; delete {self.folder} to prepare them "
                "again, or name another --config.data.data_dir"
            )

    def _find(self, log: Log) -> Listing:
        listing, others = self._tree
        counts = _counts(listing)
        ignored = f"; {others:,} other files ignored" if others else ""
        found = contents(listing.class_names, counts, listing.note)
        log(f"{self.pictures} has {found}{ignored}")
        return listing

    def _absent(self) -> str:
        return f"`{self.command} --config.data.folder=FOLDER` prepares it"


def scan(folder: Path, *, drop_unknown: bool = False) -> tuple[Listing, int]:
    """Finds the pictures of a folder; opens none.

    Classes are the names of the folders for training, sorted, and pictures are sorted by path.
    Those of other classes are refused or dropped. Also returns the number of files that are left
    out: no pictures by their names, hidden, or in no class folder.
    """
    where = f"config.data.folder={str(folder)!r}"
    pictures, inside, others = _walk_checked(folder, where)
    roots = _split_folders(where, pictures, inside)
    found = {split: _of_classes(pictures, root) for split, root in roots.items()}
    stray = len(pictures) - sum(map(len, found.values()))
    classes = sorted(inside[roots["train"]])  # also empty ones
    if len(classes) < 2:
        loose = f"{stray} pictures in no class folder and " if stray else ""
        raise InputError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    notes = [
        note
        for split in found
        for note in _reconcile(where, found, split, roots, classes, drop_unknown=drop_unknown)
    ]
    label = {name: i for i, name in enumerate(classes)}
    listed = {
        split: [Picture(path, label[name], folder / path) for path, name in sorted(entries)]
        for split, entries in found.items()
    }
    if "test" not in listed:
        _check_hold_out(listed["train"], where)
    called = [
        f"the {split} split is the folder {root!r}"
        for split, root in roots.items()
        if root and not root.lower().startswith(split)
    ]
    return Listing(tuple(classes), listed, "; ".join((*called, *notes))), others + stray


def _walk_checked(folder: Path, where: str) -> tuple[list[str], dict[str, list[str]], int]:
    check_folder(folder, where)
    try:
        return _walk(folder)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror} ({error.filename})") from error


def _of_classes(pictures: Sequence[str], root: str) -> list[tuple[str, str]]:
    """The pictures in the class folders of a root, with their classes."""
    start, found = root and root + os.sep, []
    for path in pictures:
        name, below, _ = path.removeprefix(start).partition(os.sep)
        if path.startswith(start) and below:
            found.append((path, name))
    return found


def labelled_pictures(
    folder: Path, class_names: Sequence[str], *, drop_unknown: bool = False
) -> tuple[list[Picture], str]:
    """The pictures of a folder by the names of known classes, with a note on what is left out.

    Of a folder with split folders, those of its test split if it has one, else all.
    """
    where = f"config.data.folder={str(folder)!r}"
    pictures, inside, _ = _walk_checked(folder, where)
    roots = _split_folders(where, pictures, inside)
    chosen = [roots["test"]] if "test" in roots else [*roots.values()]
    entries = sorted(entry for root in chosen for entry in _of_classes(pictures, root))
    label = {name: i for i, name in enumerate(class_names)}
    unknown = sorted({name for _, name in entries} - label.keys())
    if unknown and not drop_unknown:
        raise InputError(
            f"{where} has classes that the run does not know, {few(unknown)}; its own are "
            f"{few(class_names)}. --config.data.unknown_classes=drop leaves their pictures out"
        )
    found = [Picture(x, label[name], folder / x) for x, name in entries if name in label]
    if not found:
        raise InputError(f"{where} has no picture of the run's classes, {few(class_names)}")
    notes = [f"of its folder {roots['test']!r}"] if "test" in roots else []
    if unknown:
        notes.append(f"without {len(entries) - len(found):,} of unknown classes ({few(unknown)})")
    if missing := label.keys() - {name for _, name in entries}:
        notes.append(f"none of {few(sorted(missing))}")
    return found, ", ".join(notes)


def _reconcile(
    where: str,
    found: dict[str, list[tuple[str, str]]],
    split: str,
    roots: Mapping[str, str],
    classes: Sequence[str],
    *,
    drop_unknown: bool,
) -> Iterator[str]:
    """Compares a split's classes with those of train; yields notes on what it lacks or drops."""
    entries, root = found[split], roots[split]
    present = {name for _, name in entries}
    missing, unknown = (sorted(x) for x in ({*classes} - present, present - {*classes}))
    if missing and split == "train":
        raise InputError(
            f"{where}: the folder {os.path.join(root, missing[0])} has no picture"
            f"{f', nor has {few(missing[1:])}' if missing[1:] else ''}; known are "
            f"{', '.join(SUFFIXES)}"
        )
    if not present & {*classes}:
        raise InputError(f"{where}: {root} has no picture of any class of {roots['train']}")
    if unknown and not drop_unknown:
        raise InputError(
            f"{where}: {root} has classes that {roots['train']} has not, {few(unknown)}; "
            "--config.data.unknown_classes=drop leaves their pictures out"
        )
    if unknown:
        found[split] = [(path, name) for path, name in entries if name in classes]
        yield (
            f"{len(entries) - len(found[split]):,} pictures of {root} are dropped, of unknown "
            f"classes ({few(unknown)})"
        )
    if missing:
        yield f"{root} has no picture of {few(missing)}"


def _walk(folder: Path) -> tuple[list[str], dict[str, list[str]], int]:
    """Lists pictures and, of each folder, the folders in it; counts all other files.

    Paths are relative, the folder's own is "". Links to split and class folders are followed.
    """
    pictures: list[str] = []
    inside: dict[str, list[str]] = {}
    others = 0
    for parent, names, files in os.walk(folder, onerror=_stop, followlinks=True):
        here = os.path.relpath(parent, folder).removeprefix(os.curdir)
        names.sort()
        inside[here] = []
        for name in names:
            path = os.path.join(parent, name)
            if name.startswith(".") or name in _LITTER:
                others += sum(len(files) for _, _, files in os.walk(path))
            elif not os.path.islink(path) or (
                here.count(os.sep) == 0 and not os.path.samefile(path, parent)
            ):
                inside[here].append(name)
        names[:] = inside[here]
        for name in files:
            path = os.path.join(parent, name)
            if is_picture(name) and os.path.isfile(path):  # no pipe, no link to nothing
                pictures.append(os.path.join(here, name))
            else:
                others += 1
    return pictures, inside, others


def _stop(error: OSError) -> NoReturn:
    raise error


def _split_folders(
    where: str, pictures: list[str], inside: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Finds the folder of each split; {"train": ""} where the class folders lie at the top."""
    flat: Counter[str] = Counter()  # pictures directly in a folder
    deep: dict[str, Counter[str]] = defaultdict(Counter)  # and in the folders in it
    for path in pictures:
        top, *rest = path.split(os.sep)
        if len(rest) > 1:
            deep[top][rest[0].lower()] += 1
        elif rest:
            flat[top] += 1
    named = _named_splits(inside[""])
    unknown = [name for name in inside[""] if name not in named and (flat[name] or deep[name])]
    nested = [name for name in inside[""] if deep[name].total() > flat[name]]
    if named and (not unknown or len({*named.values()}) > 1 or {*named} & {*nested}):
        return {
            split: _unwrapped(name, inside)
            for split, name in _understood(where, named, unknown).items()
        }
    shared = [x for x, n in Counter(x for name in nested for x in deep[name]).items() if n > 1]
    # Where each holds one folder, as <class>/images/, none is a split: that has two classes.
    if shared and max(len(deep[name]) for name in nested) > 1:
        raise _unclear(where, f"{few(nested)} hold folders of the same names, {few(shared)}")
    return {"train": ""}


def _named_splits(names: Sequence[str]) -> dict[str, str]:
    """The splits that names of sibling folders say: train, Test_set, a_train beside a_test."""
    said = {}
    for name in names:
        words = re.findall(r"[^\W\d_]+", name.lower())
        rest = tuple(word for word in words if word not in {*_SPLITS, *_FILLERS})
        splits = [_SPLITS[word] for word in words if word in _SPLITS]
        if len(splits) == 1:
            said[name] = splits[0], rest
    alike = Counter(rest for _, rest in said.values())
    return {name: split for name, (split, rest) in said.items() if not rest or alike[rest] > 1}


def _understood(where: str, named: Mapping[str, str], unknown: Sequence[str]) -> dict[str, str]:
    """The folder of each split, in their order, from the splits that folders' names say."""
    folders: dict[str, str] = {}
    for name, split in named.items():
        if split in folders:
            raise _unclear(where, f"{folders[split]} and {name} both name the {split} split")
        folders[split] = name
    if unknown:
        raise _unclear(where, f"beside {few([*named])} lie folders of other names, {few(unknown)}")
    if "train" not in folders:
        raise _unclear(where, f"{few([*named])} name splits, and none is for training")
    if "val" in folders and {"calibration", "test"} <= folders.keys():
        raise _unclear(where, f"{folders['val']} has no use beside calibration and test")
    if "val" in folders:
        folders["calibration" if "test" in folders else "test"] = folders.pop("val")
    return {split: folders[split] for split in SPLITS if split in folders}


def _unclear(where: str, problem: str) -> InputError:
    return InputError(
        f"{where}: {problem}. Splits must be called by names that are understood: "
        f"{', '.join(_SPLITS)}. Rename the folders, or move those that are not splits. If they are "
        "classes, put them, or links to them, into FOLDER/train/"
    )


def _unwrapped(name: str, inside: Mapping[str, Sequence[str]]) -> str:
    """A folder's path, or that of the one folder in it of its own name, as archives unpack."""
    inner = os.path.join(name, name)
    return inner if inside[name] == [name] and inside[inner] else name


def _check_hold_out(pictures: list[Picture], where: str) -> None:
    smallest = int(np.bincount([picture.label for picture in pictures]).min())
    if smallest < _TEST_SHARE:
        raise InputError(
            f"{where}: a class has {smallest} pictures; at least {_TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )


def _counts(listing: Listing) -> dict[str, int]:
    """The sizes of the splits, as far as the names of the files tell."""
    counts = {split: len(pictures) for split, pictures in listing.splits.items()}
    if "test" not in counts:
        counts["test"] = counts["train"] // _TEST_SHARE
        counts["train"] -= counts["test"]
    return counts


def group_names(group: str, table: copies.Table) -> np.ndarray:
    """The names of the pictures' groups, as `config.data.group` says.

    'parent' is the folder of a picture. Anything else is a regular expression that is searched in
    its path: its first part in parentheses is the group, or all of the match. A path without a
    match is a group of its own.
    """
    if group == "parent":
        return np.asarray([os.path.dirname(file) for file in table.file])
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise InputError(f"config.data.group={group!r} is no regular expression: {error}") from None
    matches = [pattern.search(file) for file in table.file]
    if not any(matches):
        raise InputError(
            f"config.data.group={group!r} matches no path, such as {table.file[0]}; it is a "
            "regular expression, or 'parent'"
        )
    return np.asarray(
        [
            f"={match[1 if pattern.groups else 0]}" if match else f"-{file}"
            for match, file in zip(matches, table.file, strict=True)
        ]
    )
