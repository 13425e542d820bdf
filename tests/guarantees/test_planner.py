"""Plans against the closed form, the smallest size found by trying, and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from sync_jax.guarantees import calibration_size, clopper_pearson_upper, learn_then_test


def test_plan_without_errors_is_the_closed_form():
    plan = calibration_size(target_risk=0.01, delta=0.05, expected_risk=0.0)
    assert plan.n_accepted == math.ceil(math.log(0.05) / math.log(0.99)) == 299
    assert (plan.n_calibration, plan.max_errors, plan.power) == (299, 0, 1.0)
    split = calibration_size(target_risk=0.01, delta=0.05, expected_risk=0.0, tests=10)
    assert split.n_accepted == math.ceil(math.log(0.005) / math.log(0.99))


@pytest.mark.parametrize(
    ("target_risk", "delta", "expected_risk", "power", "tests"),
    [
        (0.05, 0.05, 0.03, 0.9, 3),
        (0.1, 0.1, 0.05, 0.8, 1),
        (0.5, 0.5, 0.4, 0.9, 1),
        (0.3, 0.2, 0.1, 0.5, 7),
        (0.9, 0.1, 0.2, 0.99, 1),
    ],
)
def test_plan_is_the_smallest_size_with_the_power(target_risk, delta, expected_risk, power, tests):
    plan = calibration_size(
        target_risk=target_risk,
        delta=delta,
        expected_risk=expected_risk,
        power=power,
        tests=tests,
    )

    def allowed(n):
        """The most errors with which n examples meet the target; -1 where none."""
        bounds = clopper_pearson_upper(np.arange(n + 1), n, delta / tests)
        return int((bounds <= target_risk).sum()) - 1

    assert allowed(plan.n_accepted) == plan.max_errors
    assert plan.power == pytest.approx(
        stats.binom.cdf(plan.max_errors, plan.n_accepted, expected_risk)
    )
    assert plan.power >= power
    smallest = next(
        n for n in range(1, 2000) if stats.binom.cdf(allowed(n), n, expected_risk) >= power
    )
    assert plan.n_accepted == smallest


def chance_by_sum(n, coverage, target_risk, delta, expected_risk):
    """Chance of a certificate: over the number accepted, then over the errors among them."""
    total = 0.0
    for accepted in range(n + 1):
        bounds = clopper_pearson_upper(np.arange(accepted + 1), accepted, delta)
        allowed = int((bounds <= target_risk).sum()) - 1
        total += stats.binom.pmf(accepted, n, coverage) * stats.binom.cdf(
            allowed, accepted, expected_risk
        )
    return total


@pytest.mark.parametrize("coverage", [0.1, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("expected_risk", [0.0, 0.04])
def test_how_many_are_accepted_is_uncertain_too(coverage, expected_risk):
    options = {"target_risk": 0.15, "delta": 0.1, "expected_risk": expected_risk}
    plan = calibration_size(**options, coverage=coverage)
    assert plan.power == pytest.approx(chance_by_sum(plan.n_calibration, coverage, **options))
    assert plan.power >= 0.8
    fewer = plan.n_calibration * 9 // 10
    assert chance_by_sum(fewer, coverage, **options) < 0.8
    assert plan.n_accepted == math.floor(plan.n_calibration * coverage)


@pytest.mark.parametrize("coverage", [1.0, 0.8, 0.5])
def test_a_plan_delivers_its_certificates(coverage):
    """Simulated: calibration splits of the planned size are certified about as often as planned."""
    plan = calibration_size(target_risk=0.1, delta=0.1, expected_risk=0.06, coverage=coverage)
    rng = np.random.default_rng(0)
    n, draws = plan.n_calibration, 1000
    options = {"target_risk": 0.1, "delta": 0.1, "thresholds": [1 - coverage]}
    hits = sum(
        learn_then_test(rng.random(n), correct=rng.random(n) > 0.06, **options).feasible
        for _ in range(draws)
    )
    assert abs(hits / draws - plan.power) < 3 * math.sqrt(plan.power * (1 - plan.power) / draws)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"expected_risk": 0.1}, "expected_risk must lie"),
        ({"expected_risk": -0.1}, "expected_risk must lie"),
        ({"expected_risk": 0.1 - 1e-12}, "too close"),
        ({"target_risk": 1e-17, "expected_risk": 0}, "takes more than 1e\\+12 accepted"),
        ({"target_risk": 1}, "target_risk must lie"),
        ({"delta": 0}, "delta must lie"),
        ({"coverage": 0}, "coverage must lie"),
        ({"power": 1}, "power must lie"),
        ({"tests": 0}, "tests must be at least 1"),
    ],
)
def test_impossible_plans_are_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        calibration_size(**{"target_risk": 0.1, "delta": 0.1, "expected_risk": 0.05, **option})
