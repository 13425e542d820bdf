"""Metrics of a selection against hand-computed values, closed forms, oracles and identities."""

import math
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics import oracles
from tests.metrics.examples import (
    CONVENTIONS,
    HAND,
    HAND_TIED,
    any_loss,
    check_threshold,
    confidences,
    rows,
    split,
    zero_one,
)

# --- Areas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "risks", "fd_shifts"),
    [
        # Risks of the 1 to 4 most confident; the first holds from coverage 0 on.
        (HAND, (0, 1 / 2, 1 / 3, 1 / 2), (1 / 4 + 5 / 12 + 5 / 12) / 4),
        # The points of fd_shifts: (1/4, 0), (3/4, 1/3), (1, 1/2), and (0, 0).
        (HAND_TIED, (0, 1 / 4, 1 / 3, 1 / 2), (1 / 2) * (1 / 6) + (1 / 4) * (5 / 12)),
    ],
)
def test_aurc_by_hand(data, risks, fd_shifts):
    assert metrics.aurc(**data) == pytest.approx(sum(risks) / 4)
    assert metrics.aurc(**data, convention="fd_shifts") == pytest.approx(fd_shifts)
    trapezoid = (risks[0] / 2 + risks[1] + risks[2] + risks[3] / 2) / 3
    assert metrics.aurc(**data, convention="torch_uncertainty") == pytest.approx(trapezoid)


