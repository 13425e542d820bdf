"""Intervals against the plain loop, and their coverage of known truths."""

import math

import numpy as np
import pytest
from hypothesis import given, settings

from sync_jax import metrics
from sync_jax.metrics import bootstrap
from tests.metrics.examples import CORRECT_METRICS, LOSS_METRICS, any_loss, example, rows, split

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
    name = "correct" if metric in CORRECT_METRICS else "loss"
    confidence, loss = example(60, ties=ties)
    plain = metrics.bootstrap_interval(
        lambda c, x: metric(c, **{name: x}, **options), confidence, loss=loss, resamples=300
    )
    fast = metrics.bootstrap_interval(metric, confidence, **{name: loss}, resamples=300, **options)
    assert fast.estimate == plain.estimate == metric(confidence, **{name: loss}, **options)
    assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-12)
    assert fast.lower <= fast.estimate <= fast.upper
    assert fast.lower < fast.upper


@given(rows(any_loss, min_size=2, max_size=8))
@settings(max_examples=30)
def test_vectorised_bootstrap_of_any_loss(data):
    confidence, loss = split(data)
    for metric in (metrics.aurc, metrics.excess_aurc, metrics.augrc):
        plain = metrics.bootstrap_interval(
            lambda c, x, metric=metric: metric(c, loss=x), confidence, loss=loss, resamples=20
        )
        fast = metrics.bootstrap_interval(metric, confidence, loss=loss, resamples=20)
        assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-11)


def test_bootstrap_is_seeded_blockwise_and_independent_of_the_input_order(monkeypatch):
    confidence, error = example(300, ties=True)
    first = metrics.bootstrap_interval(metrics.aurc, confidence, loss=error, resamples=50)
    order = np.random.default_rng(1).permutation(300)
    assert first == metrics.bootstrap_interval(
        metrics.aurc, confidence[order], loss=error[order], resamples=50
    )
    assert first != metrics.bootstrap_interval(
        metrics.aurc, confidence, loss=error, resamples=50, seed=1
    )
    monkeypatch.setattr(bootstrap, "_BLOCK", 1)  # one resample at a time
    assert first == metrics.bootstrap_interval(metrics.aurc, confidence, loss=error, resamples=50)


def test_bootstrap_interval_of_a_mean_is_the_normal_one():
    error = np.r_[np.zeros(900), np.ones(100)]
    interval = metrics.bootstrap_interval(
        metrics.selective_risk, np.zeros(1000), loss=error, coverage=1.0, resamples=4000
    )
    half = 1.96 * math.sqrt(0.1 * 0.9 / 1000)
    assert interval.lower == pytest.approx(0.1 - half, abs=2e-3)
    assert interval.upper == pytest.approx(0.1 + half, abs=2e-3)
    assert (interval.level, interval.resamples, interval.undefined) == (0.95, 4000, 0)


def test_undefined_resamples_are_left_out_and_counted():
    interval = metrics.bootstrap_interval(metrics.failure_auroc, [3, 2, 1, 0], correct=[1, 1, 0, 1])
    share = (3 / 4) ** 4 + (1 / 4) ** 4  # no error drawn, or nothing else
    assert interval.undefined == pytest.approx(1000 * share, abs=3 * math.sqrt(1000 * share))
    assert 0 <= interval.lower <= interval.upper <= 1
    never = metrics.bootstrap_interval(metrics.failure_auroc, [3, 2], correct=[1, 1])
    assert never.undefined == never.resamples
    assert math.isnan(never.lower)


def test_paired_interval_sees_what_separate_ones_do_not():
    """Slightly noisier scores on the same errors: the pairs cancel most of the variance."""
    confidence, error = example(2000)
    noisy = confidence + np.random.default_rng(1).normal(scale=0.15, size=2000)
    paired = metrics.paired_bootstrap_interval(
        metrics.aurc, noisy, loss_a=error, confidence_b=confidence, loss_b=error
    )
    assert paired.estimate == pytest.approx(
        metrics.aurc(noisy, loss=error) - metrics.aurc(confidence, loss=error)
    )
    assert 0 < paired.lower < paired.estimate < paired.upper
    a = metrics.bootstrap_interval(metrics.aurc, noisy, loss=error)
    b = metrics.bootstrap_interval(metrics.aurc, confidence, loss=error)
    assert a.lower < b.upper  # the separate intervals overlap
    order = np.random.default_rng(2).permutation(2000)
    assert paired == metrics.paired_bootstrap_interval(
        metrics.aurc,
        noisy[order],
        loss_a=error[order],
        confidence_b=confidence[order],
        loss_b=error[order],
    )


def test_paired_interval_matches_a_plain_loop():
    confidence_a, error = example(50, ties=True)
    confidence_b = np.random.default_rng(3).random(50)
    args = {"confidence_a": confidence_a, "loss_a": error}
    args |= {"confidence_b": confidence_b, "loss_b": 1 - error}
    fast = metrics.paired_bootstrap_interval(metrics.augrc, **args, resamples=100)
    plain = metrics.paired_bootstrap_interval(
        lambda c, x: metrics.augrc(c, loss=x), **args, resamples=100
    )
    assert (fast.lower, fast.upper) == pytest.approx((plain.lower, plain.upper), abs=1e-12)


def test_values_on_the_same_resamples_make_paired_intervals():
    """By the plain loop, and blockwise or not."""
    (confidence, error), (other, _) = example(40), example(40, seed=1)
    values = metrics.bootstrap_values(metrics.aurc, confidence, loss=error, resamples=30, seed=5)
    index = np.random.default_rng(5).integers(40, size=(30, 40))
    expected = [metrics.aurc(confidence[i], loss=error[i]) for i in index]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    values = values - metrics.bootstrap_values(
        metrics.aurc, other, loss=error, resamples=30, seed=5
    )
    interval = metrics.percentile_interval(0.25, values, level=0.8)
    assert (interval.estimate, interval.level, interval.resamples) == (0.25, 0.8, 30)
    assert [interval.lower, interval.upper] == pytest.approx(np.quantile(values, [0.1, 0.9]))
    with pytest.raises(ValueError, match="level must lie"):
        metrics.percentile_interval(0.25, values, level=1)
    with pytest.raises(ValueError, match="loss has shape"):
        metrics.bootstrap_values(metrics.aurc, confidence, loss=error[:3])
