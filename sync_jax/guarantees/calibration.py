"""Checks of the arguments, and the calibration split sorted and counted."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def probability(value: float, name: str) -> float:
    """The argument `name` in (0, 1)."""
    if not 0 < value < 1:  # NaN fails too
        raise ValueError(f"{name} must lie in (0, 1), got {value}")
    return float(value)


def real(values: ArrayLike, name: str) -> tuple[NDArray[Any], FloatArray]:
    """The argument `name` as an array, and in float64.

    Other floats than these three are refused: float64 cannot hold a longdouble, and NumPy has no
    successor of a bfloat16; a threshold would accept others than were counted.
    """
    given = np.asarray(values)
    ours = given.dtype.newbyteorder("=")
    if given.dtype.kind not in "biu" and ours not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{name} must hold integers or float16, float32 or float64, got {given.dtype}"
        )
    return given, given.astype(np.float64)


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationSplit:
    """Calibration examples in descending order of confidence.

    Counts are integers throughout: a count recovered from a rate can truncate to one error less,
    and the bound is then none.
    """

    confidence: FloatArray  # [n], descending
    errors: IntArray  # [n + 1], errors among the k first
    dtype: Any  # floating dtype of the confidences as given

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.confidence.size

    def accepted(self, threshold: ArrayLike) -> IntArray:
        """How many have confidence >= threshold; they are the first ones."""
        return np.searchsorted(-self.confidence, -np.asarray(threshold), side="right")

    def strictly_above(self, rank: IntArray) -> tuple[FloatArray, IntArray]:
        """Thresholds that accept what exceeds the (rank + 1)-th largest confidence, and how many.

        The rank + 1-th example only places the threshold and isn't counted, so the accepted are
        independent draws from the accepted part of the distribution, whatever ties there are.
        """
        below = np.append(self.confidence, -np.inf)[rank]
        with np.errstate(over="ignore"):  # the successor of the largest float is infinity
            up = np.nextafter(below.astype(self.dtype), np.array(np.inf, self.dtype))
        return up.astype(np.float64), np.searchsorted(-self.confidence, -below, side="left")


def calibration_split(confidence: ArrayLike, correct: ArrayLike) -> CalibrationSplit:
    """Checks the arguments of these names and sorts them."""
    given, scores = real(confidence, "confidence")
    _, right = real(correct, "correct")
    if scores.ndim != 1:
        raise ValueError(f"confidence must have shape [n], got {scores.shape}")
    if scores.size == 0:
        raise ValueError("confidence is empty")
    if np.isnan(scores).any():
        raise ValueError("confidence contains NaN")
    if right.shape != scores.shape:
        raise ValueError(f"correct has shape {right.shape} but confidence {scores.shape}")
    if not ((right == 0) | (right == 1)).all():  # NaN is neither
        raise ValueError("correct must hold only 0 and 1")
    order = np.argsort(-scores, kind="stable")
    errors = np.concatenate(([0], np.cumsum(right[order] == 0)))
    dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float64)
    return CalibrationSplit(scores[order] + 0.0, errors, dtype)  # + 0.0: no -0.0 as a threshold
