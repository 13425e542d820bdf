"""The curve against hand-computed values and the oracles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics import oracles
from tests.metrics.examples import HAND_TIED, any_loss, rows, split


def test_curve_has_one_point_per_distinct_confidence():
    curve = metrics.risk_coverage_curve(*HAND_TIED)
    np.testing.assert_array_equal(curve.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_array_equal(curve.n_accepted, [1, 3, 4])
    np.testing.assert_array_equal(curve.loss_sum, [0, 1, 2])
    np.testing.assert_array_equal(curve.coverage, [1 / 4, 3 / 4, 1])
    np.testing.assert_array_equal(curve.risk, [0, 1 / 3, 1 / 2])
    assert curve.n_accepted.dtype.kind == "i"
    assert curve.risk.dtype == np.float64


@pytest.mark.parametrize(
    ("coverage", "risk"), [(1, 1 / 2), (0.75, 1 / 3), (0.74, 1 / 3), (0.5, 1 / 4), (0.01, 0)]
)
def test_selective_risk_by_hand(coverage, risk):
    assert metrics.selective_risk(*HAND_TIED, coverage=coverage) == pytest.approx(risk)


def test_selective_risk_takes_an_array_of_coverages():
    coverage = [[1.0, 0.75], [0.5, 0.25]]
    result = metrics.selective_risk(*HAND_TIED, coverage=coverage)
    np.testing.assert_allclose(result, [[1 / 2, 1 / 3], [1 / 4, 0]])
    assert isinstance(metrics.selective_risk(*HAND_TIED, coverage=0.5), float)


@pytest.mark.parametrize("n", [10, 100, 1000, 10_000, 123_456])
def test_rank_of_a_coverage_forgives_rounding(n):
    """Loss 1 at ranks above k shows which k was taken: 0.07 * 100 > 7 in floats, and means 7."""
    percent = np.array([99, 95, 90, 85, 80, 70, 60, 57, 29, 14, 10, 7])
    exact = -(-n * percent // 100)  # ceiling, in integers
    confidence = -np.arange(n)
    for coverage, k in zip(percent / 100, exact, strict=True):
        loss = np.arange(n) >= k
        assert metrics.selective_risk(confidence, loss, coverage=coverage) == 0
        assert metrics.selective_risk(confidence, ~loss, coverage=coverage) == 1
        if k > 1:  # and it isn't fewer than k
            loss = np.arange(n) >= k - 1
            assert metrics.selective_risk(confidence, loss, coverage=coverage) == 1 / k


@given(rows(any_loss, max_size=6))
def test_risks_are_the_average_over_every_order_of_ties(data):
    confidence, loss = split(data)
    n = len(data)
    expected = oracles.risks_by_enumeration(confidence, loss)
    assert metrics.selective_risk(
        confidence, loss, coverage=np.arange(1, n + 1) / n
    ) == pytest.approx(expected, abs=1e-12)
    assert oracles.risks(confidence, loss) == pytest.approx(expected, abs=1e-12)


def test_coverage_at_risk_looks_beyond_a_bump():
    # e_k = 1, 1/2, 1/3, 1/4: the risk falls while coverage grows.
    confidence, loss = [4, 3, 2, 1], [1, 0, 0, 0]
    assert metrics.coverage_at_risk(confidence, loss, risk=0.25) == 1
    assert metrics.coverage_at_risk(confidence, loss, risk=0.24) == 0
    assert metrics.coverage_at_risk([4, 3, 2, 1], [0, 0, 1, 1], risk=1 / 3) == 3 / 4


@given(rows(any_loss), st.floats(0, 2))
def test_coverage_at_risk_matches_the_oracle(data, risk):
    confidence, loss = split(data)
    coverage = metrics.coverage_at_risk(confidence, loss, risk=risk)
    # The oracle rounds differently: a risk within rounding of the target may go either way.
    low, high = (
        oracles.coverage_at_risk(confidence, loss, risk * f) for f in (1 - 1e-11, 1 + 1e-11)
    )
    assert low <= coverage <= high
    if coverage > 0:
        at_coverage = metrics.selective_risk(confidence, loss, coverage=coverage)
        assert at_coverage <= risk * (1 + 1e-11)


@pytest.mark.parametrize("n", range(1, 30))
def test_equal_losses_meet_their_own_risk_at_full_coverage(n):
    """Also where the mean of n times 0.1 rounds to just above 0.1."""
    for confidence in (np.zeros(n), np.arange(n)):
        assert metrics.coverage_at_risk(confidence, np.full(n, 0.1), risk=0.1) == 1
