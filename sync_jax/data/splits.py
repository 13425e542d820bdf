"""The three disjoint parts of the evaluation protocol: train, calibration and test."""

import dataclasses
import re

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.info import Dataset, DatasetInfo, Images
from sync_jax.errors import InputError

_ROWS = 4096  # moved at once


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples: images `[n, ...]`, labels `[n]` int32, and positions in their official split."""

    images: Images
    labels: np.ndarray
    index: np.ndarray
    groups: np.ndarray | None = None  # [n] integers; examples of one number depend on each other


def part_sizes(section: ConfigDict, info: DatasetInfo) -> tuple[int, int]:
    """The sizes of the training and the calibration part.

    The calibration part is a fold of the training split, if the `data` section asks for one, or an
    official split where there is one. Otherwise it is held out of the training split, and 0 in the
    section stands for a tenth.
    """
    if section.fold:
        number, count = parse_fold(section.fold)
        held_out = fold_sizes(info.num_train, count)[number - 1]
        return info.num_train - held_out, held_out
    if info.num_calibration:
        return info.num_train, info.num_calibration
    size: int = section.calibration_size or round(info.num_train / 10)
    return info.num_train - size, size


def load_train_and_calibration(
    dataset: Dataset, section: ConfigDict, *, decode: bool = False
) -> tuple[Part, Part]:
    """Reads the examples to train on, and those to choose thresholds on: see `part_sizes`."""
    info = dataset.info()
    assert info is not None
    if info.num_calibration and not section.fold:
        train, calibration = (_whole(dataset, x, decode) for x in ("train", "calibration"))
        return train, calibration
    images, labels = dataset.load("train", decode=decode)
    groups, seed = dataset.groups("train"), section.split_seed
    if section.fold:
        kept, held_out = fold_split(labels, *parse_fold(section.fold), groups=groups, seed=seed)
    else:
        size = part_sizes(section, info)[1]
        kept, held_out = grouped_split(labels, groups, holdout=size, seed=seed)
    parts = zip((kept, held_out), _divided(images, kept, held_out), strict=True)
    train, calibration = (
        Part(x, labels[rows], rows, None if groups is None else groups[rows]) for rows, x in parts
    )
    return train, calibration


def load_test(dataset: Dataset, *, decode: bool = False) -> Part:
    """Reads the official test split. Do it once, when nothing is left to decide."""
    return _whole(dataset, "test", decode)


def _whole(dataset: Dataset, split: str, decode: bool) -> Part:
    images, labels = dataset.load(split, decode=decode)
    return Part(images, labels, np.arange(len(labels)), dataset.groups(split))


def parse_fold(text: str) -> tuple[int, int]:
    """Reads "2/5", the second of five folds; raises InputError where that is none."""
    found = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    number, count = map(int, found.groups()) if found else (0, 0)
    if not 1 <= number <= count or count < 2:
        raise InputError(f"config.data.fold={text!r} must be such as '2/5', the second of five")
    return number, count


def fold_sizes(size: int, count: int) -> list[int]:
    """The sizes of folds, which differ by one at most."""
    return [(size + i) // count for i in range(count)]


def fold_split(
    labels: np.ndarray, number: int, count: int, *, groups: np.ndarray | None = None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The examples outside and inside one of several disjoint folds, each of them stratified.

    The arguments and the result are as of `grouped_split`; the folds together hold all examples.
    """
    rest = np.arange(len(labels))
    for i in range(number):
        size = len(rest) // (count - i)  # the last takes all
        some = None if groups is None else groups[rest]
        kept, held_out = grouped_split(labels[rest], some, holdout=size, seed=seed)
        fold, rest = rest[held_out], rest[kept]
    return np.setdiff1d(np.arange(len(labels)), fold), fold


def _divided(images: Images, kept: np.ndarray, held_out: np.ndarray) -> tuple[Images, Images]:
    """Divides images; the kept ones of an array stay in it, for two would be twice the memory."""
    if not isinstance(images, np.ndarray):
        return images.subset(kept), images.subset(held_out)
    rest = images[held_out]
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        # They are sorted, so that none of them was overwritten before.
        images[start : start + len(rows)] = images[rows]
    return images[: len(kept)], rest


