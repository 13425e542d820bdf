"""Metrics of a ranking: the risk-coverage curve, areas under it, and failure detection."""

import dataclasses
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from sync_jax.metrics.sample import (
    FloatArray,
    IntArray,
    Sample,
    before,
    ceiling,
    correct_sample,
    expected_risks,
    expected_totals,
    group_ties,
    is_binary,
    loss_sample,
    rank_of_coverage,
    ratio,
)

Convention = Literal["mean", "fd_shifts", "torch_uncertainty"]


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
        coverage: one coverage in (0, 1], or an array of them, whose shape the result has.
    """
    risk = selective_risk_of_sample(loss_sample(confidence, loss), coverage=coverage)
    return float(risk) if np.ndim(coverage) == 0 else risk


def selective_risk_of_sample(sample: Sample, *, coverage: ArrayLike) -> FloatArray:
    """The twin of `selective_risk`: [..., *coverage.shape]."""
    rank = rank_of_coverage(coverage, sample.value.size)
    return expected_risks(group_ties(sample))[..., rank - 1]


def coverage_at_risk(confidence: ArrayLike, loss: ArrayLike, *, risk: float) -> float:
    """Largest coverage k/n with selective risk e_k <= risk, at least 0; 0 where there is none.

    The curve need not be monotone: a larger coverage may meet a risk that a smaller one misses.
    Computed on the data at hand, so no promise about new data: see `sync_jax.guarantees`.
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


