"""Metrics of probabilities against hand-computed values, the oracles and scikit-learn."""

import math

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics import oracles


@st.composite
def labelled(draw):
    """Few distinct weights per class, so that confidences tie and lie on the edges of bins."""
    classes, n = draw(st.integers(2, 4)), draw(st.integers(1, 15))
    weights = st.lists(st.integers(0, 4), min_size=classes, max_size=classes).filter(any)
    p = np.array(draw(st.lists(weights, min_size=n, max_size=n)), float)
    y = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return p / p.sum(axis=1, keepdims=True), np.array(y)


@given(labelled(), st.integers(1, 20))
def test_probability_metrics_match_the_oracles(data, bins):
    p, y = data
    assert metrics.accuracy(p, y) == np.mean(
        [row.argmax() == k for row, k in zip(p, y, strict=True)]
    )
    assert metrics.brier(p, y) == pytest.approx(oracles.brier(p, y), abs=1e-12)
    nll = oracles.negative_log_likelihood(p, y)
    assert metrics.negative_log_likelihood(p, y) == pytest.approx(nll, abs=1e-12)
    for binning, oracle in (
        ("width", oracles.calibration_error_by_width),
        ("mass", oracles.calibration_error_by_mass),
    ):
        result = metrics.expected_calibration_error(p, y, binning=binning, bins=bins)
        assert result.value == pytest.approx(oracle(p.max(1), p.argmax(1) == y, bins), abs=1e-12)
        assert (result.binning, result.bins) == (binning, bins)
        assert result.count.sum() == y.size
        assert result.count.size <= bins
        assert (result.count > 0).all()
        assert (np.diff(result.confidence) >= 0).all()


@given(labelled())
def test_and_scikit_learn(data):
    p, y = data
    names = list(range(p.shape[1]))
    positive = (p + 1e-3) / (p + 1e-3).sum(axis=1, keepdims=True)  # it clips what is nearly 0
    assert metrics.negative_log_likelihood(positive, y) == pytest.approx(
        sklearn.metrics.log_loss(y, positive, labels=names), rel=1e-9
    )
    assert metrics.brier(p, y) == pytest.approx(
        sklearn.metrics.brier_score_loss(y, p, labels=names, scale_by_half=False), abs=1e-12
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


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        ([], [], "probabilities must have shape"),
        ([0.5, 0.5], [0, 1], "probabilities must have shape"),
        ([[0.5, 0.6]], [0], "each row summing to 1"),
        ([[1.5, -0.5]], [0], "must lie in"),
        ([[math.nan, 1.0]], [0], "without NaN"),
        ([["a", "b"]], [0], "probabilities must be an array"),
        ([["0.5", "0.5"]], [0], "probabilities must be an array of real numbers, not of <U3"),
        ([[0.5, 0.5 + 0j]], [0], "probabilities must be an array of real numbers, not of complex"),
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
