"""The metrics against hand-computed values, closed forms, oracles, identities and scikit-learn."""

import math
import subprocess
import sys

import numpy as np
import oracles
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_jax import metrics

settings.register_profile("sync_jax", deadline=None)  # shared machines pause at will
settings.load_profile("sync_jax")

CONVENTIONS = ("mean", "fd_shifts", "torch_uncertainty")
LOSS_METRICS = (
    metrics.aurc,
    metrics.excess_aurc,
    metrics.normalised_aurc,
    metrics.augrc,
    metrics.excess_augrc,
)
CORRECT_METRICS = (metrics.failure_auroc, metrics.fpr_at_tpr)

# Few distinct confidences, so that most examples tie; infinities and both zeros among them.
confidences = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0, math.inf])
zero_one = st.sampled_from([0.0, 1.0])
any_loss = st.one_of(zero_one, st.floats(1e-3, 10))


def rows(loss, min_size=1, max_size=12):
    """Data sets as lists of (confidence, loss)."""
    return st.lists(st.tuples(confidences, loss), min_size=min_size, max_size=max_size)


def split(data):
    confidence, loss = (np.array(column) for column in zip(*data, strict=True))
    return confidence, loss


def example(n, seed=0, ties=False):
    """Confidence with some relation to the error."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    error = (rng.random(n) > 0.5 + confidence / 2).astype(float)
    return (np.round(confidence, 1) if ties else confidence), error


# --- Hand-computed --------------------------------------------------------------------------------

# Most confident first: right, wrong, right, wrong; e_k = 0, 1/2, 1/3, 1/2.
HAND = ([0.9, 0.7, 0.4, 0.1], [0, 1, 0, 1])
# A tie of right and wrong in the middle: e_k = 0, 1/4, 1/3, 1/2 in expectation.
HAND_TIED = ([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1])


def test_aurc_by_hand():
    assert metrics.aurc(*HAND) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert metrics.aurc(*HAND, convention="fd_shifts") == pytest.approx(
        (0 + (0 + 1 / 2) / 2 + (1 / 2 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 4
    )
    assert metrics.aurc(*HAND, convention="torch_uncertainty") == pytest.approx(
        ((0 + 1 / 2) / 2 + (1 / 2 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 3
    )


def test_aurc_with_a_tie_by_hand():
    assert metrics.aurc(*HAND_TIED) == pytest.approx((0 + 1 / 4 + 1 / 3 + 1 / 2) / 4)
    # The points of fd_shifts: (1/4, 0), (3/4, 1/3), (1, 1/2), and (0, 0).
    assert metrics.aurc(*HAND_TIED, convention="fd_shifts") == pytest.approx(
        0 + (1 / 2) * (1 / 3) / 2 + (1 / 4) * (1 / 3 + 1 / 2) / 2
    )
    assert metrics.aurc(*HAND_TIED, convention="torch_uncertainty") == pytest.approx(
        ((0 + 1 / 4) / 2 + (1 / 4 + 1 / 3) / 2 + (1 / 3 + 1 / 2) / 2) / 3
    )


def test_areas_derived_from_aurc_by_hand():
    best = (0 + 0 + 1 / 3 + 1 / 2) / 4
    area = (0 + 1 / 2 + 1 / 3 + 1 / 2) / 4
    assert metrics.excess_aurc(*HAND) == pytest.approx(area - best)
    assert metrics.normalised_aurc(*HAND) == pytest.approx((area - best) / (1 / 2 - best))
    asymptotic = 1 / 2 + 1 / 2 * math.log(1 / 2)
    assert metrics.excess_aurc(*HAND, convention="fd_shifts") == pytest.approx(
        metrics.aurc(*HAND, convention="fd_shifts") - asymptotic
    )
    # Generalised risks 0, 0, 1/4, 1/4, 1/2 at coverages 0, 1/4, ..., 1.
    assert metrics.augrc(*HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4)
    assert metrics.excess_augrc(*HAND) == pytest.approx((1 / 8 + 1 / 4 + 3 / 8) / 4 - 1 / 8)


def test_curve_has_one_point_per_distinct_confidence():
    curve = metrics.risk_coverage_curve(*HAND_TIED)
    np.testing.assert_array_equal(curve.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_array_equal(curve.n_accepted, [1, 3, 4])
    np.testing.assert_array_equal(curve.loss_sum, [0, 1, 2])
    np.testing.assert_array_equal(curve.coverage, [1 / 4, 3 / 4, 1])
    np.testing.assert_array_equal(curve.risk, [0, 1 / 3, 1 / 2])
    assert curve.n_accepted.dtype.kind == "i"
    assert curve.risk.dtype == np.float64


def test_failure_detection_by_hand():
    confidence, correct = [4, 3, 2, 1, 0], [1, 0, 1, 1, 0]
    assert metrics.failure_auroc(confidence, correct) == pytest.approx(4 / 6)
    assert metrics.fpr_at_tpr(confidence, correct) == 1 / 2  # needs all three correct ones
    assert metrics.fpr_at_tpr(confidence, correct, tpr=1 / 3) == 0
    assert metrics.fpr_at_tpr(confidence, correct, tpr=0.5) == 1 / 2


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


def test_coverage_at_risk_looks_beyond_a_bump():
    # e_k = 1, 1/2, 1/3, 1/4: the risk falls while coverage grows.
    confidence, loss = [4, 3, 2, 1], [1, 0, 0, 0]
    assert metrics.coverage_at_risk(confidence, loss, risk=0.25) == 1
    assert metrics.coverage_at_risk(confidence, loss, risk=0.24) == 0
    assert metrics.coverage_at_risk([4, 3, 2, 1], [0, 0, 1, 1], risk=1 / 3) == 3 / 4


# --- Closed forms ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "wrong"), [(7, 3), (1, 9), (40, 1), (5, 0), (0, 5)])
def test_closed_forms_of_perfect_reversed_and_constant(right, wrong):
    n = right + wrong
    error = np.r_[np.zeros(right), np.ones(wrong)]
    perfect, reverse, constant = -np.arange(n), np.arange(n), np.zeros(n)
    r, harmonic = wrong / n, lambda k: sum(1 / i for i in range(1, k + 1))
    # Perfect: (k - right)/k for k > right. Reversed: 1 up to k = wrong, then wrong/k.
    best = (wrong - right * (harmonic(n) - harmonic(right))) / n
    worst = (wrong + wrong * (harmonic(n) - harmonic(wrong))) / n
    assert metrics.aurc(perfect, error) == pytest.approx(best, abs=1e-15)
    assert metrics.aurc(reverse, error) == pytest.approx(worst)
    assert metrics.augrc(perfect, error) == pytest.approx(r**2 / 2)
    assert metrics.augrc(reverse, error) == pytest.approx(r - r**2 / 2)
    assert metrics.augrc(constant, error) == pytest.approx(r / 2)
    for convention in CONVENTIONS:
        assert metrics.aurc(constant, error, convention=convention) == pytest.approx(r)
    assert metrics.excess_aurc(perfect, error) == 0
    assert metrics.excess_augrc(perfect, error) == 0
    if right and wrong:
        assert metrics.normalised_aurc(perfect, error) == 0
        assert metrics.normalised_aurc(constant, error) == pytest.approx(1)
        assert metrics.failure_auroc(perfect, 1 - error) == 1
        assert metrics.failure_auroc(reverse, 1 - error) == 0
        assert metrics.failure_auroc(constant, 1 - error) == 0.5
        assert metrics.fpr_at_tpr(perfect, 1 - error) == 0
        assert metrics.fpr_at_tpr(constant, 1 - error) == 1
    else:
        assert math.isnan(metrics.normalised_aurc(perfect, error))
        assert math.isnan(metrics.failure_auroc(perfect, 1 - error))
        assert math.isnan(metrics.fpr_at_tpr(perfect, 1 - error))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
def test_equal_losses_leave_nothing_to_normalise(n):
    """0.1 n / n needn't be 0.1 in floats; the quotient of two rounding errors means nothing."""
    assert math.isnan(metrics.normalised_aurc(np.arange(n), np.full(n, 0.1)))


