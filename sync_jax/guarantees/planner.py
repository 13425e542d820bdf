"""How large a calibration split must be."""

import dataclasses
import math

import numpy as np

from sync_jax.guarantees.binomial import at_most, fewest_accepted, most_errors
from sync_jax.guarantees.calibration import probability

MOST = 10**12  # no calibration split is larger; far below where float64 skips integers
LOOK_BACK = 16  # sizes below one with the power that are tried again


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """How many calibration examples a certificate is likely to need.

    Attributes:
        n_calibration: examples to hold out.
        n_accepted: how many of them are accepted, on average, rounded down.
        max_errors: with how many errors among so many the certificate is still given.
        power: chance of the certificate, over how many are accepted and how many of them are wrong;
            at least the one asked for.
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

    The Clopper-Pearson bound meets the target with the chance `power`, if examples are accepted
    with probability `coverage`, independently, and the accepted wrong with expected_risk. At full
    coverage the number is the smallest with that chance. Below, a slightly smaller one may have it
    too: the chance falls a little while the number grows, until one more error is allowed.

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
        ValueError: an argument out of range, or no number up to 10^12 accepted with 10^7 errors is
            enough. At expected_risk = target_risk none is.
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
    n = _fewest_with_power(target_risk, share, expected_risk, power)
    if n > MOST:
        raise ValueError(f"target_risk={target_risk:g} takes more than {MOST:g} accepted examples")

    def chance(n: int) -> float:
        return _chance(n, coverage, target_risk, share, expected_risk)

    if coverage < 1:  # n accepted examples take at least n
        low, high = n - 1, n
        while chance(high) < power:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if chance(middle) >= power else (middle, high)
        n = next(k for k in range(max(n, high - LOOK_BACK), high + 1) if chance(k) >= power)
    n_accepted = math.floor(n * coverage)
    return CalibrationPlan(
        n, n_accepted, int(most_errors(n_accepted, target_risk, share)), chance(n)
    )


def _fewest_with_power(target_risk: float, delta: float, expected_risk: float, power: float) -> int:
    """The fewest accepted examples that are certified with the chance `power`."""

    def reached(errors: int) -> float:
        return float(at_most(errors, fewest_accepted(target_risk, delta, errors), expected_risk))

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
    return fewest_accepted(target_risk, delta, high)


def _chance(
    n: int, coverage: float, target_risk: float, delta: float, expected_risk: float
) -> float:
    """Chance that n calibration examples give the certificate."""
    if coverage == 1:
        accepted = np.array([n])
    else:  # ten standard deviations; what lies outside is below rounding
        reach = 10 * math.sqrt(n * coverage * (1 - coverage)) + 10
        mean = n * coverage
        accepted = np.arange(max(0, math.floor(mean - reach)), min(n, math.ceil(mean + reach)) + 1)
    # Here and not above: it takes two seconds, which a training need not wait for to begin.
    from scipy.stats import binom

    allowed = most_errors(accepted, target_risk, delta)
    kept = at_most(allowed, accepted, expected_risk)
    return float(np.dot(binom.pmf(accepted, n, coverage), kept))
