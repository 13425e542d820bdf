"""Layouts of labelled pictures: how folders, archives and tables are taken for splits and classes.

    <class>/<picture>                      a fifth of each class becomes the test split, when read
    train/<class>/..., test/<class>/...    the test split as given
    train/..., val/...                     val is the test split
    train/..., val/..., test/...           val is the calibration split, whole
    train/..., calibration/..., test/...   the same
    metadata.csv beside the pictures       labels, splits and other columns, as of Hugging Face
    labels.csv                             a table of paths and labels by itself

All of it may also lie in a .zip or .tar. Folders that look like splits and are called otherwise are
refused, never taken for classes.
"""

import dataclasses
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sync_jax.data.images import SUFFIXES
from sync_jax.data.info import few
from sync_jax.data.prepare import tables
from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.copies import COLUMNS
from sync_jax.data.prepare.trees import Tree, read_tree
from sync_jax.errors import InputError, suggestion

SPLITS = ("train", "calibration", "test")  # not every dataset has a calibration split
TEST_SHARE = 5  # one in so many is held out for test, where nothing names a test split
# Hugging Face's names of splits, and ours for calibration.
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("calibration", "calib", "cal"), "calibration"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_FILLERS = ("set", "data", "dataset", "images", "pictures")  # beside a split's name
# The usual names of a table's columns, in any case.
_FILE_COLUMNS = (
    *("file_name", "file", "filename", "path", "file_path", "filepath"),
    *("image", "image_path", "image_file"),
)
_LABEL_COLUMNS = ("label", "class", "class_name", "label_name", "category", "target")


@dataclasses.dataclass(frozen=True)
class Source:
    """A source of labelled pictures, by the fields of these names in the section `data`."""

    path: Path  # a folder, an archive or a table
    file_column: str = ""  # of a table; empty: by its usual names
    label_column: str = ""
    drop_unknown: bool = False

    @property
    def where(self) -> str:
        """The words for it in messages."""
        return f"config.data.folder={str(self.path)!r}"


@dataclasses.dataclass(frozen=True)
class _Found:
    """Pictures with the names of their classes, by split."""

    splits: dict[str, list[tuple[Picture, str]]]
    called: Mapping[str, str]  # what the user calls each split: its folder, or its name in a table
    classes: Sequence[str]
    others: int = 0  # files that are left out
    columns: tuple[str, ...] = ()  # of `Picture.extra`
    note: str = ""


def scan(source: Source) -> tuple[Listing, int]:
    """Finds labelled pictures; opens none.

    Classes are those of the training split, sorted, and pictures are sorted by path. Those of other
    classes are refused or dropped. Also returns the number of files that are left out: no pictures
    by their names, hidden, in no class folder, or not in the table.

    Raises:
        InputError: the source cannot be read, or is not understood; it says why.
    """
    found = _find(source)
    where, classes = source.where, found.classes
    notes = [found.note] if found.note else []
    for split in found.splits:
        notes += _reconcile(source, found, split)
    label = {name: i for i, name in enumerate(classes)}
    listed = {
        split: [picture._replace(label=label[name]) for picture, name in entries]
        for split, entries in found.splits.items()
    }
    if "test" not in listed:
        _check_hold_out(listed["train"], where)
    return Listing(tuple(classes), listed, "; ".join(notes), found.columns), found.others


def labelled_pictures(source: Source, class_names: Sequence[str]) -> tuple[list[Picture], str]:
    """Finds the pictures of known classes, with a note on what is left out.

    Where there are splits those of the test split if there is one, else all.
    """
    where, found = source.where, _find(source)
    chosen = [found.splits["test"]] if "test" in found.splits else [*found.splits.values()]
    entries = [entry for each in chosen for entry in each]
    label = {name: i for i, name in enumerate(class_names)}
    unknown = sorted({name for _, name in entries} - label.keys())
    if unknown and not source.drop_unknown:
        raise InputError(
            f"{where} has classes that the run does not know, {few(unknown)}; its own are "
            f"{few(class_names)}. --config.data.unknown_classes=drop leaves their pictures out"
        )
    known = [picture._replace(label=label[name]) for picture, name in entries if name in label]
    if not known:
        raise InputError(f"{where} has no picture of the run's classes, {few(class_names)}")
    notes = [f"of its {found.called['test']!r}"] if "test" in found.splits else []
    if unknown:
        notes.append(f"without {len(entries) - len(known):,} of unknown classes ({few(unknown)})")
    if missing := label.keys() - {name for _, name in entries}:
        notes.append(f"none of {few(sorted(missing))}")
    return known, ", ".join(notes)