def test_random_ranking_has_the_full_coverage_risk_on_average():
    error = np.r_[np.zeros(30), np.ones(10)]
    rng = np.random.default_rng(0)
    areas = [metrics.aurc(rng.permutation(40), error) for _ in range(2000)]
    assert abs(np.mean(areas) - 0.25) < 3 * np.std(areas) / math.sqrt(2000)


def test_conventions_agree_for_many_examples_and_differ_for_few():
    areas = [metrics.aurc(*example(100_000), convention=c) for c in CONVENTIONS]
    np.testing.assert_allclose(areas, areas[0], rtol=1e-3)
    few = [metrics.aurc(*HAND, convention=c) for c in CONVENTIONS]
    assert len({round(area, 6) for area in few}) == 3


def test_excess_of_fd_shifts_tends_to_that_of_mean():
    confidence, error = example(200_000)
    assert metrics.excess_aurc(confidence, error) == pytest.approx(
        metrics.excess_aurc(confidence, error, convention="fd_shifts"), abs=1e-4
    )


# --- Oracles and identities -----------------------------------------------------------------------


@given(rows(any_loss, max_size=6))
def test_risks_are_the_average_over_every_order_of_ties(data):
    confidence, loss = split(data)
    n = len(data)
    expected = oracles.risks_by_enumeration(confidence, loss)
    assert metrics.selective_risk(
        confidence, loss, coverage=np.arange(1, n + 1) / n
    ) == pytest.approx(expected, abs=1e-12)
    assert oracles.risks(confidence, loss) == pytest.approx(expected, abs=1e-12)


