"""A fixed threshold: choosing it, and what it gives."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.sample import (
    FloatArray,
    IntArray,
    group_ties,
    is_binary,
    loss_sample,
    rank_of_coverage,
    ratio,
    vector,
)


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What a fixed threshold gives on a split.

    Attributes:
        threshold: confidence >= threshold is accepted; None accepts nothing.
        coverage: share accepted.
        risk: mean loss of the accepted; NaN where nothing is accepted.
        n: number of examples.
        n_accepted: number accepted.
        n_errors: number accepted with a loss above 0: the errors, where the loss is 0/1.
        loss_sum: total loss of the accepted.
    """

    threshold: float | None
    coverage: float
    risk: float
    n: int
    n_accepted: int
    n_errors: int
    loss_sum: float


def deployed(confidence: ArrayLike, loss: ArrayLike, *, threshold: float | None) -> Deployed:
    """Coverage and risk of accepting confidence >= threshold, chosen on other data.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        threshold: may be infinite; None (an infeasible certificate's) accepts nothing.
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
    """Largest threshold that accepts at least this coverage in (0, 1], ties accepted together.

    Choose it on the calibration split and apply it with `deployed` to another.
    """
    confidence = vector(confidence, "confidence")
    index = confidence.size - int(rank_of_coverage(coverage, confidence.size))
    return float(np.partition(confidence, index)[index])


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdTable:
    """Counts per threshold, arrays [thresholds]; accepted means confidence >= threshold.

    Attributes:
        threshold: the thresholds, as given, or every distinct confidence, descending.
        n_accepted: accepted examples.
        n_errors: accepted and wrong (missed by the selection).
        n_rejected: rejected examples.
        n_rejected_errors: rejected and wrong (caught by the selection).
        coverage: n_accepted / n.
        risk: n_errors / n_accepted; NaN where nothing is accepted.
    """

    threshold: FloatArray
    n_accepted: IntArray
    n_errors: IntArray
    n_rejected: IntArray
    n_rejected_errors: IntArray
    coverage: FloatArray
    risk: FloatArray


def threshold_table(
    confidence: ArrayLike, loss: ArrayLike, *, thresholds: ArrayLike | None = None
) -> ThresholdTable:
    """Integer counts for each threshold.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], 0/1.
        thresholds: [thresholds] in any order; None takes every distinct confidence.
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
