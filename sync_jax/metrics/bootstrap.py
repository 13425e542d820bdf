"""Bootstrap intervals of any metric, for one method and for the difference of two."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics import selection
from sync_jax.metrics.sample import FloatArray, Sample, vector

# Resamples are evaluated in blocks of about this many examples: some ten arrays of 8 MB at a time.
_BLOCK = 1_000_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval."""

    estimate: float  # the value on the data themselves
    lower: float  # the ends; NaN where every resample is undefined
    upper: float
    level: float  # nominal coverage
    resamples: int
    undefined: int  # resamples without a value (NaN), which are left out


# The metrics that take many resamples at once, as a `Sample` with counts.
_VECTORISED = (
    *(selection.aurc, selection.excess_aurc, selection.normalised_aurc),
    *(selection.augrc, selection.excess_augrc, selection.failure_auroc, selection.fpr_at_tpr),
    *(selection.selective_risk, selection.coverage_at_risk),
)


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
        metric: a metric of this package that returns a float, which is evaluated on many resamples
            at once; or any other `metric(confidence, loss, **options)`, called once per resample.
        confidence: [n].
        loss: [n], or `correct` for a metric that takes it.
        level: nominal coverage in (0, 1).
        resamples: number of resamples of n examples, at least 1.
        seed: of the resampling; same seed, same interval.
        **options: keyword arguments of the metric, such as coverage=0.9. One number, not an array.
    """
    estimate = float(metric(confidence, loss, **options))
    confidence, loss = vector(confidence, "confidence"), vector(loss, "loss")
    order = np.lexsort((loss, -confidence))  # the interval, too, must not depend on the input order
    values = bootstrap_values(
        metric, confidence[order], loss[order], resamples=resamples, seed=seed, **options
    )
    return percentile_interval(estimate, values, level=level)


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
    options |= {"resamples": resamples, "seed": seed}
    values = bootstrap_values(metric, confidence_a[order], loss_a[order], **options)
    values -= bootstrap_values(metric, confidence_b[order], loss_b[order], **options)
    return percentile_interval(estimate, values, level=level)


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
    """
    metric(confidence, loss, **options)  # checks the arguments
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    confidence, loss = vector(confidence, "confidence"), vector(loss, "loss")
    n, rng = confidence.size, np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    values: list[Any] = []
    for done in range(0, resamples, block):
        rows = min(block, resamples - done)
        index = rng.integers(n, size=(rows, n))
        if metric in _VECTORISED:
            cells = (index + n * np.arange(rows)[:, None]).reshape(-1)
            counts = np.bincount(cells, minlength=rows * n).reshape(rows, n)
            values.append(metric(Sample(confidence, loss, counts), loss, **options))
        else:
            values.append([float(metric(confidence[i], loss[i], **options)) for i in index])
    return np.concatenate(values)


def percentile_interval(estimate: float, values: ArrayLike, *, level: float = 0.95) -> Interval:
    """The percentile interval, at a level in (0, 1), of an estimate from values [resamples]."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    values = np.asarray(values, dtype=np.float64)
    defined = values[~np.isnan(values)]
    tail = (1 - level) / 2
    lower, upper = np.quantile(defined, [tail, 1 - tail]) if defined.size else (np.nan, np.nan)
    undefined = values.size - defined.size
    return Interval(float(estimate), float(lower), float(upper), level, values.size, undefined)
