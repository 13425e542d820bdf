"""Metrics of a selection, by rank or by threshold: risk, coverage, areas, failure detection."""

import dataclasses
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from sync_jax.metrics.arguments import by_keyword
from sync_jax.metrics.sample import (
    FloatArray,
    IntArray,
    before,
    ceiling,
    correct_sample,
    expected_risks,
    expected_totals,
    group_ties,
    is_binary,
    loss_sample,
    number,
    rank_of_coverage,
    ratio,
    threshold_between,
    vector,
)

Convention = Literal["mean", "fd_shifts", "torch_uncertainty"]


@dataclasses.dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """One point per distinct confidence, from the most to the least confident; arrays [points]."""

    coverage: FloatArray  # share of the examples with confidence >= threshold; the last one is 1
    risk: FloatArray  # their mean loss
    threshold: FloatArray  # the distinct confidences, descending
    n_accepted: IntArray
    loss_sum: FloatArray  # total loss of the accepted: the number of errors, where it is 0/1


@by_keyword
def risk_coverage_curve(confidence: ArrayLike, loss: ArrayLike) -> RiskCoverageCurve:
    """Risk-coverage curve at every distinct confidence (El-Yaniv & Wiener 2010)."""
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
@by_keyword
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: ArrayLike) -> Any:
    """Mean loss e_k of the k = ceil(n * coverage) most confident examples.

    This imposes the coverage, one or an array of them, on the ranking at hand, as published tables
    do. `deployed` gives what a threshold chosen elsewhere really does.
    """
    sample = loss_sample(confidence, loss)
    rank = rank_of_coverage(coverage, sample.value.size)
    return number(expected_risks(group_ties(sample))[..., rank - 1])


@by_keyword
def coverage_at_risk(confidence: ArrayLike, loss: ArrayLike, *, risk: float) -> float:
    """Largest coverage k/n with selective risk e_k <= risk, at least 0; 0 where there is none.

    The curve need not be monotone: a larger coverage may meet a risk that a smaller one misses.
    Computed on the data at hand, so no promise about new data: see `sync_jax.guarantees`.
    """
    risks = expected_risks(group_ties(loss_sample(confidence, loss)))
    if not risk >= 0:
        raise ValueError(f"risk must be non-negative, got {risk}")
    # A mean of equal losses may round to just above them; no 0/1 risk lies that close to another.
    met = risks <= risk * (1 + 1e-12)
    n = met.shape[-1]
    return number(np.where(met.any(axis=-1), n - np.argmax(met[..., ::-1], axis=-1), 0) / n)