@given(rows(any_loss, min_size=2))
def test_areas_match_the_oracles(data):
    confidence, loss = split(data)
    near = {"rel": 1e-12, "abs": 1e-12}
    best = oracles.ranked_best(loss)
    for convention in CONVENTIONS:
        area = oracles.aurc(confidence, loss, convention)
        assert metrics.aurc(confidence, loss, convention=convention) == pytest.approx(area, **near)
    excess = oracles.aurc(confidence, loss) - oracles.aurc(best, loss)
    assert metrics.excess_aurc(confidence, loss) == pytest.approx(excess, **near)
    room = loss.mean() - oracles.aurc(best, loss)
    if room > 1e-6:
        assert metrics.normalised_aurc(confidence, loss) == pytest.approx(excess / room, rel=1e-6)
    assert metrics.augrc(confidence, loss) == pytest.approx(oracles.augrc(confidence, loss), **near)
    assert metrics.excess_augrc(confidence, loss) == pytest.approx(
        oracles.augrc(confidence, loss) - oracles.augrc(best, loss), **near
    )
    if not set(loss) <= {0.0, 1.0}:
        assert metrics.excess_aurc(confidence, loss, convention="fd_shifts") == pytest.approx(
            oracles.aurc(confidence, loss, "fd_shifts") - oracles.aurc(best, loss, "fd_shifts"),
            **near,
        )


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


