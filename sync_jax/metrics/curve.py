"""The risk-coverage curve, and what is read off it at one coverage or one risk."""

import dataclasses
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.arrays import FloatArray, IntArray, rank_of_coverage
from sync_jax.metrics.sample import Sample, expected_risks, group_ties, loss_sample


@dataclasses.dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """One point per distinct confidence, from the most to the least confident; arrays [points].

    Attributes:
        coverage: share of the examples with confidence >= threshold; the last one is 1.
        risk: their mean loss (selective risk).
        threshold: the distinct confidences, descending.
        n_accepted: number of the examples with confidence >= threshold.
        loss_sum: their total loss; the number of errors where the loss is 0/1.
    """

    coverage: FloatArray
    risk: FloatArray
    threshold: FloatArray
    n_accepted: IntArray
    loss_sum: FloatArray


def risk_coverage_curve(confidence: ArrayLike, loss: ArrayLike) -> RiskCoverageCurve:
    """Risk-coverage curve at every distinct confidence (El-Yaniv & Wiener 2010).

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.

    Raises:
        ValueError: input empty, NaN or of different shapes; loss negative or infinite. All
            metrics of these two arguments raise the same.
    """
    groups = group_ties(loss_sample(confidence, loss))
    n_accepted, loss_sum = np.cumsum(groups.count), np.cumsum(groups.total)
    return RiskCoverageCurve(
        coverage=n_accepted / n_accepted[-1],
        risk=loss_sum / n_accepted,
        threshold=groups.threshold,
        n_accepted=n_accepted,
        loss_sum=loss_sum,
    )


@overload
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: float) -> float: ...
@overload
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: ArrayLike) -> Any: ...
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: ArrayLike) -> Any:
    """Mean loss e_k of the k = ceil(n * coverage) most confident examples.

    This imposes the coverage on the ranking at hand, as published tables do. `deployed` gives what
    a threshold chosen elsewhere really does.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        coverage: one coverage in (0, 1], or an array of them.

    Returns:
        A float, or an array of the shape of `coverage`.

    Raises:
        ValueError: also where a coverage lies outside (0, 1].
    """
    risk = selective_risk_of_sample(loss_sample(confidence, loss), coverage=coverage)
    return float(risk) if np.ndim(coverage) == 0 else risk


def selective_risk_of_sample(sample: Sample, *, coverage: ArrayLike) -> FloatArray:
    """The twin of `selective_risk`: [..., *coverage.shape]."""
    rank = rank_of_coverage(coverage, sample.value.size)
    return expected_risks(group_ties(sample))[..., rank - 1]


def coverage_at_risk(confidence: ArrayLike, loss: ArrayLike, *, risk: float) -> float:
    """Largest coverage k/n with selective risk e_k <= risk; 0 where there is none.

    The curve need not be monotone: a larger coverage may meet a risk that a smaller one misses.
    Computed on the data at hand, so no promise about new data: see `sync_jax.guarantees`.

    Raises:
        ValueError: also where risk is negative or NaN.
    """
    return float(coverage_at_risk_of_sample(loss_sample(confidence, loss), risk=risk))


def coverage_at_risk_of_sample(sample: Sample, *, risk: float) -> FloatArray:
    """The twin of `coverage_at_risk`: [...]."""
    if not risk >= 0:
        raise ValueError(f"risk must be non-negative, got {risk}")
    # A mean of equal losses may round to just above them; no 0/1 risk lies that close to another.
    met = expected_risks(group_ties(sample)) <= risk * (1 + 1e-12)
    n = met.shape[-1]
    return np.where(met.any(axis=-1), n - np.argmax(met[..., ::-1], axis=-1), 0) / n
