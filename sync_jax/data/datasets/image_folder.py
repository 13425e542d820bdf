"""The user's own pictures; `prepare.layouts` says how they may lie."""

import dataclasses
import functools
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.info import DatasetInfo, contents, few
from sync_jax.data.prepare import copies
from sync_jax.data.prepare.archives import Listing
from sync_jax.data.prepare.layouts import SPLITS, TEST_SHARE, Source, scan
from sync_jax.data.prepare.pictures import MOMENTS, PictureDataset, mean_and_std
from sync_jax.data.prepare.staging import Log, damage, expand
from sync_jax.data.splits import grouped_split
from sync_jax.errors import InputError


class ImageFolder(PictureDataset):
    """Labelled pictures, prepared in `data_dir/image_folder/<folder>/<version>`."""

    VERSION = "2.2.0"  # since then the columns of a table beside the pictures are kept
    LARGEST_SIDE = 512  # photographs of a telephone's size would take minutes an epoch to decode

    def __init__(self, section: ConfigDict):
        if not section.folder:
            raise InputError(
                "config.data.folder is empty; say --config.data.folder=FOLDER, which holds one "
                "folder of pictures per class (or a table or an archive, see docs/pictures.md)"
            )
        super().__init__(section)
        self.pictures = source_of(section).path
        word = re.sub(r"[^A-Za-z0-9_-]+", "-", self.pictures.name)[:40] or "root"
        path = os.fsencode(os.path.realpath(self.pictures))
        self.key = f"{word}-{hashlib.sha256(path).hexdigest()[:8]}"
        self.folder = self.root / self.name / self.key / self.VERSION

    @functools.cached_property
    def _tree(self) -> tuple[Listing, int]:
        return scan(source_of(self.section))

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
        if not os.path.exists(self.pictures):
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
            size = len(rest) // TEST_SHARE
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
        if os.path.exists(self.pictures) and self._digest != digest:
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


def source_of(section: ConfigDict) -> Source:
    """Reads the source of labelled pictures from a section `data`."""
    return Source(
        expand(section.folder),
        section.file_column,
        section.label_column,
        drop_unknown=section.unknown_classes == "drop",
    )


def _counts(listing: Listing) -> dict[str, int]:
    """The sizes of the splits, as far as the names of the files tell."""
    counts = {split: len(pictures) for split, pictures in listing.splits.items()}
    if "test" not in counts:
        counts["test"] = counts["train"] // TEST_SHARE
        counts["train"] -= counts["test"]
    return counts


def group_names(group: str, table: copies.Table) -> np.ndarray:
    """The names of the pictures' groups, as `config.data.group` says.

    'parent' is the folder of a picture, and the name of a column of the user's table what stands
    there; where that is empty a picture is a group of its own. Anything else is a regular
    expression that is searched in its path: its first part in parentheses is the group, or all of
    the match. A path without a match is a group of its own.
    """
    if group in table.extra:
        values = table.extra[group]
        return np.where(values == "", np.char.add("-", table.file), np.char.add("=", values))
    if group == "parent":
        folders = np.asarray([os.path.dirname(file) for file in table.file])
        if (
            len({*zip(folders, table.label, strict=True)})
            == len({*folders})
            == len({*zip(table.split, table.label, strict=True)})
        ):
            raise InputError(
                "config.data.group='parent': each class lies in one folder, which would be one "
                "group; put the pictures of a group into a folder of their own, "
                "<class>/<group>/<picture>"
            )
        return folders
    try:
        pattern = re.compile(group)
    except re.error as error:
        raise InputError(f"config.data.group={group!r} is no regular expression: {error}") from None
    matches = [pattern.search(file) for file in table.file]
    if not any(matches):
        columns = f"a column ({few([*table.extra])}), " if table.extra else ""
        raise InputError(
            f"config.data.group={group!r} matches no path, such as {table.file[0]}; it is {columns}"
            "'parent', or a regular expression"
        )
    return np.asarray(
        [
            f"={match[1 if pattern.groups else 0]}" if match else f"-{file}"
            for match, file in zip(matches, table.file, strict=True)
        ]
    )