@given(rows(zero_one, max_size=30), st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_failure_detection_matches_the_oracles_and_scikit_learn(data, tpr):
    confidence, correct = split(data)
    auroc = metrics.failure_auroc(confidence, correct)
    assert auroc == pytest.approx(oracles.failure_auroc(confidence, correct), nan_ok=True)
    assert metrics.fpr_at_tpr(confidence, correct, tpr=tpr) == pytest.approx(
        oracles.fpr_at_tpr(confidence, correct, tpr), nan_ok=True
    )
    if 0 < correct.mean() < 1:
        finite = np.clip(confidence, -5, 5)  # scikit-learn refuses infinities
        assert auroc == pytest.approx(sklearn.metrics.roc_auc_score(correct, finite))


@given(rows(zero_one, max_size=30))
def test_augrc_is_a_function_of_auroc_and_accuracy(data):
    """AUGRC = (1 - AUROC) a (1 - a) + (1 - a)^2 / 2 (Traub et al. 2024), exactly."""
    confidence, error = split(data)
    a = 1 - error.mean()
    auroc = metrics.failure_auroc(confidence, 1 - error) if 0 < a < 1 else 0.0
    assert metrics.augrc(confidence, error) == pytest.approx(
        (1 - auroc) * a * (1 - a) + (1 - a) ** 2 / 2, abs=1e-14
    )


@given(rows(any_loss))
def test_no_ranking_beats_the_best(data):
    confidence, loss = split(data)
    assert metrics.excess_aurc(confidence, loss) >= -1e-12
    assert metrics.excess_augrc(confidence, loss) >= -1e-12
    assert metrics.excess_aurc(-loss, loss) == 0


@given(rows(any_loss, min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_nothing_depends_on_the_order_of_the_input(data, random):
    shuffled = list(data)
    random.shuffle(shuffled)
    a, b = split(data), split(shuffled)
    for metric in LOSS_METRICS:
        np.testing.assert_equal(metric(*a), metric(*b))
    for convention in CONVENTIONS:
        assert metrics.aurc(*a, convention=convention) == metrics.aurc(*b, convention=convention)
    coverage = np.linspace(0.05, 1, 20)
    assert np.array_equal(
        metrics.selective_risk(*a, coverage=coverage), metrics.selective_risk(*b, coverage=coverage)
    )
    curves = metrics.risk_coverage_curve(*a), metrics.risk_coverage_curve(*b)
    for field in ("coverage", "risk", "threshold", "n_accepted", "loss_sum"):
        first, second = (getattr(curve, field) for curve in curves)
        assert first.tobytes() == second.tobytes()  # to the last bit, and the sign of zero
    assert repr(metrics.deployed(*a, threshold=0.25)) == repr(metrics.deployed(*b, threshold=0.25))


def test_the_order_of_the_input_does_not_even_change_the_rounding():
    """Many different losses per tie, so that any order of summation but one would show."""
    rng = np.random.default_rng(0)
    confidence, loss = rng.integers(3, size=1000) / 2, rng.exponential(size=1000)
    plain = metrics.risk_coverage_curve(confidence, loss).loss_sum
    for _ in range(10):
        order = rng.permutation(1000)
        curve = metrics.risk_coverage_curve(confidence[order], loss[order])
        assert np.array_equal(curve.loss_sum, plain)


@given(rows(any_loss, min_size=2, max_size=40))
def test_only_the_ranking_matters(data):
    confidence, loss = split(data)
    transformed = np.tanh(np.clip(confidence, -3, 3)) * 100 + 7
    assert metrics.aurc(confidence, loss) == metrics.aurc(transformed, loss)
    for metric in LOSS_METRICS:
        np.testing.assert_equal(metric(confidence, loss), metric(transformed, loss))
    correct = loss == 0
    for metric in CORRECT_METRICS:
        np.testing.assert_equal(metric(confidence, correct), metric(transformed, correct))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, bool])
def test_any_numeric_dtype_is_taken_in_float64(dtype):
    confidence = np.array([3, 2, 1, 0]).astype(dtype)
    wide = confidence.astype(np.float64)
    assert metrics.aurc(confidence, [0, 1, 0, 1]) == metrics.aurc(wide, [0, 1, 0, 1])


# --- Thresholds -----------------------------------------------------------------------------------


@given(rows(zero_one, max_size=20), st.lists(confidences, min_size=1, max_size=5))
def test_threshold_table_counts_what_a_threshold_does(data, thresholds):
    confidence, error = split(data)
    table = metrics.threshold_table(confidence, error, thresholds=thresholds)
    for i, threshold in enumerate(thresholds):
        accepted = confidence >= threshold
        assert table.threshold[i] == threshold
        assert table.n_accepted[i] == accepted.sum()
        assert table.n_errors[i] == error[accepted].sum()
        assert table.n_rejected[i] == (~accepted).sum()
        assert table.n_rejected_errors[i] == error[~accepted].sum()
        single = metrics.deployed(confidence, error, threshold=threshold)
        assert single.n_accepted == table.n_accepted[i]
        assert single.n_errors == table.n_errors[i]
        np.testing.assert_equal(single.coverage, table.coverage[i])
        np.testing.assert_equal(single.risk, table.risk[i])


def test_threshold_table_defaults_to_every_distinct_confidence():
    table = metrics.threshold_table(*HAND_TIED)
    np.testing.assert_array_equal(table.threshold, [0.9, 0.5, 0.1])
    np.testing.assert_array_equal(table.n_errors, [0, 1, 2])
    np.testing.assert_array_equal(table.n_rejected_errors, [2, 1, 0])
    assert table.n_errors.dtype.kind == "i"


def test_deployed_by_hand():
    result = metrics.deployed([0.9, 0.5, 0.5, 0.1], [0.0, 0.5, 2.0, 4.0], threshold=0.5)
    assert result == metrics.Deployed(
        threshold=0.5, coverage=0.75, risk=2.5 / 3, n=4, n_accepted=3, n_errors=2, loss_sum=2.5
    )
    for nothing in (metrics.deployed(*HAND, threshold=None), metrics.deployed(*HAND, threshold=2)):
        assert (nothing.coverage, nothing.n_accepted, nothing.n_errors) == (0, 0, 0)
        assert math.isnan(nothing.risk)
    assert metrics.deployed(*HAND, threshold=-math.inf).coverage == 1


@given(st.lists(confidences, min_size=1, max_size=30), st.floats(0.001, 1))
def test_threshold_for_coverage_is_the_largest_that_suffices(confidence, coverage):
    threshold = metrics.threshold_for_coverage(confidence, coverage=coverage)
    n = len(confidence)
    assert threshold in confidence
    assert sum(c >= threshold for c in confidence) >= coverage * n - 1e-9
    assert sum(c > threshold for c in confidence) < coverage * n


# --- Probabilities --------------------------------------------------------------------------------


def predictions(n=500, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, 0.5), size=n)
    return p, np.array([rng.choice(classes, p=row) for row in p])


