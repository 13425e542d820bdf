"""Accuracy and calibration of predicted probabilities."""

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.sample import (
    FloatArray,
    IntArray,
    Sample,
    expected_totals,
    group_ties,
    real,
)


def _checked(probabilities: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    p = real(probabilities, "probabilities")
    y = np.asarray(labels)
    if p.ndim != 2 or p.size == 0:
        raise ValueError(f"probabilities must have shape [n, classes], not empty, got {p.shape}")
    if not ((p >= 0) & (p <= 1)).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must lie in [0, 1], each row summing to 1, without NaN")
    if y.shape != p.shape[:1]:
        raise ValueError(f"labels has shape {y.shape} but probabilities {p.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels must be integers in [0, {p.shape[1]})")
    return p, y.astype(np.int64)


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of the examples whose most probable class (the first, in a tie) is the label."""
    p, y = _checked(probabilities, labels)
    return float((p.argmax(axis=1) == y).mean())


def negative_log_likelihood(
    probabilities: ArrayLike, labels: ArrayLike, *, floor: float = 0.0
) -> float:
    """Mean of -ln(probability of the label), in nats.

    Probabilities smaller than `floor`, in [0, 1], count as it; at 0 the mean may be infinite. Take
    the softmax in float64: in float32 a confident mistake has probability 0.
    """
    p, y = _checked(probabilities, labels)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    label_p = np.maximum(p[np.arange(y.size), y], floor)
    with np.errstate(divide="ignore"):
        return float(-np.log(label_p).mean())


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance to the one-hot label, summed over classes: in [0, 2] (Brier 1950)."""
    p, y = _checked(probabilities, labels)
    return float(((p**2).sum(axis=1) - 2 * p[np.arange(y.size), y] + 1).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationError:
    """Expected calibration error; arrays [bins that are not empty], ascending in confidence."""

    value: float
    binning: str  # "width" or "mass"
    bins: int  # as asked for
    confidence: FloatArray  # mean confidence of each bin
    accuracy: FloatArray
    count: IntArray  # examples in each bin


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    binning: Literal["width", "mass"] = "width",
    bins: int = 15,
) -> CalibrationError:
    """Top-label expected calibration error: mean |accuracy - confidence| of each example's bin.

    Bins by "width" are equally wide on (0, 1] and closed on the right (Guo et al. 2017). Bins by
    "mass" are equally large, up to one example (Nixon et al. 2019); a tie cut by a bin's edge
    counts with its mean accuracy on both sides.
    """
    p, y = _checked(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, correct = p.max(axis=1), (p.argmax(axis=1) == y).astype(np.float64)
    n = confidence.size
    descending = -np.sort(-confidence)
    if binning == "width":
        edges = np.linspace(0, 1, bins + 1)[1:-1]
        ends = n - np.searchsorted(descending[::-1], edges, side="right")[::-1]
    elif binning == "mass":
        ends = np.arange(1, bins) * n // bins
    else:
        raise ValueError(f"binning {binning!r} is neither 'width' nor 'mass'")
    ends = np.unique(np.concatenate(([0], ends, [n])))  # what occurs twice is an empty bin
    count = np.diff(ends)
    n_correct = expected_totals(group_ties(Sample(confidence, correct)))  # among the k first
    correct_sum = np.diff(np.append(0.0, n_correct)[ends])
    confidence_sum = np.add.reduceat(descending, ends[:-1])
    return CalibrationError(
        value=float(np.abs(correct_sum - confidence_sum).sum() / n),
        binning=binning,
        bins=bins,
        confidence=(confidence_sum / count)[::-1],
        accuracy=(correct_sum / count)[::-1],
        count=count[::-1],
    )
