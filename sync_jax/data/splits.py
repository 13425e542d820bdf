"""The three disjoint parts of the evaluation protocol: train, calibration and test."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.info import Dataset, DatasetInfo, Images

_ROWS = 4096  # moved at once


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples: images `[n, ...]`, labels `[n]` int32, and positions in their official split."""

    images: Images
    labels: np.ndarray
    index: np.ndarray


def part_sizes(section: ConfigDict, info: DatasetInfo) -> tuple[int, int]:
    """The sizes of the training and the calibration part.

    The calibration part is an official split where there is one. Otherwise it is held out of the
    training split, and 0 in the `data` section stands for a tenth.
    """
    if info.num_calibration:
        return info.num_train, info.num_calibration
    held_out: int = section.calibration_size or round(info.num_train / 10)
    return info.num_train - held_out, held_out


def load_train_and_calibration(
    dataset: Dataset, section: ConfigDict, *, decode: bool = False
) -> tuple[Part, Part]:
    """Reads the examples to train on, and those to choose thresholds on: see `part_sizes`."""
    info = dataset.info()
    assert info is not None
    if info.num_calibration:
        train, calibration = (_whole(dataset, x, decode) for x in ("train", "calibration"))
        return train, calibration
    images, labels = dataset.load("train", decode=decode)
    kept, held_out = stratified_split(
        labels, holdout=part_sizes(section, info)[1], seed=section.split_seed
    )
    to_train, to_calibrate = _divided(images, kept, held_out)
    return Part(to_train, labels[kept], kept), Part(to_calibrate, labels[held_out], held_out)


def load_test(dataset: Dataset, *, decode: bool = False) -> Part:
    """Reads the official test split. Do it once, when nothing is left to decide."""
    return _whole(dataset, "test", decode)


def _whole(dataset: Dataset, split: str, decode: bool) -> Part:
    images, labels = dataset.load(split, decode=decode)
    return Part(images, labels, np.arange(len(labels)))


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
