"""How large a calibration split must be."""

import dataclasses
import math

from scipy.special import bdtr

from sync_jax.guarantees.binomial import fewest_accepted
from sync_jax.guarantees.calibration import probability


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """How many calibration examples a certificate is likely to need.

    Attributes:
        n_calibration: examples to hold out: n_accepted over the coverage, rounded up.
        n_accepted: how many of them must be accepted.
        max_errors: with how many errors among them the certificate is still given.
        power: chance of at most max_errors at the expected risk; at least the one asked for. It
            falls a little while n_accepted grows, until max_errors can follow.
    """

    n_calibration: int
    n_accepted: int
    max_errors: int
    power: float


def calibration_size(
    *,
    target_risk: float,
    delta: float,
    expected_risk: float,
    coverage: float = 1.0,
    power: float = 0.8,
    tests: int = 1,
) -> CalibrationPlan:
    """How many calibration examples to hold out for a target risk.

    The smallest number of accepted examples for which the Clopper-Pearson bound meets the target
    with the chance `power`, if the accepted are wrong with probability expected_risk.

    Args:
        target_risk: selective risk to certify, in (0, 1).
        delta: chance that the certificate is wrong, in (0, 1).
        expected_risk: the selective risk that you expect there, in [0, target_risk).
        coverage: the coverage at which you expect it, in (0, 1].
        power: chance of getting the certificate, in (0, 1).
        tests: between how many tests delta is split: 1 for a fixed threshold or a fixed sequence,
            the number of candidates for Bonferroni, ceil(log2(n + 1)) for SGR, times the number of
            groups.

    Raises:
        ValueError: an argument out of range. At expected_risk = target_risk no number is enough.
    """
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    power = probability(power, "power")
    if not 0 <= expected_risk < target_risk:
        raise ValueError(f"expected_risk must lie in [0, target_risk), got {expected_risk}")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
    if tests < 1:
        raise ValueError(f"tests must be at least 1, got {tests}")
    share = delta / tests

    def reached(errors: int) -> float:
        return float(bdtr(errors, fewest_accepted(target_risk, share, errors), expected_risk))

    # The fewest examples that allow a number of errors are the likeliest to have no more of them,
    # so the answer is one of these sizes. Their power rises with that number, but for rounding,
    # which the last step looks through.
    low, high = -1, 0
    while reached(high) < power:
        low, high = high, 2 * high + 1
        if high > 10**7:
            raise ValueError("expected_risk is too close to target_risk to plan for")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    high = next(k for k in range(max(0, high - 1000), high + 1) if reached(k) >= power)
    n = fewest_accepted(target_risk, share, high)
    return CalibrationPlan(math.ceil(n / coverage), n, high, reached(high))