@pytest.mark.parametrize("classes", [2, 4])
def test_probability_metrics_match_scikit_learn(classes):
    p, y = predictions(classes=classes)
    names = list(range(classes))
    assert metrics.accuracy(p, y) == sklearn.metrics.accuracy_score(y, p.argmax(1))
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(
        sklearn.metrics.log_loss(y, p, labels=names)
    )
    assert metrics.brier(p, y) == pytest.approx(
        sklearn.metrics.brier_score_loss(y, p, labels=names, scale_by_half=False)
    )


def test_probability_metrics_by_hand():
    p, y = [[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], [1, 1]
    assert metrics.accuracy(p, y) == 0.5
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(math.log(4) / 2)
    assert metrics.brier(p, y) == pytest.approx((0.25 + 0.5625 + 0.0625) / 2)


def test_a_label_of_probability_zero_costs_infinity_or_the_floor():
    assert metrics.negative_log_likelihood([[1.0, 0.0]], [1]) == math.inf
    assert metrics.negative_log_likelihood([[1.0, 0.0]], [1], floor=math.exp(-7)) == pytest.approx(
        7
    )


@pytest.mark.parametrize("bins", [1, 2, 5, 15])
def test_calibration_error_by_width_matches_the_oracle(bins):
    p, y = predictions()
    p = np.round(p * 20) / 20  # on the edges of the bins
    p[:, 0] += 1 - p.sum(1)
    p = p[(p >= 0).all(1)]
    y = y[: len(p)]
    result = metrics.expected_calibration_error(p, y, bins=bins)
    expected = oracles.calibration_error_by_width(p.max(1), p.argmax(1) == y, bins)
    assert result.value == pytest.approx(expected, abs=1e-12)
    assert (result.binning, result.bins) == ("width", bins)
    assert result.count.sum() == len(p)
    assert (result.count > 0).all()
    assert (np.diff(result.confidence) > 0).all()


def test_calibration_error_by_mass_by_hand():
    top, correct = [0.6, 0.7, 0.8, 0.9], [1, 0, 1, 1]
    p, y = [[1 - c, c] for c in top], correct
    result = metrics.expected_calibration_error(p, y, binning="mass", bins=2)
    np.testing.assert_allclose(result.confidence, [0.65, 0.85])
    np.testing.assert_allclose(result.accuracy, [0.5, 1.0])
    np.testing.assert_array_equal(result.count, [2, 2])
    assert result.value == pytest.approx((0.15 + 0.15) / 2)
    assert result.binning == "mass"


def test_calibration_error_by_mass_spreads_a_tie_over_its_bins():
    """Eight equal confidences, half of them right, in any order: both bins see accuracy 1/2."""
    p = np.tile([0.25, 0.75], (8, 1))
    for y in ([1, 1, 1, 1, 0, 0, 0, 0], [0, 1, 0, 1, 0, 1, 0, 1]):
        result = metrics.expected_calibration_error(p, y, binning="mass", bins=2)
        np.testing.assert_allclose(result.accuracy, [0.5, 0.5])
        assert result.value == pytest.approx(0.25)


@pytest.mark.parametrize("binning", ["width", "mass"])
def test_calibration_error_of_certain_and_right_is_zero(binning):
    result = metrics.expected_calibration_error(np.eye(3), [0, 1, 2], binning=binning)
    assert result.value == 0
    assert result.count.sum() == 3


def test_more_bins_by_mass_than_examples():
    result = metrics.expected_calibration_error([[0.4, 0.6], [0.1, 0.9]], [1, 1], binning="mass")
    np.testing.assert_allclose(result.confidence, [0.6, 0.9])
    assert result.value == pytest.approx(0.25)


# --- Bootstrap ------------------------------------------------------------------------------------

ALL_METRICS = (
    *((metric, {}) for metric in LOSS_METRICS),
    (metrics.aurc, {"convention": "fd_shifts"}),
    (metrics.aurc, {"convention": "torch_uncertainty"}),
    (metrics.excess_aurc, {"convention": "fd_shifts"}),
    (metrics.selective_risk, {"coverage": 0.7}),
    (metrics.coverage_at_risk, {"risk": 0.2}),
    *((metric, {}) for metric in CORRECT_METRICS),
)


@pytest.mark.parametrize(("metric", "options"), ALL_METRICS)
@pytest.mark.parametrize("ties", [False, True])
def test_vectorised_bootstrap_equals_the_plain_loop(metric, options, ties):
    """A wrapped metric is called per resample; the module's own run on all of them at once."""
    confidence, loss = example(60, ties=ties)
    plain = metrics.bootstrap_interval(lambda c, x: metric(c, x, **options), confidence, loss)
    fast = metrics.bootstrap_interval(metric, confidence, loss, **options)
    assert fast.estimate == plain.estimate == metric(confidence, loss, **options)
    assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-12)
    assert fast.lower <= fast.estimate <= fast.upper
    assert fast.lower < fast.upper


