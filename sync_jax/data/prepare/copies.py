"""Copies among pictures: equal pixels, nearly equal ones, and what stands with two labels.

`pictures.csv` in a prepared folder has a line per kept picture, in the order of the records:

    split, file, label, sha256 (of its bytes), pixels (SHA-256 of the decoded ones), dhash

and the other columns of a table that lay beside the pictures, as they were.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sync_jax.data.images import decode
from sync_jax.data.info import few
from sync_jax.runtime.files import write_text
from sync_jax.runtime.page import figures, heading, page, paragraph

TABLE, REPORT, GALLERY = "pictures.csv", "data_report.json", "data_report.html"
COLUMNS = ("split", "file", "label", "sha256", "pixels", "dhash")
NEAR = 2  # differing bits of each half of the hash, at most
_NAMED = 200  # groups in the report, of each kind
_SHOWN, _SHOWN_OF_GROUP = 60, 4  # in the gallery
_COUNTS = ("groups", "pictures", "across_splits", "two_labels", "within_calibration")


class Print(NamedTuple):
    """What tells a picture from others; SHA-256 in hexadecimal."""

    sha256: str  # of the file
    pixels: str  # of size and decoded pixels
    dhash: str  # 128 bits in hexadecimal


def fingerprint(data: bytes, image: Image.Image, middle: np.ndarray) -> Print:
    """The fingerprint of a file, its picture in RGB and the square from the picture's middle."""
    size = f"{image.width}x{image.height}:".encode()
    return Print(
        hashlib.sha256(data).hexdigest(),
        hashlib.sha256(size + image.tobytes()).hexdigest(),
        f"{dhash(middle):032x}",
    )


def dhash(square: np.ndarray) -> int:
    """Difference hash (Krawetz, 2013) of `[side, side, 3]` uint8: 128 bits.

    The first 64 say whether a place of an 8 x 8 grid is darker than its neighbour to the right, the
    last whether it is darker than that below. Pictures of one colour have 0.
    """
    grey = Image.fromarray(square).convert("L")
    wide, high = (
        np.asarray(grey.resize(size, Image.Resampling.BILINEAR)) for size in ((9, 8), (8, 9))
    )
    bits = np.concatenate([wide[:, :-1] < wide[:, 1:], high[:-1] < high[1:]])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


class Table(NamedTuple):
    """The columns of pictures.csv for some splits, one after the other."""

    split: np.ndarray
    file: np.ndarray
    label: np.ndarray  # int64
    sha256: np.ndarray
    pixels: np.ndarray
    dhash: np.ndarray  # [n, 2] uint64
    extra: Mapping[str, np.ndarray]  # the user's own columns


def write_table(folder: Path, rows: Iterable[Sequence[Any]], extra: Sequence[str] = ()) -> None:
    """Writes pictures.csv; the rows are as `COLUMNS`, and then as `extra`."""
    with (folder / TABLE).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*COLUMNS, *extra))
        writer.writerows(rows)


def read_table(folder: Path) -> Table | None:
    """Reads pictures.csv; None where an earlier version wrote none."""
    try:
        with (folder / TABLE).open(newline="") as file:
            header, *rows = csv.reader(file)
    except FileNotFoundError:
        return None
    columns = dict(zip(header, map(np.asarray, zip(*rows, strict=True)), strict=True))
    split, name, label, sha256, pixels, dhash = (columns.pop(name) for name in COLUMNS)
    halves = np.asarray([(int(x[:16], 16), int(x[16:], 16)) for x in dhash], np.uint64)
    return Table(split, name, label.astype(np.int64), sha256, pixels, halves, columns)


def linked(*keys: np.ndarray) -> np.ndarray:
    """Groups `[n]` of examples that share a key, or share one with others that do: from 0 on.

    Groups are numbered in the order of their first examples.
    """
    ends = []
    for key in keys:
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        ends.append((order[:-1][same], order[1:][same]))
    return _components(len(keys[0]), np.concatenate(ends, axis=1))