def test_areas_derived_from_aurc_by_hand():
    best = (0 + 0 + 1 / 3 + 1 / 2) / 4
    area = (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    assert metrics.excess_aurc(**HAND) == pytest.approx(area - best)
    assert metrics.normalised_aurc(**HAND) == pytest.approx((area - best) / (1 / 2 - best))
    asymptotic = 1 / 2 + 1 / 2 * math.log(1 / 2)
    assert metrics.excess_aurc(**HAND, convention="fd_shifts") == pytest.approx(
        metrics.aurc(**HAND, convention="fd_shifts") - asymptotic
    )
    # Generalised risks 0, 0, 1/4, 1/4, 1/2 at coverages 0, 1/4, ..., 1.
    assert metrics.augrc(**HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4)
    assert metrics.excess_augrc(**HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4 - 1 / 8)


@metrics.unchecked()
@given(st.integers(0, 60), st.integers(0, 60))
@hypothesis.example(5, 0)
@hypothesis.example(0, 5)
def test_closed_forms_of_perfect_reversed_and_constant(right, wrong):
    n = right + wrong
    hypothesis.assume(n >= 2)  # torch_uncertainty needs two
    error = np.r_[np.zeros(right), np.ones(wrong)]
    perfect, reverse, constant = -np.arange(n), np.arange(n), np.zeros(n)
    r, harmonic = wrong / n, lambda k: sum(Fraction(1, i) for i in range(1, k + 1))
    # Perfect: (k - right)/k for k > right. Reversed: 1 up to k = wrong, then wrong/k.
    best = float((wrong - right * (harmonic(n) - harmonic(right))) / n)
    worst = float((wrong + wrong * (harmonic(n) - harmonic(wrong))) / n)
    assert metrics.aurc(perfect, loss=error) == pytest.approx(best, abs=1e-15)
    assert metrics.aurc(reverse, loss=error) == pytest.approx(worst)
    assert metrics.augrc(perfect, loss=error) == pytest.approx(r**2 / 2)
    assert metrics.augrc(reverse, loss=error) == pytest.approx(r - r**2 / 2)
    assert metrics.augrc(constant, loss=error) == pytest.approx(r / 2)
    for convention in CONVENTIONS:
        assert metrics.aurc(constant, loss=error, convention=convention) == pytest.approx(r)
    assert metrics.excess_aurc(perfect, loss=error) == 0
    assert metrics.excess_augrc(perfect, loss=error) == 0
    if right and wrong:
        assert metrics.normalised_aurc(perfect, loss=error) == 0
        assert metrics.normalised_aurc(constant, loss=error) == pytest.approx(1)
        assert metrics.failure_auroc(perfect, correct=1 - error) == 1
        assert metrics.failure_auroc(reverse, correct=1 - error) == 0
        assert metrics.failure_auroc(constant, correct=1 - error) == 0.5
        assert metrics.fpr_at_tpr(perfect, correct=1 - error) == 0
        assert metrics.fpr_at_tpr(constant, correct=1 - error) == 1
    else:
        assert math.isnan(metrics.normalised_aurc(perfect, loss=error))
        assert math.isnan(metrics.failure_auroc(perfect, correct=1 - error))
        assert math.isnan(metrics.fpr_at_tpr(perfect, correct=1 - error))


@given(rows(any_loss, min_size=2))
def test_areas_match_the_oracles(data):
    confidence, loss = split(data)
    near = {"rel": 1e-12, "abs": 1e-12}
    best = oracles.ranked_best(loss)
    for convention in CONVENTIONS:
        area = oracles.aurc(confidence, loss, convention)
        assert metrics.aurc(confidence, loss=loss, convention=convention) == pytest.approx(
            area, **near
        )
    excess = oracles.aurc(confidence, loss) - oracles.aurc(best, loss)
    assert metrics.excess_aurc(confidence, loss=loss) == pytest.approx(excess, **near)
    room = loss.mean() - oracles.aurc(best, loss)
    if room > 1e-6:
        assert metrics.normalised_aurc(confidence, loss=loss) == pytest.approx(
            excess / room, rel=1e-6
        )
    assert metrics.augrc(confidence, loss=loss) == pytest.approx(
        oracles.augrc(confidence, loss), **near
    )
    assert metrics.excess_augrc(confidence, loss=loss) == pytest.approx(
        oracles.augrc(confidence, loss) - oracles.augrc(best, loss), **near
    )
    if not set(loss) <= {0.0, 1.0}:
        assert metrics.excess_aurc(confidence, loss=loss, convention="fd_shifts") == pytest.approx(
            oracles.aurc(confidence, loss, "fd_shifts") - oracles.aurc(best, loss, "fd_shifts"),
            **near,
        )


@given(rows(zero_one, max_size=30))
def test_augrc_is_a_function_of_auroc_and_accuracy(data):
    """AUGRC = (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 (Traub et al. 2024), exactly."""
    confidence, error = split(data)
    a = 1 - error.mean()
    auroc = metrics.failure_auroc(confidence, correct=1 - error) if 0 < a < 1 else 0.0
    assert metrics.augrc(confidence, loss=error) == pytest.approx(
        (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, abs=1e-14
    )


@given(rows(any_loss))
def test_no_ranking_beats_the_best(data):
    confidence, loss = split(data)
    assert metrics.excess_aurc(confidence, loss=loss) >= -1e-12
    assert metrics.excess_augrc(confidence, loss=loss) >= -1e-12
    assert metrics.excess_aurc(-loss, loss=loss) == 0


# --- The curve ------------------------------------------------------------------------------------


def test_curve_has_one_point_per_distinct_confidence():
    curve = metrics.risk_coverage_curve(**HAND_TIED)
    np.testing.assert_array_equal(curve.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_array_equal(curve.n_accepted, [1, 3, 4])
    np.testing.assert_array_equal(curve.loss_sum, [0, 1, 2])
    np.testing.assert_array_equal(curve.coverage, [1 / 4, 3 / 4, 1])
    np.testing.assert_array_equal(curve.risk, [0, 1 / 3, 1 / 2])
    assert curve.n_accepted.dtype.kind == "i"
    assert curve.risk.dtype == np.float64


def test_selective_risk_by_hand():
    coverage = [[1, 0.75, 0.74], [0.5, 0.25, 0.01]]
    result = metrics.selective_risk(**HAND_TIED, coverage=coverage)
    np.testing.assert_allclose(result, [[1 / 2, 1 / 3, 1 / 3], [1 / 4, 0, 0]])
    assert isinstance(metrics.selective_risk(**HAND_TIED, coverage=0.5), float)


@metrics.unchecked()
@pytest.mark.parametrize("n", [10, 100, 1000, 10_000, 123_456])
def test_rank_of_a_coverage_forgives_rounding(n):
    """Loss 1 at ranks above k shows which k was taken: 0.07 * 100 > 7 in floats, and means 7."""
    percent = np.array([99, 95, 90, 85, 80, 70, 60, 57, 29, 14, 10, 7])
    exact = -(-n * percent // 100)  # ceiling, in integers
    confidence = -np.arange(n)
    for coverage, k in zip(percent / 100, exact, strict=True):
        loss = np.arange(n) >= k
        assert metrics.selective_risk(confidence, loss=loss, coverage=coverage) == 0
        assert metrics.selective_risk(confidence, loss=~loss, coverage=coverage) == 1
        if k > 1:  # and it isn't fewer than k
            loss = np.arange(n) >= k - 1
            assert metrics.selective_risk(confidence, loss=loss, coverage=coverage) == 1 / k


@given(rows(any_loss, max_size=6))
def test_risks_are_the_average_over_every_order_of_ties(data):
    confidence, loss = split(data)
    n = len(data)
    expected = oracles.risks_by_enumeration(confidence, loss)
    assert metrics.selective_risk(
        confidence, loss=loss, coverage=np.arange(1, n + 1) / n
    ) == pytest.approx(expected, abs=1e-12)
    assert oracles.risks(confidence, loss) == pytest.approx(expected, abs=1e-12)


def test_coverage_at_risk_looks_beyond_a_bump():
    # e_k = 1, 1/2, 1/3, 1/4: the risk falls while coverage grows.
    confidence, loss = [4, 3, 2, 1], [1, 0, 0, 0]
    assert metrics.coverage_at_risk(confidence, loss=loss, risk=0.25) == 1
    assert metrics.coverage_at_risk(confidence, loss=loss, risk=0.24) == 0
    assert metrics.coverage_at_risk([4, 3, 2, 1], loss=[0, 0, 1, 1], risk=1 / 3) == 3 / 4


@given(rows(any_loss), st.floats(0, 2))
def test_coverage_at_risk_matches_the_oracle(data, risk):
    confidence, loss = split(data)
    coverage = metrics.coverage_at_risk(confidence, loss=loss, risk=risk)
    # The oracle rounds differently: a risk within rounding of the target may go either way.
    low, high = (
        oracles.coverage_at_risk(confidence, loss, risk * f) for f in (1 - 1e-11, 1 + 1e-11)
    )
    assert low <= coverage <= high
    if coverage > 0:
        at_coverage = metrics.selective_risk(confidence, loss=loss, coverage=coverage)
        assert at_coverage <= risk * (1 + 1e-11)


@pytest.mark.parametrize("n", range(1, 30))
def test_equal_losses_differ_by_rounding_alone(n):
    """The mean of n times 0.1 may round to just above 0.1."""
    loss = np.full(n, 0.1)
    for confidence in (np.zeros(n), np.arange(n)):
        assert metrics.coverage_at_risk(confidence, loss=loss, risk=0.1) == 1
        assert math.isnan(metrics.normalised_aurc(confidence, loss=loss))


# --- Failure detection ----------------------------------------------------------------------------


def test_failure_detection_by_hand():
    confidence, correct = [4, 3, 2, 1, 0], [1, 0, 1, 1, 0]
    assert metrics.failure_auroc(confidence, correct=correct) == pytest.approx(4 / 6)
    assert metrics.fpr_at_tpr(confidence, correct=correct) == 1 / 2  # needs all three correct ones
    assert metrics.fpr_at_tpr(confidence, correct=correct, tpr=1 / 3) == 0
    assert metrics.fpr_at_tpr(confidence, correct=correct, tpr=0.5) == 1 / 2


@given(rows(zero_one, max_size=30), st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_failure_detection_matches_the_oracles_and_scikit_learn(data, tpr):
    confidence, correct = split(data)
    auroc = metrics.failure_auroc(confidence, correct=correct)
    assert auroc == pytest.approx(oracles.failure_auroc(confidence, correct), nan_ok=True)
    assert metrics.fpr_at_tpr(confidence, correct=correct, tpr=tpr) == pytest.approx(
        oracles.fpr_at_tpr(confidence, correct, tpr), nan_ok=True
    )
    if 0 < correct.mean() < 1:
        finite = np.clip(confidence, -5, 5)  # scikit-learn refuses infinities
        assert auroc == pytest.approx(sklearn.metrics.roc_auc_score(correct, finite))


# --- Thresholds -----------------------------------------------------------------------------------


@given(rows(zero_one, max_size=20), st.lists(confidences, min_size=1, max_size=5))
def test_threshold_table_counts_what_a_threshold_does(data, thresholds):
    confidence, error = split(data)
    table = metrics.threshold_table(confidence, loss=error, thresholds=thresholds)
    for i, threshold in enumerate(thresholds):
        accepted = confidence >= threshold
        assert table.threshold[i] == threshold
        assert table.n_accepted[i] == accepted.sum()
        assert table.n_errors[i] == error[accepted].sum()
        assert table.n_rejected[i] == (~accepted).sum()
        assert table.n_rejected_errors[i] == error[~accepted].sum()
        single = metrics.deployed(confidence, loss=error, threshold=threshold)
        assert single.n_accepted == table.n_accepted[i]
        assert single.n_errors == table.n_errors[i]
        np.testing.assert_equal(single.coverage, table.coverage[i])
        np.testing.assert_equal(single.risk, table.risk[i])


def test_threshold_table_defaults_to_every_distinct_confidence():
    table = metrics.threshold_table(**HAND_TIED)
    np.testing.assert_array_equal(table.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_array_equal(table.n_errors, [0, 1, 2])
    np.testing.assert_array_equal(table.n_rejected_errors, [2, 1, 0])
    assert table.n_errors.dtype.kind == "i"


def test_deployed_by_hand():
    result = metrics.deployed([0.9, 0.5, 0.5, 0.1], loss=[0.0, 0.5, 2.0, 4.0], threshold=0.5)
    assert result == metrics.Deployed(
        threshold=0.5, coverage=0.75, risk=2.5 / 3, n=4, n_accepted=3, n_errors=2, loss_sum=2.5
    )
    for nothing in (
        metrics.deployed(**HAND, threshold=None),
        metrics.deployed(**HAND, threshold=2),
    ):
        assert (nothing.coverage, nothing.n_accepted, nothing.n_errors) == (0, 0, 0)
        assert math.isnan(nothing.risk)
    assert metrics.deployed(**HAND, threshold=-math.inf).coverage == 1


@given(st.lists(confidences, min_size=1, max_size=30), st.floats(0.001, 1))
def test_threshold_for_coverage_is_the_largest_that_suffices(confidence, coverage):
    threshold = metrics.threshold_for_coverage(confidence, coverage=coverage)
    n = len(confidence)
    check_threshold(threshold, confidence)
    assert sum(c >= threshold for c in confidence) >= coverage * n - 1e-9
    lowest = min(c for c in confidence if c >= threshold)
    assert sum(c > lowest for c in confidence) < coverage * n
