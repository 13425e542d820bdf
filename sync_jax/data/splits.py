"""The three disjoint parts of the evaluation protocol: train, calibration and test."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.info import Dataset, Images

_ROWS = 4096  # moved at once


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples.

    Attributes:
        images: `[n, ...]`.
        labels: `[n]` int32.
        index: `[n]` int64, each example's position in the official split that it comes from.
    """

    images: Images
    labels: np.ndarray
    index: np.ndarray


def calibration_size(section: ConfigDict, num_train: int) -> int:
    """How many examples of the official training split are held out.

    Args:
        section: `data`; its calibration_size, where 0 stands for a tenth.
        num_train: examples of that split.
    """
    size: int = section.calibration_size
    return size or round(num_train / 10)


def load_train_and_calibration(
    dataset: Dataset, section: ConfigDict, *, decode: bool = False
) -> tuple[Part, Part]:
    """The official training split, divided: to train on, and to choose thresholds on.

    Args:
        dataset: prepared.
        section: `data`, which says how it is divided.
        decode: see `Dataset.load`.

    Raises:
        InputError: the dataset is damaged.
    """
    images, labels = dataset.load("train", decode=decode)
    kept, held_out = stratified_split(
        labels, holdout=calibration_size(section, len(labels)), seed=section.split_seed
    )
    train, calibration = _divided(images, kept, held_out)
    return Part(train, labels[kept], kept), Part(calibration, labels[held_out], held_out)


def load_test(dataset: Dataset, *, decode: bool = False) -> Part:
    """The official test split. Read it once, when nothing is left to decide.

    Args:
        dataset: prepared.
        decode: see `Dataset.load`.

    Raises:
        InputError: there is none, or it is damaged.
    """
    images, labels = dataset.load("test", decode=decode)
    return Part(images, labels, np.arange(len(labels)))


def _divided(images: Images, kept: np.ndarray, held_out: np.ndarray) -> tuple[Images, Images]:
    """The rows of each; what is kept of an array stays in it, for two would be twice the memory."""
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

    Class sizes in the hold-out are by largest remainder: the exact share rounded down, then one
    more for the classes with the largest fractional parts, the smaller label first among equals,
    until there are `holdout`.

    The result depends on `labels`, `holdout` and `seed` alone. It uses neither JAX nor the
    algorithms of NumPy's `Generator`, which may change between versions, but only PCG64's stream of
    integers, which NumPy guarantees not to change: a model calibrated with one version finds the
    same calibration split with another.

    Args:
        labels: `[n]` integers.
        holdout: how many examples to hold out, from 0 to n.
        seed: a non-negative integer.

    Returns:
        The indices of the examples kept, `[n - holdout]`, and held out, `[holdout]`; int64, sorted.

    Raises:
        ValueError: labels are not a vector of integers, or holdout or seed is out of range.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"labels must be integers of shape [n], got {labels.dtype} of shape {labels.shape}"
        )
    if not 0 <= holdout <= len(labels):
        raise ValueError(f"holdout must be from 0 to {len(labels)}, got {holdout}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
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