@given(rows(any_loss, min_size=2, max_size=8))
@settings(max_examples=30)
def test_vectorised_bootstrap_of_any_loss(data):
    confidence, loss = split(data)
    for metric in (metrics.aurc, metrics.excess_aurc, metrics.augrc):
        plain = metrics.bootstrap_interval(lambda *a: metric(*a), confidence, loss, resamples=20)  # noqa: B023
        fast = metrics.bootstrap_interval(metric, confidence, loss, resamples=20)
        assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-11)


def test_bootstrap_is_seeded_blockwise_and_independent_of_the_input_order(monkeypatch):
    confidence, error = example(300, ties=True)
    first = metrics.bootstrap_interval(metrics.aurc, confidence, error, resamples=50)
    order = np.random.default_rng(1).permutation(300)
    assert first == metrics.bootstrap_interval(
        metrics.aurc, confidence[order], error[order], resamples=50
    )
    assert first != metrics.bootstrap_interval(
        metrics.aurc, confidence, error, resamples=50, seed=1
    )
    monkeypatch.setattr(metrics, "_BLOCK", 1)  # one resample at a time
    assert first == metrics.bootstrap_interval(metrics.aurc, confidence, error, resamples=50)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    error = np.r_[np.zeros(900), np.ones(100)]
    interval = metrics.bootstrap_interval(
        metrics.selective_risk, np.zeros(1000), error, coverage=1.0, resamples=4000
    )
    half = 1.96 * math.sqrt(0.1 * 0.9 / 1000)
    assert interval.lower == pytest.approx(0.1 - half, abs=2e-3)
    assert interval.upper == pytest.approx(0.1 + half, abs=2e-3)
    assert (interval.level, interval.resamples, interval.undefined) == (0.95, 4000, 0)


