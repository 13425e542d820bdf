"""Alarms: seldom while nothing changes, soon when something does."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binom, kstest

from sync_jax.deploy.monitor import Exchangeability, Monitor, Rate, monitor
from sync_jax.evaluation.decision import Decision

ALPHA, STREAMS = 0.1, 300


def decision(rng, n=400, **chosen):
    """Confidences of an even distribution, right with a chance that is the confidence."""
    confidence = rng.random(n)
    made = Decision("confidence", 0.0, confidence, rng.random(n) < confidence)
    return made.with_threshold(**chosen or {"coverage": 0.7})


def seldom(alarms, alpha):
    """At most as often as alpha allows: a binomial test at 1e-4."""
    return binom.sf(alarms - 1, STREAMS, alpha) > 1e-4


@pytest.fixture(scope="module")
def undisturbed():
    """Monitors of streams like their calibration splits, with labels."""
    found = []
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        watch = Monitor(decision(rng), alpha=ALPHA, seed=seed)
        confidence = rng.random(400)
        watch.update(confidence)
        accepted = confidence[confidence >= watch.decision.threshold]
        watch.labels(rng.random(len(accepted)) < accepted)
        found.append(watch)
    return found


def test_false_alarms_are_as_rare_as_promised(undisturbed):
    """Of exchangeability and acceptance together alpha, of the risk alpha."""
    tests = [{alarm.test for alarm in watch.alarms} for watch in undisturbed]
    assert seldom(sum(bool(x & {"exchangeability", "acceptance"}) for x in tests), ALPHA)
    assert seldom(sum("risk" in x for x in tests), ALPHA)


def test_a_test_that_forgets_the_past_would_be_noticed():
    """Control: looking at each batch anew at level alpha alarms in most streams."""
    alarms = 0
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        calibration, stream = rng.random(400), rng.random((10, 40))
        alarms += any(kstest(batch, calibration).pvalue < ALPHA for batch in stream)
    assert not seldom(alarms, ALPHA)


def test_ranks_are_uniform_whatever_ties_there_are():
    """The wealth is a martingale: its mean stays 1. Half of the confidences are equal here."""
    wealth = []
    for seed in range(STREAMS):
        rng = np.random.default_rng(seed)
        draw = lambda n, rng=rng: np.where(rng.random(n) < 0.5, 1.0, rng.random(n))  # noqa: E731
        test = Exchangeability(draw(100), seed=seed)
        for confidence in draw(60):
            test.update(confidence)
        wealth.append(np.exp(test.log_wealth))
    assert abs(np.mean(wealth) - 1) < 4 * np.std(wealth) / STREAMS**0.5


@pytest.mark.parametrize("test", ["exchangeability", "acceptance", "risk"])
def test_changes_are_noticed(test):
    late = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        watch = Monitor(decision(rng, 2000), alpha=0.01, seed=seed)
        confidence = rng.random(2000)
        if test == "risk":  # as confident as ever, and wrong twice as often
            accepted = confidence[confidence >= watch.decision.threshold]
            watch.labels(rng.random(len(accepted)) < 2 * accepted - 1)
        else:
            watch.update(confidence**2)
        late += [alarm.after for alarm in watch.alarms if alarm.test == test]
    assert len(late) == 20
    assert np.median(late) < 1000


def test_messages_and_numbers():
    rng = np.random.default_rng(0)
    rule = decision(rng, 2000)
    alarms = monitor(np.zeros(200), rule)
    assert [alarm.test for alarm in alarms] == ["acceptance", "exchangeability"]
    assert "0.0 % were answered so far; the calibration split implies 6" in alarms[0].message
    assert monitor(rng.random(200), rule) == []
    watch = Monitor(rule)
    (alarm,) = watch.labels(np.zeros(100, bool))
    assert "100.0 % of the labelled answers are wrong" in alarm.message
    assert watch.labels(np.zeros(100, bool)) == []  # said once
    grouped = dataclasses.replace(rule, groups=np.arange(2000) // 4)
    low, high = Monitor(grouped).expected  # of 500 examples: twice as wide
    narrow = Monitor(rule).expected
    assert (high - low) == pytest.approx(2 * (narrow[1] - narrow[0]), rel=0.2)


def test_a_certified_risk_is_what_is_watched():
    rng = np.random.default_rng(1)
    rule = decision(rng, 3000, risk=0.3)
    assert Monitor(rule).promised == rule.chosen_by["bound"] <= 0.3


def test_a_round_begins_anew_with_a_smaller_share_of_alpha(monkeypatch):
    monkeypatch.setattr("sync_jax.deploy.monitor._LONGEST", 50)
    rng = np.random.default_rng(0)
    test = Exchangeability(rng.random(100), alpha=0.01)
    limits = []
    for confidence in rng.random(151):
        test.update(confidence)
        limits.append(np.exp(-test.limit))
    assert limits[0] == pytest.approx(0.01 * 6 / np.pi**2)
    assert limits[150] == pytest.approx(limits[0] / 16)
    assert sum(0.01 * 6 / (np.pi * k) ** 2 for k in range(1, 10_000)) < 0.01


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.0, 0.3), (0.6, 1.0)])
def test_a_rate_within_its_interval_at_the_edges(low, high):
    """A side that cannot be passed is no side; and the wealth's mean is at most 1."""
    wealth, rng = [], np.random.default_rng(0)
    for _ in range(200):
        test = Rate(low, high)
        edge = high if high < 1 else low if low > 0 else 0.5
        for event in rng.random(50) < edge:
            test.update(event)
        wealth.append(np.exp(test.log_wealth))
    assert np.mean(wealth) <= 1 + 4 * np.std(wealth) / 200**0.5


def test_recalibration_in_one_line():
    """The same choice on other examples."""
    rng = np.random.default_rng(0)
    for chosen in ({"coverage": 0.6}, {"risk": 0.3}, {"cost": (3.0, 1.0)}):
        rule, fresh = (decision(rng, 1000, **chosen) for _ in range(2))
        again = rule.recalibrated(fresh.confidence, fresh.correct)
        assert again.threshold == fresh.threshold != rule.threshold
        assert again.chosen_by == fresh.chosen_by
    with pytest.raises(ValueError, match="must be"):
        rule.recalibrated(np.zeros(3), np.zeros(2))
