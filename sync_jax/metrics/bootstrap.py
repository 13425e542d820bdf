"""Bootstrap intervals of any metric, for one method and for the difference of two."""

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics import selection
from sync_jax.metrics.arguments import NAMES, by_keyword, unchecked
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


@by_keyword
def bootstrap_interval(
    metric: Callable[..., float],
    confidence: ArrayLike,
    loss: ArrayLike | None = None,
    *,
    correct: ArrayLike | None = None,
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
            An argument of the name `loss` or `correct` is passed by keyword.
        confidence: [n].
        loss: [n], for a metric that takes a loss.
        correct: [n], for a metric that takes it.
        level: nominal coverage in (0, 1).
        resamples: number of resamples of n examples, at least 1.
        seed: of the resampling; same seed, same interval.
        **options: keyword arguments of the metric, such as coverage=0.9. One number, not an array.
    """
    call, name, values = _named(metric, loss, correct, **options)
    estimate = float(call(confidence, values))
    confidence, values = vector(confidence, "confidence"), vector(values, name)
    order = np.lexsort((values, -confidence))  # the interval must not depend on the input order
    options |= {"resamples": resamples, "seed": seed, name: values[order]}
    with unchecked():
        resampled = bootstrap_values(metric, confidence[order], **options)
    return percentile_interval(estimate, resampled, level=level)


@by_keyword
def paired_bootstrap_interval(
    metric: Callable[..., float],
    confidence_a: ArrayLike,
    loss_a: ArrayLike | None = None,
    confidence_b: ArrayLike = (),
    loss_b: ArrayLike | None = None,
    *,
    correct_a: ArrayLike | None = None,
    correct_b: ArrayLike | None = None,
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
    call, name, a = _named(metric, loss_a, correct_a, "_a", **options)
    _, name_b, b = _named(metric, loss_b, correct_b, "_b", **options)
    if name_b != name:
        raise ValueError(f"pass {name}_b beside {name}_a")
    estimate = float(call(confidence_a, a)) - float(call(confidence_b, b))
    confidence_a, a = vector(confidence_a, "confidence_a"), vector(a, f"{name}_a")
    confidence_b, b = vector(confidence_b, "confidence_b"), vector(b, f"{name}_b")
    if confidence_a.size != confidence_b.size:
        raise ValueError(
            f"confidence_b has {confidence_b.size} examples but confidence_a {confidence_a.size}"
        )
    order = np.lexsort((b, confidence_b, a, confidence_a))
    options |= {"resamples": resamples, "seed": seed}
    with unchecked():
        values = bootstrap_values(metric, confidence_a[order], **{**options, name: a[order]})
        values -= bootstrap_values(metric, confidence_b[order], **{**options, name: b[order]})
    return percentile_interval(estimate, values, level=level)


@by_keyword
def bootstrap_values(
    metric: Callable[..., float],
    confidence: ArrayLike,
    loss: ArrayLike | None = None,
    *,
    correct: ArrayLike | None = None,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> FloatArray:
    """The metric on each of the resamples that `seed` gives for n examples: [resamples].

    For more than two data sets on the same n examples, in the same order: the differences of their
    values are paired, and `percentile_interval` makes intervals of them. Arguments as in
    `bootstrap_interval`; unlike its result, this one depends on the order of the examples.
    """
    call, name, values = _named(metric, loss, correct, **options)
    call(confidence, values)  # checks the arguments
    confidence, values = vector(confidence, "confidence"), vector(values, name)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    n, rng = confidence.size, np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    found: list[Any] = []
    for done in range(0, resamples, block):
        rows = min(block, resamples - done)
        index = rng.integers(n, size=(rows, n))
        with unchecked():
            if metric in _VECTORISED:
                cells = (index + n * np.arange(rows)[:, None]).reshape(-1)
                counts = np.bincount(cells, minlength=rows * n).reshape(rows, n)
                found.append(call(Sample(confidence, values, counts), values))
            else:
                found.append([float(call(confidence[i], values[i])) for i in index])
    return np.concatenate(found)


def _named(
    metric: Callable[..., float], loss: Any, correct: Any, suffix: str = "", **options: Any
) -> tuple[Callable[[Any, Any], Any], str, Any]:
    """The metric as a function of (confidence, values), the values' name and the values."""
    if (loss is None) == (correct is None):
        raise ValueError(f"pass either loss{suffix} or correct{suffix}")
    name, values = ("loss", loss) if correct is None else ("correct", correct)
    try:
        taken = [each for each in inspect.signature(metric).parameters if each in NAMES]
    except (TypeError, ValueError):  # a function of C has none
        taken = []
    if taken and name not in taken:
        if name == "correct":
            raise ValueError(f"the metric takes loss{suffix}=, not correct{suffix}=")
        warnings.warn(
            f"the metric takes correct: pass it as correct{suffix}=, not as loss{suffix}",
            DeprecationWarning,
            stacklevel=4,
        )
        name = "correct"
    if taken:
        return lambda c, x: metric(c, **{name: x}, **options), name, values
    return lambda c, x: metric(c, x, **options), name, values


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