def stratified_split(
    labels: np.ndarray, *, holdout: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out examples at random, of every class in proportion to its size.

    Class sizes in the hold-out are by largest remainder, the smaller label first among equals. The
    result depends on the arguments alone: of NumPy's generator only PCG64's stream of integers is
    used, which NumPy guarantees not to change.

    Returns:
        The indices of the examples kept, `[n - holdout]`, and held out, `[holdout]`; int64, sorted.
    """
    # Integers throughout: a share computed in floating point could round across a boundary.
    classes, sizes = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(holdout * sizes, max(len(labels), 1))
    quotas[np.argsort(-remainders, kind="stable")[: holdout - quotas.sum()]] += 1
    # Of each class, those with the smallest random keys.
    order = np.argsort(np.random.PCG64(seed).random_raw(len(labels)), kind="stable")
    is_held_out = np.zeros(len(labels), bool)
    for label, quota in zip(classes, quotas, strict=True):
        of_class = order[labels[order] == label]
        is_held_out[of_class[:quota]] = True
    return np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)


def grouped_split(
    labels: np.ndarray, groups: np.ndarray | None, *, holdout: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Holds out whole groups at random, of every class as nearly in proportion as they allow.

    Groups of several examples are taken in random order, each where it brings the classes nearer to
    their shares and the whole is not passed by more than half a group. Examples of no group then
    fill up. A class of two groups or more is in both parts. Without groups of several examples it
    is `stratified_split`, whose other arguments and results it has.

    Args:
        labels: [n] integers.
        groups: [n] integers, equal ones of one group; None: each example is its own.
        holdout: examples to hold out.
        seed: of NumPy's PCG64.
    """
    if groups is None or len(np.unique(groups)) == len(groups):
        return stratified_split(labels, holdout=holdout, seed=seed)
    _, first, group, sizes = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    classes, label = np.unique(labels, return_inverse=True)
    number = np.argsort(np.argsort(first))[group]  # by the first example, whatever they are called
    sizes = sizes[np.argsort(first)]
    keys = np.argsort(np.random.PCG64(seed).random_raw(len(sizes)), kind="stable")
    rows = np.split(np.argsort(number, kind="stable"), np.cumsum(sizes)[:-1])
    several = sizes > 1
    share = holdout / len(labels)
    wanted = share * np.bincount(label[several[number]], minlength=len(classes))
    held = np.zeros(len(classes), np.int64)
    chosen = np.zeros(len(sizes), bool)
    # The second time around, what was taken too early can be given back.
    for each in np.tile(keys[several[keys]], 2):
        found, counts = np.unique(label[rows[each]], return_counts=True)
        sign = -1 if chosen[each] else 1
        before, total = held[found] - wanted[found], (held - wanted).sum()
        gain = np.abs(before).sum() - np.abs(before + sign * counts).sum()
        if gain > 0 and abs(total + sign * sizes[each]) <= max(abs(total), sizes[each] / 2):
            chosen[each], held[found] = not chosen[each], held[found] + sign * counts
    rest = np.flatnonzero(~several[number])
    if len(rest):
        alone = np.bincount(label[rest], minlength=len(classes))
        total = share * np.bincount(label, minlength=len(classes))
        quota = np.clip(np.round(total - held).astype(np.int64), 0, alone)
        order = rest[np.argsort(np.argsort(keys)[number[rest]], kind="stable")]
        for i, count in enumerate(quota):
            chosen[number[order[label[order] == i][:count]]] = True
    for i in range(len(classes)):  # both parts need every class
        of_class = np.unique(number[label == i])
        inside = chosen[of_class]
        if len(of_class) > 1 and (inside.all() or not inside.any()):
            smallest = of_class[np.argmin(sizes[of_class])]
            chosen[smallest] = not chosen[smallest]
    return np.flatnonzero(~chosen[number]), np.flatnonzero(chosen[number])
