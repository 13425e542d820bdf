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
    half = calibration_size(target_risk=0.01, delta=0.05, expected_risk=0.0, coverage=0.5)
    assert half.n_calibration == 598
    third = calibration_size(target_risk=0.01, delta=0.05, expected_risk=0.0, coverage=0.3)
    assert third.n_calibration == 997  # 299 of 996.67
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


def test_a_plan_delivers_its_certificates():
    """Simulated: calibration splits of the planned size are certified about as often as planned."""
    plan = calibration_size(target_risk=0.1, delta=0.1, expected_risk=0.06)
    rng = np.random.default_rng(0)
    n, draws = plan.n_accepted, 1000
    hits = sum(
        learn_then_test(
            np.zeros(n), rng.random(n) > 0.06, target_risk=0.1, delta=0.1, thresholds=[0]
        ).feasible
        for _ in range(draws)
    )
    assert abs(hits / draws - plan.power) < 3 * math.sqrt(plan.power * (1 - plan.power) / draws)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"expected_risk": 0.1}, "expected_risk must lie"),
        ({"expected_risk": -0.1}, "expected_risk must lie"),
        ({"expected_risk": 0.1 - 1e-12}, "too close"),
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