def nearly_equal(hashes: np.ndarray) -> np.ndarray:
    """Groups `[n]` of pictures whose hashes `[n, 2]` are near in both halves, or are so linked.

    Two bits cannot differ in each of three parts of a half, so that only hashes which share a part
    of the first are compared.
    """
    distinct, inverse = np.unique(hashes, axis=0, return_inverse=True)
    ends = [np.empty((2, 0), np.int64)]
    for shift, bits in ((0, 21), (21, 21), (42, 22)):
        part = (distinct[:, 0] >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
        order = np.argsort(part, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
            for i, one in enumerate(bucket[:-1]):
                others = bucket[i + 1 :]
                distances = np.bitwise_count(distinct[one] ^ distinct[others])
                found = others[(distances <= NEAR).all(axis=1)]
                ends.append(np.stack([np.full(len(found), one), found]))
    return _components(len(distinct), np.concatenate(ends, axis=1))[inverse]


def _components(size: int, ends: np.ndarray) -> np.ndarray:
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), shape=(size, size))
    found = connected_components(graph, directed=False)[1]
    _, first, inverse = np.unique(found, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def report(table: Table) -> dict[str, Any]:
    """Counts and names of groups of equal and of nearly equal pictures.

    A kind has the number of `groups` of two pictures or more, of the `pictures` in them, of groups
    `across_splits` and with `two_labels`, of those `within_calibration` (of two there or more), and
    the files of the first groups, those across splits before others.
    """
    equal = linked(table.pixels)
    # Pictures of one colour have the same hash, whatever the colour: only equal ones are near.
    flat = ~table.dhash.any(axis=1)
    near = -1 - np.arange(len(equal))
    near[~flat] = nearly_equal(table.dhash[~flat])
    return {
        "pictures": len(equal),
        "equal": _kind(table, equal),
        "nearly_equal": _kind(table, linked(equal, near), apart=equal),
    }


def _kind(table: Table, groups: np.ndarray, apart: np.ndarray | None = None) -> dict[str, Any]:
    """The report on groups; with `apart`, on those that hold several of its groups."""
    order = np.argsort(groups, kind="stable")
    found = []
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        if len(members) > 1 and (apart is None or len({*apart[members]}) > 1):
            splits = table.split[members].tolist()
            found.append((len({*splits}) > 1, len({*table.label[members]}) > 1, splits, members))
    found.sort(key=lambda entry: (not entry[0], not entry[1]))
    return {
        "groups": len(found),
        "pictures": sum(len(members) for *_, members in found),
        "across_splits": sum(across for across, *_ in found),
        "two_labels": sum(two for _, two, *_ in found),
        "within_calibration": sum(x.count("calibration") > 1 for *_, x, _ in found),
        "files": [table.file[members].tolist() for *_, members in found[:_NAMED]],
    }


def describe(found: Mapping[str, Any]) -> str:
    """One line on a report, '' where there are no copies."""
    parts = []
    for kind, what in {"equal": "equal", "nearly_equal": "nearly equal"}.items():
        known = found[kind]
        if known["groups"]:
            details = [
                f"{known[name]:,} {words}"
                for name, words in {
                    "across_splits": "across splits",
                    "two_labels": "with two labels",
                    "within_calibration": "within calibration",
                }.items()
                if known[name]
            ]
            inside = f" ({', '.join(details)})" if details else ""
            parts.append(
                f"{known['pictures']:,} pictures are {what} to others, in {known['groups']:,} "
                f"groups{inside}, such as {few(known['files'][0])}"
            )
    return f"{'; '.join(parts)}; all are in {REPORT}" if parts else ""


def write_report(
    folder: Path, found: Mapping[str, Any], read: Mapping[str, Callable[[], bytes]]
) -> None:
    """Writes data_report.json, and data_report.html, which shows the first groups of each kind.

    `read` has, by the names of `shown`, what reads a picture. The page holds its pictures, loads
    nothing and runs no script.
    """
    write_text(folder / REPORT, json.dumps(found, indent=1) + "\n")
    sections = []
    for kind, title in {"equal": "Equal pictures", "nearly_equal": "Nearly equal pictures"}.items():
        rows = [
            figures([(decode(read[name]()), name) for name in group[:_SHOWN_OF_GROUP]])
            for group in found[kind]["files"][:_SHOWN]
        ]
        counts = ", ".join(f"{found[kind][x]:,} {x.replace('_', ' ')}" for x in _COUNTS)
        text = f"{counts}; shown are {len(rows)} groups."
        sections += [heading(title), paragraph(text), *rows]
    write_text(folder / GALLERY, page("Copies among the pictures", *sections))


def shown(found: Mapping[str, Any]) -> set[str]:
    """The names of the pictures in the gallery of a report."""
    groups = [
        group for kind in ("equal", "nearly_equal") for group in found[kind]["files"][:_SHOWN]
    ]
    return {name for group in groups for name in group[:_SHOWN_OF_GROUP]}