def _find(source: Source) -> _Found:
    path, where = source.path, source.where
    if path.suffix.lower() in tables.SUFFIXES and os.path.isfile(path):
        try:
            table = _Table.of(path.name, path.read_bytes(), source)
        except OSError as error:
            raise InputError(f"{where} cannot be read: {error.strerror or error}") from error
        if table.labels is None:
            raise InputError(
                f"{where} has no column of labels, only {few(table.names)}; name it by "
                "--config.data.label_column"
            )
        full = [path.parent / name for name in table.files]
        there = {x for x in full if os.path.isfile(x)}
        files = zip(table.files, full, strict=True)
        pictures = [Picture(name, -1, y) if y in there else None for name, y in files]
        return _by_table(table, pictures, where)
    tree, note = read_tree(path, where), ""
    if len(top := tree.inside[""]) == 1 and not _named_splits(top):
        inner = tree.below(top[0])  # as archives unpack
        if len(inner.inside[""]) > 1 or _named_splits(inner.inside[""]) or inner.tables:
            tree, note = inner, f"all is in its folder {top[0]!r}"
    found = _by_tables(tree, source) if tree.tables else _by_folders(tree, where)
    return dataclasses.replace(found, note="; ".join(filter(None, (note, found.note))))


def _by_folders(tree: Tree, where: str) -> _Found:
    """Splits and classes as the names of folders say."""
    roots = _split_folders(where, [*tree.pictures], tree.inside)
    splits = {split: _of_classes(tree.pictures, root) for split, root in roots.items()}
    stray = len(tree.pictures) - sum(map(len, splits.values()))
    classes = sorted(tree.inside[roots["train"]])  # also empty ones
    if len(classes) < 2:
        loose = f"{stray} pictures in no class folder and " if stray else ""
        raise InputError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    return _Found(splits, roots, classes, tree.others + stray, note=_said(roots, "the folder "))


def _of_classes(pictures: Mapping[str, Picture], root: str) -> list[tuple[Picture, str]]:
    """The pictures in the class folders of a root, sorted by path, with their classes."""
    start, found = root and root + os.sep, []
    for path in sorted(pictures):
        name, below, _ = path.removeprefix(start).partition(os.sep)
        if path.startswith(start) and below:
            found.append((pictures[path], name))
    return found


def _said(called: Mapping[str, str], what: str = "") -> str:
    """A note on splits that the user calls otherwise."""
    return "; ".join(
        f"the {split} split is {what}{name!r}"
        for split, name in called.items()
        if name and not name.lower().startswith(split)
    )


@dataclasses.dataclass(frozen=True)
class _Table:
    """A table of pictures: lists of one length."""

    name: str
    files: list[str]
    labels: list[str] | None
    splits: list[str] | None
    extra: dict[str, list[str]]  # the other columns
    names: tuple[str, ...]  # of all columns

    @classmethod
    def of(cls, name: str, data: bytes, source: Source) -> "_Table":
        """Reads it, and finds the columns by the names that the user gives, or by usual ones."""
        rest, where = tables.read_columns(name, data), f"{source.where}: {name}"
        names = tuple(rest)

        def take(given: str, field: str, usual: Sequence[str]) -> list[str] | None:
            if given and given not in names:
                raise InputError(
                    f"config.data.{field}={given!r}: {name} has no such column"
                    f"{suggestion(given, names)}; it has {few(names)}"
                )
            lowered = {column.lower(): column for column in reversed(rest)}
            found = given or next((lowered[x] for x in usual if x in lowered), "")
            return rest.pop(found) if found else None

        files = take(source.file_column, "file_column", _FILE_COLUMNS)
        if files is None:
            raise InputError(
                f"{where} has no column of files, only {few(names)}; name it by "
                "--config.data.file_column"
            )
        labels = take(source.label_column, "label_column", _LABEL_COLUMNS)
        splits = take("", "", ("split",))
        for what, column in {"file": files, "label": labels, "split": splits}.items():
            if column and "" in column:
                raise InputError(f"{where}: row {column.index('') + 1} has no {what}")
        # What pictures.csv has itself is not kept from another table.
        extra = {x: column for x, column in rest.items() if x not in COLUMNS}
        return cls(name, files, labels, splits, extra, names)


def _by_table(
    table: _Table,
    pictures: Sequence[Picture | None],
    where: str,
    *,
    roots: Mapping[str, str] | None = None,
    others: int = 0,
) -> _Found:
    """Classes and splits as the columns of a table say; without one of splits all is for training.

    `roots` are the folders of the splits, where these are what the column of splits has.
    """
    missing = [x for x, picture in zip(table.files, pictures, strict=True) if picture is None]
    if missing:
        raise InputError(
            f"{where}: {len(missing):,} of the {len(table.files):,} files that {table.name} names "
            f"are not there, such as {few(missing)}"
        )
    names = table.splits or [""] * len(pictures)
    called = roots or {"train": ""}
    if table.splits and not roots:
        said = {name: _SPLITS.get(name.lower(), "") for name in dict.fromkeys(names)}
        unknown = [name for name, split in said.items() if not split]
        called = _understood(where, {x: y for x, y in said.items() if y}, unknown)
    of = {name: split for split, name in called.items()}
    splits: dict[str, list[tuple[Picture, str]]] = {split: [] for split in called}
    extra = zip(*table.extra.values(), strict=True) if table.extra else [()] * len(pictures)
    for picture, label, name, own in zip(pictures, table.labels or (), names, extra, strict=True):
        assert picture is not None
        splits[of[name]].append((picture._replace(extra=tuple(own)), label))
    for entries in splits.values():
        entries.sort(key=lambda entry: entry[0].name)
    present = {label for _, label in splits["train"]}
    if len(present) < 2:
        known = few(sorted(present))
        raise InputError(f"{where}: {table.name} has no two classes for training, only {known}")
    numbers = all(re.fullmatch(r"\d{1,9}", label) for label in present)
    classes = sorted(present, key=(lambda x: (int(x), x)) if numbers else None)
    return _Found(splits, called, classes, others, tuple(table.extra), _said(called))