@by_keyword
def aurc(confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean") -> float:
    """Area under the risk-coverage curve; lower is better.

    Peers differ in the convention, so name it beside the number:

    - "mean": mean of e_k over k = 1..n (Geifman, Uziel & El-Yaniv 2019).
    - "fd_shifts": trapezoid through the points at distinct confidences, extended flat to coverage
      0, as IML-DKFZ/fd-shifts computes it (which displays it times 1000).
    - "torch_uncertainty": trapezoid of e_k over [1/n, 1], divided by 1 - 1/n, as torch-uncertainty
      computes it, but its expected value over the order of ties. Needs n >= 2.
    """
    groups = group_ties(loss_sample(confidence, loss))
    if convention == "fd_shifts":
        n_accepted, loss_sum = np.cumsum(groups.count, axis=-1), np.cumsum(groups.total, axis=-1)
        # A resample may leave groups empty. Those before its first example have no risk yet; they
        # have no width either, so any finite number does.
        risk = loss_sum / np.maximum(n_accepted, 1)
        risk_before = np.where(before(n_accepted) > 0, before(risk), risk)
        return number((groups.count * (risk + risk_before) / 2).sum(axis=-1) / n_accepted[..., -1])
    risk = expected_risks(groups)
    if convention == "mean":
        return number(risk.mean(axis=-1))
    if convention == "torch_uncertainty":
        n = risk.shape[-1]
        if n < 2:
            raise ValueError("confidence needs two examples in convention 'torch_uncertainty'")
        return number((risk.sum(axis=-1) - (risk[..., 0] + risk[..., -1]) / 2) / (n - 1))
    raise ValueError(f"convention {convention!r} is none of mean, fd_shifts, torch_uncertainty")


@by_keyword
def excess_aurc(
    confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean"
) -> float:
    """AURC minus that of the best ranking of the same losses: E-AURC (Geifman et al. 2019).

    In the convention "mean" the best ranking is that of these n examples, so the result is 0 for a
    perfect ranking and, but for rounding, never below it. In "fd_shifts", as in that package, the
    best is the limit for large n, r + (1 - r) ln(1 - r) with r the mean loss, where the loss is
    0/1, and the sorted losses otherwise; the result can be negative. torch-uncertainty defines
    none.
    """
    sample = loss_sample(confidence, loss)
    if convention not in ("mean", "fd_shifts"):
        raise ValueError(f"convention {convention!r} defines no excess AURC: mean or fd_shifts")
    area = aurc(confidence, loss=loss, convention=convention)
    best = expected_risks(group_ties(sample.best()))
    if convention == "mean":
        return number(area - best.mean(axis=-1))
    if is_binary(sample.value):
        risk = best[..., -1]
        return number(area - (risk + xlogy(1 - risk, 1 - risk)))
    n = best.shape[-1]
    return number(area - (best.sum(axis=-1) + (best[..., 0] - best[..., -1]) / 2) / n)


@by_keyword
def normalised_aurc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Excess AURC over that of a random ranking: 0 is perfect, 1 is random, NaN where they agree.

    NAURC of Cattelan & Silva 2023, (AURC - best) / (risk at full coverage - best), in the
    convention "mean", where a random ranking's expected AURC is exactly the full-coverage risk.
    """
    sample = loss_sample(confidence, loss)
    best_risks = expected_risks(group_ties(sample.best()))
    best, random = best_risks.mean(axis=-1), best_risks[..., -1]
    # Equal losses leave no room but rounding between the best ranking and a random one.
    room = np.where(random - best > 1e-12 * random, random - best, 0.0)
    return number(ratio(aurc(confidence, loss=loss) - best, room))


@by_keyword
def augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve, e_k * k/n over k/n (Traub et al. 2024).

    The trapezoid from the origin, as in fd-shifts (unscaled). For accuracy a it is exactly
    (1 - failure AUROC) a (1 - a) + (1 - a)^2 / 2: the chance that a random example is accepted at
    a random coverage and wrong.
    """
    total = expected_totals(group_ties(loss_sample(confidence, loss)))
    # Linear inside ties, so the trapezoid over ranks is that over distinct confidences.
    return number((total.sum(axis=-1) - total[..., -1] / 2) / total.shape[-1] ** 2)


@by_keyword
def excess_augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """AUGRC minus that of the best ranking of the same losses (r^2/2 for a 0/1 loss of mean r)."""
    best = loss_sample(confidence, loss).best()
    return augrc(confidence, loss=loss) - augrc(best, loss=loss)


@by_keyword
def failure_auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a correct example is more confident than a wrong one, ties counting half.

    The positive class is "correct", as confidence ranks it higher. Papers whose positives are the
    errors mean the same AUROC (with the confidence negated), but another FPR at TPR. NaN unless
    both classes occur.
    """
    groups = group_ties(correct_sample(confidence, correct))
    right, wrong = groups.total, groups.count - groups.total
    n_right, n_wrong = right.sum(axis=-1), wrong.sum(axis=-1)
    wrong_below = n_wrong[..., None] - np.cumsum(wrong, axis=-1)
    return number(ratio((right * (wrong_below + wrong / 2)).sum(axis=-1), n_right * n_wrong))


@by_keyword
def fpr_at_tpr(confidence: ArrayLike, correct: ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of the wrong examples accepted where at least `tpr` of the correct ones are.

    The threshold is the largest confidence that accepts this share, in (0, 1], of the correct; no
    interpolation. (fd-shifts has the same positives, but takes 0.9495 for 0.95.) NaN unless both
    classes occur.
    """
    groups = group_ties(correct_sample(confidence, correct))
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    right = np.cumsum(groups.total, axis=-1)
    wrong = np.cumsum(groups.count - groups.total, axis=-1)
    enough = right >= ceiling(tpr * right[..., -1:])
    accepted = np.take_along_axis(wrong, np.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]
    return number(np.where(right[..., -1] > 0, ratio(accepted, wrong[..., -1]), np.nan))


@dataclasses.dataclass(frozen=True)
class Deployed:
    """The result of a fixed threshold on a split."""

    threshold: float | None  # confidence >= threshold is accepted; None accepts nothing
    coverage: float
    risk: float  # mean loss of the accepted; NaN of none
    n: int  # examples in all
    n_accepted: int
    n_errors: int  # accepted with a loss above 0: the errors, where the loss is 0/1
    loss_sum: float  # total loss of the accepted


@by_keyword
def deployed(confidence: ArrayLike, loss: ArrayLike, *, threshold: float | None) -> Deployed:
    """Coverage and risk of accepting confidence >= threshold, chosen on other data.

    The threshold may be infinite; None (an infeasible certificate's) accepts nothing.
    """
    sample = loss_sample(confidence, loss)
    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold is NaN")
    losses = sample.value
    accepted = losses[:0] if threshold is None else losses[sample.confidence >= threshold]
    accepted = np.sort(accepted)  # a float sum depends on its order; the result must not
    total = float(accepted.sum())
    return Deployed(
        threshold=None if threshold is None else float(threshold),
        coverage=accepted.size / losses.size,
        risk=total / accepted.size if accepted.size else float("nan"),
        n=losses.size,
        n_accepted=accepted.size,
        n_errors=int(np.count_nonzero(accepted)),
        loss_sum=total,
    )


def threshold_for_coverage(confidence: ArrayLike, *, coverage: float) -> float:
    """Threshold that accepts the fewest with this coverage in (0, 1], ties accepted together.

    It lies between the lowest accepted confidence and the next one, or just at the lowest of all,
    and is a float32 wherever one lies there. Choose it on the calibration split and apply
    it with `deployed` to another.
    """
    dtype, confidence = np.asarray(confidence).dtype, vector(confidence, "confidence")
    index = confidence.size - int(rank_of_coverage(coverage, confidence.size))
    lowest = np.partition(confidence, index)[index]
    rejected = confidence[confidence < lowest]
    return threshold_between(rejected.max() if rejected.size else np.nan, lowest, dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdTable:
    """Counts per threshold, arrays [thresholds]; accepted means confidence >= threshold."""

    threshold: FloatArray  # as given, or every distinct confidence, descending
    n_accepted: IntArray
    n_errors: IntArray  # accepted and wrong: missed by the selection
    n_rejected: IntArray
    n_rejected_errors: IntArray  # rejected and wrong: caught by the selection
    coverage: FloatArray  # n_accepted / n
    risk: FloatArray  # n_errors / n_accepted; NaN where nothing is accepted


@by_keyword
def threshold_table(
    confidence: ArrayLike, loss: ArrayLike, *, thresholds: ArrayLike | None = None
) -> ThresholdTable:
    """Counts for each of the thresholds, in any order; None takes every distinct confidence.

    The loss must be 0/1.
    """
    sample = loss_sample(confidence, loss)
    if not is_binary(sample.value):
        raise ValueError("loss must be 0/1 for a table of counts")
    n, groups = sample.value.size, group_ties(sample)
    threshold = groups.threshold if thresholds is None else vector(thresholds, "thresholds")
    # How many of the distinct confidences, which descend, are >= each threshold.
    points = np.searchsorted(-groups.threshold, -threshold, side="right")
    n_accepted = np.append(0, np.cumsum(groups.count))[points]
    errors = np.append(0, np.cumsum(groups.total.astype(np.int64)))
    return ThresholdTable(
        threshold=threshold,
        n_accepted=n_accepted,
        n_errors=errors[points],
        n_rejected=n - n_accepted,
        n_rejected_errors=errors[-1] - errors[points],
        coverage=n_accepted / n,
        risk=ratio(errors[points], n_accepted),
    )
