"""Failure detection: how well confidence tells correct predictions from wrong ones.

The positive class is "correct" in both metrics, as confidence ranks it higher. Papers whose
positives are the errors mean the same AUROC (with the confidence negated), but another FPR at TPR.
"""

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.metrics.arrays import FloatArray, ceiling, ratio
from sync_jax.metrics.sample import Sample, correct_sample, group_ties


def failure_auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a correct example is more confident than a wrong one, ties counting half.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.

    Returns:
        The AUROC of confidence for the positive class "correct"; NaN unless both classes occur.

    Raises:
        ValueError: input empty, NaN or of different shapes; correct not 0/1.
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
        The false positive rate in [0, 1]; NaN unless both classes occur.

    Raises:
        ValueError: as `failure_auroc`, and tpr outside (0, 1].
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