@pytest.mark.slow
def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    """The AUROC of normal scores shifted by 1 is Phi(1 / sqrt 2), known without estimation."""
    truth = 0.5 * (1 + math.erf(0.5))
    rng = np.random.default_rng(0)
    draws, hits = 300, 0
    for _ in range(draws):
        correct = rng.random(200) < 0.7
        confidence = rng.normal(size=200) + correct
        interval = metrics.bootstrap_interval(
            metrics.failure_auroc, confidence, correct, level=0.9, resamples=200
        )
        hits += interval.lower <= truth <= interval.upper
    assert abs(hits / draws - 0.9) < 3 * math.sqrt(0.9 * 0.1 / draws) + 0.01


def test_undefined_resamples_are_left_out_and_counted():
    interval = metrics.bootstrap_interval(metrics.failure_auroc, [3, 2, 1, 0], [1, 1, 0, 1])
    share = (3 / 4) ** 4 + (1 / 4) ** 4  # no error drawn, or nothing else
    assert interval.undefined == pytest.approx(1000 * share, abs=3 * math.sqrt(1000 * share))
    assert 0 <= interval.lower <= interval.upper <= 1
    never = metrics.bootstrap_interval(metrics.failure_auroc, [3, 2], [1, 1])
    assert never.undefined == never.resamples
    assert math.isnan(never.lower)


def test_paired_interval_of_a_method_with_itself_is_zero():
    confidence, error = example(200)
    interval = metrics.paired_bootstrap_interval(
        metrics.aurc, confidence, error, 2 * confidence, error
    )
    assert (interval.estimate, interval.lower, interval.upper) == (0, 0, 0)


def test_paired_interval_sees_what_separate_ones_do_not():
    """Slightly noisier scores on the same errors: the pairs cancel most of the variance."""
    confidence, error = example(2000)
    noisy = confidence + np.random.default_rng(1).normal(scale=0.15, size=2000)
    paired = metrics.paired_bootstrap_interval(metrics.aurc, noisy, error, confidence, error)
    assert paired.estimate == pytest.approx(
        metrics.aurc(noisy, error) - metrics.aurc(confidence, error)
    )
    assert 0 < paired.lower < paired.estimate < paired.upper
    a = metrics.bootstrap_interval(metrics.aurc, noisy, error)
    b = metrics.bootstrap_interval(metrics.aurc, confidence, error)
    assert a.lower < b.upper  # the separate intervals overlap
    order = np.random.default_rng(2).permutation(2000)
    assert paired == metrics.paired_bootstrap_interval(
        metrics.aurc, noisy[order], error[order], confidence[order], error[order]
    )


