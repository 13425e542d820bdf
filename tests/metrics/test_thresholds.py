"""Thresholds against what they do to each example."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics.examples import HAND, HAND_TIED, confidences, rows, split, zero_one


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
