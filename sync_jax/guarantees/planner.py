"""The size that a calibration split must have."""

import dataclasses
import math

import numpy as np

from sync_jax.guarantees.binomial import at_most, fewest_accepted, first_integer, most_errors
from sync_jax.guarantees.calibration import probability

MOST = 10**12  # no calibration split is larger; far below where float64 skips integers
LOOK_BACK = 16  # sizes below one with the power that are tried again


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """The number of calibration examples that a certificate is likely to need."""

    n_calibration: int  # to hold out
    n_accepted: int  # of them accepted on average, rounded down
    max_errors: int  # with so many errors among these the certificate is still given
    power: float  # chance of the certificate; at least the one asked for


def calibration_size(
    *,
    target_risk: float,
    delta: float,
    expected_risk: float,
    coverage: float = 1.0,
    power: float = 0.8,
    tests: int = 1,
) -> CalibrationPlan:
    """The number of calibration examples to hold out for a target risk.

    The Clopper-Pearson bound meets the target with the chance `power`, if examples are accepted
    with probability `coverage`, independently, and the accepted wrong with expected_risk. At full
    coverage the number is the smallest with that chance. Below, a slightly smaller one may have it
    too: the chance falls a little while the number grows, until one more error is allowed.

    Args:
        target_risk: selective risk to certify.
        delta: chance that the certificate is wrong.
        expected_risk: the selective risk that you expect there, in [0, target_risk).
        coverage: the coverage at which you expect it, in (0, 1].
        power: chance of getting the certificate, in (0, 1).
        tests: between how many tests delta is split: 1 for a fixed threshold or a fixed sequence,
            the number of candidates for Bonferroni, ceil(log2(n + 1)) for SGR, times the number of
            groups.

    Raises:
        ValueError: also if no number up to 10^12 accepted with 10^7 errors is enough.
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
    # Here and not above: it takes two seconds, which a training need not wait for to begin.
    from scipy.stats import binom

    def chance(n: int) -> float:
        """Chance that n calibration examples give the certificate."""
        # Ten standard deviations of how many are accepted; what lies outside is below rounding.
        mean, reach = n * coverage, 10 * math.sqrt(n * coverage * (1 - coverage)) + 10
        accepted = np.arange(max(0, math.floor(mean - reach)), min(n, math.ceil(mean + reach)) + 1)
        kept = at_most(most_errors(accepted, target_risk, share), accepted, expected_risk)
        return float(np.dot(binom.pmf(accepted, n, coverage), kept))

    if coverage < 1:  # n accepted examples take at least n
        high = first_integer(lambda n: chance(n) >= power, n - 1, n)
        n = next(k for k in range(max(n, high - LOOK_BACK), high + 1) if chance(k) >= power)
    n_accepted = math.floor(n * coverage)
    return CalibrationPlan(n, n_accepted, most_errors(n_accepted, target_risk, share), chance(n))


def _fewest_with_power(target_risk: float, delta: float, expected_risk: float, power: float) -> int:
    """The fewest accepted examples that are certified with the chance `power`."""

    # The fewest examples that allow a number of errors are the likeliest to have no more of them,
    # so the answer is one of these sizes. Their power rises with that number, but for rounding,
    # which the last step looks through.
    def enough(errors: int) -> bool:
        if errors > 10**7:
            raise ValueError("expected_risk is too close to target_risk to plan for")
        n = fewest_accepted(target_risk, delta, errors)
        return bool(at_most(errors, n, expected_risk) >= power)

    high = first_integer(enough, -1, 0)
    errors = next(k for k in range(max(0, high - 1000), high + 1) if enough(k))
    return fewest_accepted(target_risk, delta, errors)
