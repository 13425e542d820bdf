"""Checks of the arguments, and the calibration split sorted and counted."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.sample import FloatArray, IntArray, threshold_between, vector


def probability(value: float, name: str) -> float:
    """The argument `name` in (0, 1)."""
    if not 0 < value < 1:  # NaN fails too
        raise ValueError(f"{name} must lie in (0, 1), got {value}")
    return float(value)


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
        """Number of examples with confidence >= threshold; they are the first ones."""
        return np.searchsorted(-self.confidence, -np.asarray(threshold), side="right")

    def threshold(self, n_accepted: int) -> float:
        """A threshold that accepts the first n_accepted: see `threshold_between`."""
        below = self.confidence[n_accepted] if n_accepted < self.n else np.nan
        return threshold_between(below, self.confidence[n_accepted - 1], self.dtype)

    def strictly_above(self, rank: IntArray) -> IntArray:
        """Number of examples that exceed the (rank + 1)-th largest confidence, or -infinity.

        The rank + 1-th example only places the threshold and isn't counted, so the accepted are
        independent draws from the accepted part of the distribution, whatever ties there are.
        """
        below = np.append(self.confidence, -np.inf)[rank]
        return np.searchsorted(-self.confidence, -below, side="left")

    def first_above(self, n_accepted: int) -> float:
        """The first float32 above the next confidence, or -infinity; it accepts n_accepted.

        The accepted have no part in it, as in `strictly_above`. The first float16 of float16
        confidences; the first float64 where the first float32 would accept fewer.
        """
        below = np.append(self.confidence, -np.inf)[n_accepted]
        dtype = np.float16 if self.dtype.itemsize == 2 else np.float32
        with np.errstate(over="ignore"):  # the successor of the largest float is infinity
            above = below.astype(dtype)
            above = above if above > below else np.nextafter(above, dtype(np.inf))
            fits = above <= self.confidence[n_accepted - 1]
            return float(above if fits else np.nextafter(below, np.inf))


def calibration_split(confidence: ArrayLike, correct: ArrayLike) -> CalibrationSplit:
    """Checks the arguments of these names and sorts them."""
    dtype = np.asarray(confidence).dtype
    # float64 cannot hold a longdouble, and NumPy has no successor of a bfloat16: a threshold would
    # accept others than were counted.
    if dtype.kind not in "biu" and dtype.newbyteorder("=") not in (np.float16, np.float32, float):
        raise ValueError(
            f"confidence must hold integers or float16, float32 or float64, got {dtype}"
        )
    scores, right = vector(confidence, "confidence"), vector(correct, "correct")
    if right.shape != scores.shape:
        raise ValueError(f"correct has shape {right.shape} but confidence {scores.shape}")
    if not ((right == 0) | (right == 1)).all():
        raise ValueError("correct must hold only 0 and 1")
    order = np.argsort(-scores, kind="stable")
    errors = np.concatenate(([0], np.cumsum(right[order] == 0)))
    return CalibrationSplit(scores[order], errors, dtype if dtype.kind == "f" else np.dtype(float))


def one_per_group(groups: ArrayLike) -> IntArray:
    """Draws one example of each group: positions `[number of groups]`, sorted.

    Examples of a group depend on each other, as the pictures of a patient do, so that no method
    here holds for all of them. It holds for one of each group, drawn without a look at confidences
    and errors, if the groups are independent draws. `risk` is then that of a group's random
    example: every group weighs the same, whatever its size.

    The draw is the same each time, and does not depend on how the groups are called. `groups` [n]
    are integers or strings.
    """
    group = np.asarray(groups)
    if group.ndim != 1 or not group.size:
        raise ValueError(f"groups must be [n], got shape {group.shape}")
    if (group != group).any():  # NaN equals nothing
        raise ValueError("groups contains NaN")
    keys = np.random.PCG64(0).random_raw(group.size)
    order = np.argsort(keys, kind="stable")
    return np.sort(order[np.unique(group[order], return_index=True)[1]])
