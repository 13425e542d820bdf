"""Dividing a split in two, reproducibly."""

import numpy as np


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
