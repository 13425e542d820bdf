"""Checked arrays, and examples grouped by equal confidence, for the metrics to compute on.

A metric of confidence turns its arguments into a `Sample`, which stands for as many data sets as
its counts have rows. The bootstrap passes such a `Sample` in the place of `confidence`.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
LARGEST_LOSS = 1e150  # its square, and as many sums as memory holds, stay within float64


def real(value: ArrayLike, name: str) -> FloatArray:
    """The argument `name` in float64."""
    try:
        array = np.asarray(value)
        # NumPy would read strings as numbers, and drop an imaginary part but for a warning.
        if array.dtype.kind not in "cSUMm":
            return array.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers") from error
    raise ValueError(f"{name} must be an array of real numbers, not of {array.dtype}")


def vector(value: ArrayLike, name: str) -> FloatArray:
    """The argument `name` in float64: [n], not empty, without NaN."""
    array = real(value, name)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if np.isnan(array).any():
        raise ValueError(f"{name} contains NaN")
    return array + 0.0  # -0.0 becomes 0.0: they tie, and must not differ in the output


def threshold_between(below: float, lowest: float, dtype: Any) -> float:
    """A threshold with below < threshold <= lowest, in float32 if a float32 lies there.

    It accepts the confidence `lowest` and not the next one, `below` (NaN where all are accepted):
    their middle, in float32 or a narrower `dtype` of the confidences; else `lowest` rounded down to
    float32; else `lowest` itself. Of float32 confidences it is a float32, whichever dtype compares.
    """
    low, high = np.float64(below), np.float64(lowest)
    narrow = dtype if dtype.kind in "fV" and dtype.itemsize < 4 else np.dtype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        middle = (low / 2 + high / 2).astype(narrow)  # NaN where both are infinite
        down = high.astype(np.float32)
        down = np.nextafter(down, np.float32(-np.inf)) if down > high else down
    fitting = (float(x) + 0.0 for x in (middle, down) if x <= high and not x <= low)
    return next(fitting, float(high))


def number(value: Any) -> Any:
    """A float; an array, where a metric was given several data sets or coverages."""
    return float(value) if np.ndim(value) == 0 else value


def is_binary(array: FloatArray) -> bool:
    """True if it holds only 0 and 1."""
    return bool(((array == 0) | (array == 1)).all())


def ratio(numerator: Any, denominator: Any) -> FloatArray:
    """Quotient, NaN where the denominator is 0."""
    result = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)


def ceiling(value: FloatArray) -> IntArray:
    """Ceiling that forgives rounding: 0.07 * 100 is 7.000000000000001 and means 7."""
    nearest = np.rint(value)
    close = np.abs(value - nearest) <= 1e-9 * np.maximum(1.0, np.abs(nearest))
    return np.where(close, nearest, np.ceil(value)).astype(np.int64)


def rank_of_coverage(coverage: ArrayLike, n: int) -> IntArray:
    """Number of examples that a coverage in (0, 1] accepts: the smallest k with k/n >= coverage."""
    values = real(coverage, "coverage")
    if not ((values > 0) & (values <= 1)).all():  # NaN fails both comparisons
        raise ValueError(f"coverage must lie in (0, 1], got {values}")
    return np.clip(ceiling(values * n), 1, n)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Checked examples, with multiplicities.

    `counts` says how often each example occurs (None: once). Its leading axes are independent data
    sets, which a metric keeps: so the bootstrap evaluates many resamples at once.
    """

    confidence: FloatArray  # [n]
    value: FloatArray  # [n]: the loss, or for a metric of `correct` 1 where right, 0 where wrong
    counts: IntArray | None = None  # [..., n]

    def best(self) -> Any:
        """The same losses ranked perfectly, to be passed to a metric as `confidence`."""
        return dataclasses.replace(self, confidence=-self.value)


def loss_sample(confidence: ArrayLike, loss: ArrayLike) -> Sample:
    """A sample of losses, finite and non-negative."""
    sample = _sample(confidence, loss, "loss")
    if sample.value.min() < 0 or np.isinf(sample.value.max()):
        raise ValueError("loss must be finite and non-negative")
    if sample.value.max() > LARGEST_LOSS:
        raise ValueError(f"loss must be at most {LARGEST_LOSS:g}: larger ones' sums overflow")
    return sample


def correct_sample(confidence: ArrayLike, correct: ArrayLike) -> Sample:
    """A sample of right (1) and wrong (0)."""
    sample = _sample(confidence, correct, "correct")
    if not is_binary(sample.value):
        raise ValueError("correct must hold only 0 and 1")
    return sample


def _sample(confidence: Any, value: ArrayLike, name: str) -> Sample:
    if isinstance(confidence, Sample):
        return confidence
    confidence, value = vector(confidence, "confidence"), vector(value, name)
    if value.shape != confidence.shape:
        raise ValueError(f"{name} has shape {value.shape} but confidence {confidence.shape}")
    return Sample(confidence, value)


@dataclasses.dataclass(frozen=True, eq=False)
class Groups:
    """Examples grouped by equal confidence, most confident group first."""

    threshold: FloatArray  # [groups], their confidence
    count: IntArray  # [..., groups], how many; 0 where a resample drew none
    total: FloatArray  # [..., groups], the sum of their values


def group_ties(sample: Sample) -> Groups:
    """Groups the examples of a sample: O(n log n)."""
    # Value is the second key because float sums depend on their order: sorted by both keys, any
    # permutation of the input arrives here as the same array.
    order = np.lexsort((sample.value, -sample.confidence))
    confidence, value = sample.confidence[order], sample.value[order]
    start = np.flatnonzero(np.concatenate(([True], confidence[1:] != confidence[:-1])))
    counts = np.ones_like(order) if sample.counts is None else sample.counts[..., order]
    sums = (np.add.reduceat(each, start, axis=-1) for each in (counts, counts * value))
    return Groups(confidence[start], *sums)


def before(cumulative: Any) -> Any:
    """Shifts cumulative sums [..., groups] by one group: what comes before each."""
    return np.concatenate((np.zeros_like(cumulative[..., :1]), cumulative[..., :-1]), axis=-1)


def expected_totals(groups: Groups) -> FloatArray:
    """Expected total value of the k most confident, k = 1..n: [..., n].

    In a random order of m tied examples of total s, the first j have s * j / m on average.
    """
    count = groups.count.reshape(-1)
    n_before = before(np.cumsum(groups.count, axis=-1))
    total_before = before(np.cumsum(groups.total, axis=-1))
    n = int(groups.count.sum(axis=-1).flat[0])  # the same in every data set
    group = np.repeat(np.arange(count.size), count)
    rank = np.tile(np.arange(1, n + 1), count.size // groups.threshold.size)
    within = rank - n_before.reshape(-1)[group]
    total = groups.total.reshape(-1)[group] * within / count[group]
    total += total_before.reshape(-1)[group]
    return total.reshape(*groups.count.shape[:-1], n)


def expected_risks(groups: Groups) -> FloatArray:
    """e_k, the expected mean loss of the k most confident, for k = 1..n: [..., n]."""
    total = expected_totals(groups)
    return total / np.arange(1, total.shape[-1] + 1)
