"""The method that bounds the joint risk, P(accepted and wrong)."""

import math

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.guarantees.calibration import calibration_split, probability
from sync_jax.guarantees.certificate import Certificate, certified, infeasible


def conformal_risk_control(
    confidence: ArrayLike, correct: ArrayLike, *, alpha: float
) -> Certificate:
    """Bounds the expected joint risk, P(accepted and wrong) (Angelopoulos et al. 2022).

    The smallest calibration confidence with (n R + 1) / (n + 1) <= alpha, R the share of the
    calibration examples that it accepts and that are wrong. Selective risk isn't monotone in the
    threshold, which this method requires; the joint risk is. Selective risk is the joint risk over
    the coverage, and larger.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        alpha: joint risk to stay below on average, in (0, 1).

    Raises:
        ValueError: as `sgr`, for alpha.
    """
    alpha = probability(alpha, "alpha")
    data = calibration_split(confidence, correct)
    n_accepted = data.accepted(data.confidence)
    bound = (data.errors[n_accepted] + 1) / (data.n + 1)  # non-decreasing along the ranks
    met = np.flatnonzero(bound <= alpha)
    if met.size == 0:
        reason = (
            f"{data.n} calibration examples are too few: at least {math.ceil(1 / alpha) - 1} needed"
            if 1 / (data.n + 1) > alpha
            else f"the most confident examples alone have a bound of {bound[0]:.4g}"
        )
        return infeasible(
            "conformal_risk_control", data.n, target_risk=alpha, delta=None, reason=reason
        )
    last = int(met[-1])
    return certified(
        "conformal_risk_control",
        data,
        data.confidence[last],
        n_accepted[last],
        target_risk=alpha,
        delta=None,
        bound=bound[last],
        promise=(
            f"On average over draws of the calibration split and a new example, that example is "
            f"accepted and wrong with probability at most {alpha:g}."
        ),
    )