def test_paired_interval_matches_a_plain_loop():
    confidence_a, error = example(50, ties=True)
    confidence_b = np.random.default_rng(3).random(50)
    args = (confidence_a, error, confidence_b, 1 - error)
    fast = metrics.paired_bootstrap_interval(metrics.augrc, *args, resamples=100)
    plain = metrics.paired_bootstrap_interval(lambda *a: metrics.augrc(*a), *args, resamples=100)
    assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-12)


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("confidence", "loss", "message"),
    [
        ([], [], "confidence is empty"),
        ([0.1, math.nan], [0, 1], "confidence contains NaN"),
        ([0.1, 0.2], [0, math.nan], "loss contains NaN"),
        ([0.1, 0.2], [0], r"loss has shape \(1,\) but confidence \(2,\)"),
        ([[0.1, 0.2]], [0, 1], r"confidence must have shape \[n\]"),
        ([0.1, 0.2], [[0, 1]], r"loss must have shape \[n\]"),
        ([0.1, 0.2], [0, -1], "loss must be finite and non-negative"),
        ([0.1, 0.2], [0, math.inf], "loss must be finite and non-negative"),
        (["a", "b"], [0, 1], "confidence must be an array of real numbers"),
        ([0.1, 0.2], None, "loss"),
    ],
)
def test_bad_input_is_refused_by_name(confidence, loss, message):
    calls = [
        *LOSS_METRICS,
        metrics.risk_coverage_curve,
        metrics.threshold_table,
        lambda c, x: metrics.selective_risk(c, x, coverage=0.5),
        lambda c, x: metrics.coverage_at_risk(c, x, risk=0.5),
        lambda c, x: metrics.deployed(c, x, threshold=0.5),
        lambda c, x: metrics.bootstrap_interval(metrics.aurc, c, x),
        lambda c, x: metrics.paired_bootstrap_interval(metrics.aurc, c, x, c, x),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(confidence, loss)


@pytest.mark.parametrize("metric", CORRECT_METRICS)
def test_correct_must_be_zero_or_one(metric):
    with pytest.raises(ValueError, match="correct must hold only 0 and 1"):
        metric([1, 2], [0, 0.5])
    with pytest.raises(ValueError, match="correct has shape"):
        metric([1, 2], [0])


@pytest.mark.parametrize("coverage", [0, -0.1, 1.0001, math.nan, [0.5, 0.0], math.inf])
def test_coverage_outside_its_range_is_refused(coverage):
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\]"):
        metrics.selective_risk(*HAND, coverage=coverage)
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\]"):
        metrics.threshold_for_coverage(HAND[0], coverage=coverage)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.aurc(*HAND, convention="median"), "convention 'median'"),
        (lambda: metrics.aurc([1], [0], convention="torch_uncertainty"), "two examples"),
        (lambda: metrics.excess_aurc(*HAND, convention="torch_uncertainty"), "no excess"),
        (lambda: metrics.coverage_at_risk(*HAND, risk=-0.1), "risk must be non-negative"),
        (lambda: metrics.coverage_at_risk(*HAND, risk=math.nan), "risk must be non-negative"),
        (lambda: metrics.fpr_at_tpr(*HAND, tpr=0), "tpr must lie"),
        (lambda: metrics.deployed(*HAND, threshold=math.nan), "threshold is NaN"),
        (lambda: metrics.threshold_table([1], [0.5]), "loss must be 0/1"),
        (lambda: metrics.threshold_table(*HAND, thresholds=[]), "thresholds is empty"),
        (lambda: metrics.threshold_for_coverage([], coverage=1), "confidence is empty"),
        (lambda: metrics.bootstrap_interval(metrics.aurc, *HAND, level=1), "level must lie"),
        (lambda: metrics.bootstrap_interval(metrics.aurc, *HAND, resamples=0), "resamples must"),
        (
            lambda: metrics.paired_bootstrap_interval(metrics.aurc, *HAND, [1], [0]),
            "confidence_b has 1 examples but confidence_a 4",
        ),
    ],
)
def test_bad_options_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([], [], "probabilities must have shape"),
        ([0.5, 0.5], [0, 1], "probabilities must have shape"),
        ([[0.5, 0.6]], [0], "each row summing to 1"),
        ([[1.5, -0.5]], [0], "must lie in"),
        ([[math.nan, 1.0]], [0], "without NaN"),
        ([["a", "b"]], [0], "probabilities must be an array"),
        ([[0.5, 0.5]], [0, 1], "labels has shape"),
        ([[0.5, 0.5]], [2], "labels must be integers"),
        ([[0.5, 0.5]], [-1], "labels must be integers"),
        ([[0.5, 0.5]], [0.0], "labels must be integers"),
    ],
)
def test_bad_probabilities_are_refused_by_name(probabilities, labels, message):
    for call in (
        metrics.accuracy,
        metrics.negative_log_likelihood,
        metrics.brier,
        metrics.expected_calibration_error,
    ):
        with pytest.raises(ValueError, match=message):
            call(probabilities, labels)


def test_bad_probability_options_are_refused_by_name():
    with pytest.raises(ValueError, match="binning 'kernel'"):
        metrics.expected_calibration_error([[1.0]], [0], binning="kernel")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        metrics.expected_calibration_error([[1.0]], [0], bins=0)
    with pytest.raises(ValueError, match="floor must lie"):
        metrics.negative_log_likelihood([[1.0]], [0], floor=-1)


@pytest.mark.parametrize("module", ["metrics", "guarantees"])
def test_importable_without_jax_or_a_dataset_library(module):
    """A PyTorch user needs only numpy and scipy."""
    code = (
        f"import sys, sync_jax.{module}; "
        "heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'grain', 'matplotlib'}; "
        "loaded = {name.split('.')[0] for name in sys.modules}; "
        "ours = {name for name in sys.modules if name.startswith('sync_jax.')}; "
        f"assert not heavy & loaded and ours == {{'sync_jax.{module}'}}, (heavy & loaded, ours)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
