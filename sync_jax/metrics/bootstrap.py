"""Bootstrap intervals of any metric, for one method and for the difference of two."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics import areas, curve, failures
from sync_jax.metrics.arrays import FloatArray, IntArray, vector
from sync_jax.metrics.sample import Sample

# Resamples are evaluated in blocks of about this many examples: some ten arrays of 8 MB at a time.
_BLOCK = 1_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        estimate: the value on the data themselves.
        lower: lower end; NaN where every resample is undefined.
        upper: upper end.
        level: nominal coverage of the interval.
        resamples: how many resamples were drawn.
        undefined: how many of them had no value (NaN) and were left out.
    """

    estimate: float
    lower: float
    upper: float
    level: float
    resamples: int
    undefined: int


# The metrics that can be evaluated on many resamples at once.
_OF_SAMPLE: dict[Callable[..., Any], Callable[..., FloatArray]] = {
    curve.selective_risk: curve.selective_risk_of_sample,
    curve.coverage_at_risk: curve.coverage_at_risk_of_sample,
    areas.aurc: areas.aurc_of_sample,
    areas.excess_aurc: areas.excess_aurc_of_sample,
    areas.normalised_aurc: areas.normalised_aurc_of_sample,
    areas.augrc: areas.augrc_of_sample,
    areas.excess_augrc: areas.excess_augrc_of_sample,
    failures.failure_auroc: failures.failure_auroc_of_sample,
    failures.fpr_at_tpr: failures.fpr_at_tpr_of_sample,
}


def bootstrap_interval(
    metric: Callable[..., float],
    confidence: ArrayLike,
    loss: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Interval:
    """Percentile interval of a metric over resampled examples (Efron & Tibshirani 1993, ch. 13).

    It answers for the draw of these n examples, not for that of the training run.

    Args:
        metric: a metric of this package on (confidence, loss) or (confidence, correct) that returns
            a float, which is evaluated on many resamples at once; or any other
            `metric(confidence, loss, **options)` that does, called once per resample.
        confidence: [n], higher = more confident.
        loss: [n], or `correct` for a metric that takes it.
        level: nominal coverage in (0, 1).
        resamples: number of resamples of n examples.
        seed: of the resampling; same seed, same interval.
        **options: keyword arguments of the metric, such as coverage=0.9. One number, not an array.

    Raises:
        ValueError: what the metric raises; level outside (0, 1); resamples below 1.
    """
    estimate = float(metric(confidence, loss, **options))
    confidence, loss = vector(confidence, "confidence"), vector(loss, "loss")
    order = np.lexsort((loss, -confidence))  # the interval, too, must not depend on the input order
    confidence, loss = confidence[order], loss[order]
    values = [
        _resampled(metric, confidence, loss, index, options)
        for index in _resampling(confidence.size, level, resamples, seed)
    ]
    return _percentiles(estimate, np.concatenate(values), level)


def paired_bootstrap_interval(
    metric: Callable[..., float],
    confidence_a: ArrayLike,
    loss_a: ArrayLike,
    confidence_b: ArrayLike,
    loss_b: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Interval:
    """Interval of metric(a) - metric(b) for two methods on the same n examples.

    Both see the same resamples, so what makes an example hard for both cancels: an interval without
    0 says that the methods differ. Arguments as in `bootstrap_interval`, index by index the same
    examples in a and b.

    Raises:
        ValueError: as `bootstrap_interval`, and where a and b have different numbers of examples.
    """
    estimate = float(metric(confidence_a, loss_a, **options)) - float(
        metric(confidence_b, loss_b, **options)
    )
    confidence_a, loss_a = vector(confidence_a, "confidence_a"), vector(loss_a, "loss_a")
    confidence_b, loss_b = vector(confidence_b, "confidence_b"), vector(loss_b, "loss_b")
    if confidence_a.size != confidence_b.size:
        raise ValueError(
            f"confidence_b has {confidence_b.size} examples but confidence_a {confidence_a.size}"
        )
    order = np.lexsort((loss_b, confidence_b, loss_a, confidence_a))
    confidence_a, loss_a = confidence_a[order], loss_a[order]
    confidence_b, loss_b = confidence_b[order], loss_b[order]
    values = [
        _resampled(metric, confidence_a, loss_a, index, options)
        - _resampled(metric, confidence_b, loss_b, index, options)
        for index in _resampling(confidence_a.size, level, resamples, seed)
    ]
    return _percentiles(estimate, np.concatenate(values), level)


def bootstrap_values(
    metric: Callable[..., float],
    confidence: ArrayLike,
    loss: ArrayLike,
    *,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> FloatArray:
    """The metric on each of the resamples that `seed` gives for n examples: [resamples].

    For more than two data sets on the same n examples, in the same order: the differences of their
    values are paired, and `percentile_interval` makes intervals of them. Arguments as in
    `bootstrap_interval`; unlike its result, this one depends on the order of the examples.

    Raises:
        ValueError: as `bootstrap_interval`.
    """
    metric(confidence, loss, **options)  # checks the arguments
    confidence, loss = vector(confidence, "confidence"), vector(loss, "loss")
    values = [
        _resampled(metric, confidence, loss, index, options)
        for index in _resampling(confidence.size, 0.5, resamples, seed)
    ]
    return np.concatenate(values)


def percentile_interval(estimate: float, values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The percentile interval of an estimate from its values on resamples, [resamples].

    Raises:
        ValueError: level outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    return _percentiles(float(estimate), np.asarray(values, dtype=np.float64), level)


def _resampling(n: int, level: float, resamples: int, seed: int) -> Iterator[IntArray]:
    """Yields blocks of resamples, each [rows, n] indices into the examples."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    for done in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - done), n))


def _resampled(
    metric: Callable[..., float],
    confidence: FloatArray,
    loss: FloatArray,
    index: IntArray,
    options: dict[str, Any],
) -> FloatArray:
    """The metric on each resample: [rows]."""
    if metric not in _OF_SAMPLE:
        return np.array([float(metric(confidence[i], loss[i], **options)) for i in index])
    rows, n = index.shape
    cells = (index + n * np.arange(rows)[:, None]).reshape(-1)
    counts = np.bincount(cells, minlength=rows * n).reshape(rows, n)
    return _OF_SAMPLE[metric](Sample(confidence, loss, counts), **options)


def _percentiles(estimate: float, values: FloatArray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    lower, upper = float("nan"), float("nan")
    if defined.size:
        tail = (1 - level) / 2
        lower, upper = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
    return Interval(estimate, lower, upper, level, values.size, values.size - defined.size)