def aurc(confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean") -> float:
    """Area under the risk-coverage curve; lower is better.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        convention: peers differ, so name it beside the number.
            "mean": mean of e_k over k = 1..n (Geifman, Uziel & El-Yaniv 2019).
            "fd_shifts": trapezoid through the points at distinct confidences, extended flat to
                coverage 0, as IML-DKFZ/fd-shifts computes it (which displays it times 1000).
            "torch_uncertainty": trapezoid of e_k over [1/n, 1], divided by 1 - 1/n, as
                torch-uncertainty computes it. Its value depends on the order of ties; here it is
                the expected one. Needs n >= 2.
    """
    return float(aurc_of_sample(loss_sample(confidence, loss), convention=convention))


def aurc_of_sample(sample: Sample, *, convention: Convention = "mean") -> FloatArray:
    """The twin of `aurc`: [...]."""
    groups = group_ties(sample)
    if convention == "fd_shifts":
        n_accepted, loss_sum = np.cumsum(groups.count, axis=-1), np.cumsum(groups.total, axis=-1)
        # A resample may leave groups empty. Those before its first example have no risk yet; they
        # have no width either, so any finite number does.
        risk = loss_sum / np.maximum(n_accepted, 1)
        risk_before = np.where(before(n_accepted) > 0, before(risk), risk)
        return (groups.count * (risk + risk_before) / 2).sum(axis=-1) / n_accepted[..., -1]
    risk = expected_risks(groups)
    if convention == "mean":
        return risk.mean(axis=-1)
    if convention == "torch_uncertainty":
        n = risk.shape[-1]
        if n < 2:
            raise ValueError("confidence needs two examples in convention 'torch_uncertainty'")
        return (risk.sum(axis=-1) - (risk[..., 0] + risk[..., -1]) / 2) / (n - 1)
    raise ValueError(f"convention {convention!r} is none of mean, fd_shifts, torch_uncertainty")


def excess_aurc(
    confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean"
) -> float:
    """AURC minus that of the best ranking of the same losses: E-AURC (Geifman et al. 2019).

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        convention: "mean": the best ranking is that of these n examples, so the result is 0 for a
            perfect ranking and, but for rounding, never below it. "fd_shifts": as that package does
            it, the limit for large n, r + (1 - r) ln(1 - r) with r the mean loss, where the loss is
            0/1, and the sorted losses otherwise; it can be negative. torch-uncertainty defines
            none.
    """
    return float(excess_aurc_of_sample(loss_sample(confidence, loss), convention=convention))


def excess_aurc_of_sample(sample: Sample, *, convention: Convention = "mean") -> FloatArray:
    """The twin of `excess_aurc`: [...]."""
    if convention not in ("mean", "fd_shifts"):
        raise ValueError(f"convention {convention!r} defines no excess AURC: mean or fd_shifts")
    area = aurc_of_sample(sample, convention=convention)
    best = expected_risks(group_ties(sample.best()))
    if convention == "mean":
        return area - best.mean(axis=-1)
    if is_binary(sample.value):
        risk = best[..., -1]
        return area - (risk + xlogy(1 - risk, 1 - risk))
    n = best.shape[-1]
    return area - (best.sum(axis=-1) + (best[..., 0] - best[..., -1]) / 2) / n


def normalised_aurc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Excess AURC over that of a random ranking: 0 is perfect, 1 is random, NaN where they agree.

    NAURC of Cattelan & Silva 2023, (AURC - best) / (risk at full coverage - best), in the
    convention "mean", where a random ranking's expected AURC is exactly the full-coverage risk.
    """
    return float(normalised_aurc_of_sample(loss_sample(confidence, loss)))


def normalised_aurc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `normalised_aurc`: [...]."""
    best_risks = expected_risks(group_ties(sample.best()))
    best, random = best_risks.mean(axis=-1), best_risks[..., -1]
    # Equal losses leave no room but rounding between the best ranking and a random one.
    room = np.where(random - best > 1e-12 * random, random - best, 0.0)
    return ratio(aurc_of_sample(sample) - best, room)


def augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve, e_k * k/n over k/n (Traub et al. 2024).

    The trapezoid from the origin, as in fd-shifts (unscaled). For accuracy a it is exactly
    (1 - failure AUROC) a (1 - a) + (1 - a)^2 / 2: the chance that a random example is accepted at
    a random coverage and wrong.
    """
    return float(augrc_of_sample(loss_sample(confidence, loss)))


def augrc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `augrc`: [...]."""
    total = expected_totals(group_ties(sample))
    # Linear inside ties, so the trapezoid over ranks is that over distinct confidences.
    return (total.sum(axis=-1) - total[..., -1] / 2) / total.shape[-1] ** 2


def excess_augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """AUGRC minus that of the best ranking of the same losses (r^2/2 for a 0/1 loss of mean r)."""
    return float(excess_augrc_of_sample(loss_sample(confidence, loss)))


def excess_augrc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `excess_augrc`: [...]."""
    return augrc_of_sample(sample) - augrc_of_sample(sample.best())


def failure_auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a correct example is more confident than a wrong one, ties counting half.

    The positive class is "correct", as confidence ranks it higher. Papers whose positives are the
    errors mean the same AUROC (with the confidence negated), but another FPR at TPR.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.

    Returns:
        The AUROC; NaN unless both classes occur.
    """
    return float(failure_auroc_of_sample(correct_sample(confidence, correct)))


def failure_auroc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `failure_auroc`: [...]."""
    groups = group_ties(sample)
    right, wrong = groups.total, groups.count - groups.total
    n_right, n_wrong = right.sum(axis=-1), wrong.sum(axis=-1)
    wrong_below = n_wrong[..., None] - np.cumsum(wrong, axis=-1)
    return ratio((right * (wrong_below + wrong / 2)).sum(axis=-1), n_right * n_wrong)


def fpr_at_tpr(confidence: ArrayLike, correct: ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of the wrong examples accepted where at least `tpr` of the correct ones are.

    The positive class is "correct": a false positive is a wrong example that is accepted. The
    threshold is the largest confidence that accepts the share `tpr` of the positives, ties accepted
    together; no interpolation. (fd-shifts has the same positives, but takes 0.9495 for 0.95.)

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        tpr: share of the correct examples to accept, in (0, 1].

    Returns:
        The rate in [0, 1]; NaN unless both classes occur.
    """
    return float(fpr_at_tpr_of_sample(correct_sample(confidence, correct), tpr=tpr))


def fpr_at_tpr_of_sample(sample: Sample, *, tpr: float = 0.95) -> FloatArray:
    """The twin of `fpr_at_tpr`: [...]."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    groups = group_ties(sample)
    right = np.cumsum(groups.total, axis=-1)
    wrong = np.cumsum(groups.count - groups.total, axis=-1)
    enough = right >= ceiling(tpr * right[..., -1:])
    accepted = np.take_along_axis(wrong, np.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]
    return np.where(right[..., -1] > 0, ratio(accepted, wrong[..., -1]), np.nan)