def _by_tables(tree: Tree, source: Source) -> _Found:
    """As metadata.csv in the root says, or one in the folder of each split.

    Without a column of labels classes are folders, and without one of splits so are splits.
    """
    where, table = source.where, _joined(tree, source)
    listed = {x: tree.pictures[x] for x in table.files if x in tree.pictures}
    others = tree.others + len(tree.pictures) - len(listed)
    pictures = [listed.get(x) for x in table.files]
    if None in pictures:
        return _by_table(table, pictures, where)  # says which
    if table.labels is None:
        found = _by_folders(dataclasses.replace(tree, pictures=listed), where)
        classes = {p.name: name for entries in found.splits.values() for p, name in entries}
        if loose := [x for x in table.files if listed[x].name not in classes]:
            raise InputError(f"{where}: {few(loose)} lie in no class folder, and have no label")
        table = dataclasses.replace(table, labels=[classes[listed[x].name] for x in table.files])
        roots = found.called
    else:
        named = _named_splits(tree.inside[""])
        has_train = "train" in named.values()
        roots = _understood(where, named, ()) if has_train else {"train": ""}
    if table.splits or roots["train"] == "":
        return _by_table(table, pictures, where, others=others)
    splits = []
    for path in table.files:
        root = next((x for x in roots.values() if path.startswith(x + os.sep)), None)
        if root is None:
            raise InputError(
                f"{where}: {path} lies in no folder of a split, {few([*roots.values()])}"
            )
        splits.append(root)
    table = dataclasses.replace(table, splits=splits)
    return _by_table(table, pictures, where, roots=roots, others=others)


def _joined(tree: Tree, source: Source) -> _Table:
    """All tables of a tree as one, with paths from its root."""
    read = []
    for path, file in sorted(tree.tables.items()):
        try:
            table = _Table.of(path, file.read(), source)
        except OSError as error:
            raise InputError(f"{source.where}: {path} cannot be read: {error}") from error
        parts = [(*path.split(os.sep)[:-1], *x.split("/")) for x in table.files]
        files = [os.path.normpath(os.path.join(*x)) for x in parts]
        read.append(dataclasses.replace(table, files=files))
    first = read[0]
    for other in read[1:]:
        if {*other.names} != {*first.names}:
            raise InputError(
                f"{source.where}: {first.name} and {other.name} differ in their columns"
            )

    def all_of(of: Callable[[_Table], list[str] | None]) -> list[str] | None:
        return [x for table in read for x in of(table) or ()] if of(first) is not None else None

    return dataclasses.replace(
        first,
        files=[x for table in read for x in table.files],
        labels=all_of(lambda table: table.labels),
        splits=all_of(lambda table: table.splits),
        extra={name: [x for table in read for x in table.extra[name]] for name in first.extra},
    )


def _reconcile(source: Source, found: _Found, split: str) -> Iterator[str]:
    """Compares a split's classes with those of train; yields notes on what it lacks or drops."""
    where, entries, classes = source.where, found.splits[split], {*found.classes}
    name, train = found.called[split], found.called["train"]
    present = {label for _, label in entries}
    missing, unknown = sorted(classes - present), sorted(present - classes)
    if missing and split == "train":
        raise InputError(
            f"{where}: the folder {os.path.join(name, missing[0])} has no picture"
            f"{f', nor has {few(missing[1:])}' if missing[1:] else ''}; known are "
            f"{', '.join(SUFFIXES)}"
        )
    if not present & classes:
        raise InputError(f"{where}: {name} has no picture of any class of {train}")
    if unknown and not source.drop_unknown:
        raise InputError(
            f"{where}: {name} has classes that {train} has not, {few(unknown)}; "
            "--config.data.unknown_classes=drop leaves their pictures out"
        )
    if unknown:
        kept = [entry for entry in entries if entry[1] in classes]
        found.splits[split] = kept
        yield (
            f"{len(entries) - len(kept):,} pictures of {name} are dropped, of unknown classes "
            f"({few(unknown)})"
        )
    if missing:
        yield f"{name} has no picture of {few(missing)}"


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
    if smallest < TEST_SHARE:
        raise InputError(
            f"{where}: a class has {smallest} pictures; at least {TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )
