"""What the ranking metrics compute on: checked examples, grouped by equal confidence.

A public metric checks its arguments, which gives a `Sample`, and leaves the rest to its twin
`..._of_sample`, which also takes many resamples at once and is what the bootstrap calls.
"""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.arrays import FloatArray, IntArray, is_binary, vector

LARGEST_LOSS = 1e150  # its square, and as many sums as memory holds, stay within float64


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """Checked examples, with multiplicities.

    `counts` says how often each example occurs (None: once). Its leading axes are independent data
    sets, which a metric keeps: so the bootstrap evaluates many resamples at once.
    """

    confidence: FloatArray  # [n]
    value: FloatArray  # [n]: the loss, or for a metric of `correct` 1 where right, 0 where wrong
    counts: IntArray | None = None  # [..., n]

    def best(self) -> "Sample":
        """The same losses ranked perfectly."""
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


def _sample(confidence: ArrayLike, value: ArrayLike, name: str) -> Sample:
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
    if sample.counts is None:
        count = np.diff(start, append=confidence.size)
        total = np.add.reduceat(value, start)
    else:
        counts = sample.counts[..., order]
        count = np.add.reduceat(counts, start, axis=-1)
        total = np.add.reduceat(counts * value, start, axis=-1)
    return Groups(confidence[start], count, total)


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
