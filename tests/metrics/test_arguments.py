"""What the metrics take, what they refuse, and what of it makes no difference."""

import functools
import inspect
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import guarantees, metrics
from tests.metrics.examples import (
    CONVENTIONS,
    CORRECT_METRICS,
    HAND,
    LOSS_METRICS,
    any_loss,
    example,
    rows,
    split,
)


@given(rows(any_loss, min_size=2, max_size=40), st.randoms(use_true_random=False))
def test_nothing_depends_on_the_order_of_the_input(data, random):
    shuffled = list(data)
    random.shuffle(shuffled)
    a, b = (dict(zip(("confidence", "loss"), split(x), strict=True)) for x in (data, shuffled))
    for metric in LOSS_METRICS:
        np.testing.assert_equal(metric(**a), metric(**b))
    for convention in CONVENTIONS:
        assert metrics.aurc(**a, convention=convention) == metrics.aurc(**b, convention=convention)
    coverage = np.linspace(0.05, 1, 20)
    assert np.array_equal(
        metrics.selective_risk(**a, coverage=coverage),
        metrics.selective_risk(**b, coverage=coverage),
    )
    curves = metrics.risk_coverage_curve(**a), metrics.risk_coverage_curve(**b)
    for field in ("coverage", "risk", "threshold", "n_accepted", "loss_sum"):
        first, second = (getattr(curve, field) for curve in curves)
        assert first.tobytes() == second.tobytes()  # to the last bit, and the sign of zero
    assert repr(metrics.deployed(**a, threshold=0.25)) == repr(
        metrics.deployed(**b, threshold=0.25)
    )


def test_the_order_of_the_input_does_not_even_change_the_rounding():
    """Many different losses per tie, so that any order of summation but one would show."""
    rng = np.random.default_rng(0)
    confidence, loss = rng.integers(3, size=1000) / 2, rng.exponential(size=1000)
    plain = metrics.risk_coverage_curve(confidence, loss=loss).loss_sum
    for _ in range(10):
        order = rng.permutation(1000)
        curve = metrics.risk_coverage_curve(confidence[order], loss=loss[order])
        assert np.array_equal(curve.loss_sum, plain)


@given(rows(any_loss, min_size=2, max_size=40))
def test_only_the_ranking_matters(data):
    confidence, loss = split(data)
    transformed = np.tanh(np.clip(confidence, -3, 3)) * 100 + 7
    assert metrics.aurc(confidence, loss=loss) == metrics.aurc(transformed, loss=loss)
    for metric in LOSS_METRICS:
        np.testing.assert_equal(metric(confidence, loss=loss), metric(transformed, loss=loss))
    correct = loss == 0
    for metric in CORRECT_METRICS:
        np.testing.assert_equal(
            metric(confidence, correct=correct), metric(transformed, correct=correct)
        )


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, bool])
def test_any_numeric_dtype_is_taken_in_float64(dtype):
    confidence = np.array([3, 2, 1, 0]).astype(dtype)
    wide = confidence.astype(np.float64)
    assert metrics.aurc(confidence, loss=[0, 1, 0, 1]) == metrics.aurc(wide, loss=[0, 1, 0, 1])


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
        (["0.1", "0.2"], [0, 1], "confidence must be an array of real numbers, not of <U3"),
        ([0.1, 0.2], ["0", "1"], "loss must be an array of real numbers, not of <U1"),
        ([0.1 + 1j, 0.2], [0, 1], "confidence must be an array of real numbers, not of complex"),
        ([0.1, 0.2], [0, 1j], "loss must be an array of real numbers, not of complex"),
        ([0.1, 0.2], [0, 1e151], r"loss must be at most 1e\+150"),
    ],
)
def test_bad_input_is_refused_by_name(confidence, loss, message):
    calls = [
        *LOSS_METRICS,
        metrics.risk_coverage_curve,
        metrics.threshold_table,
        lambda c, loss: metrics.selective_risk(c, loss=loss, coverage=0.5),
        lambda c, loss: metrics.coverage_at_risk(c, loss=loss, risk=0.5),
        lambda c, loss: metrics.deployed(c, loss=loss, threshold=0.5),
        lambda c, loss: metrics.bootstrap_interval(metrics.aurc, c, loss=loss),
        lambda c, loss: metrics.paired_bootstrap_interval(
            metrics.aurc, c, loss_a=loss, confidence_b=c, loss_b=loss
        ),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call(confidence, loss=loss)


def test_the_largest_losses_do_not_overflow():
    confidence, loss = np.arange(1000.0), np.full(1000, 1e150)
    for metric in LOSS_METRICS:
        assert not np.isinf(metric(confidence, loss=loss))
    interval = metrics.bootstrap_interval(metrics.aurc, confidence, loss=loss, resamples=20)
    assert interval.lower == pytest.approx(1e150, rel=1e-12)
    assert interval.upper == pytest.approx(1e150, rel=1e-12)


@pytest.mark.parametrize("metric", CORRECT_METRICS)
def test_correct_must_be_zero_or_one(metric):
    with pytest.raises(ValueError, match="correct must hold only 0 and 1"):
        metric([1, 2], correct=[0, 0.5])
    with pytest.raises(
        ValueError, match="correct must be an array of real numbers, not of complex"
    ):
        metric([1, 2], correct=[0, 1j])
    with pytest.raises(ValueError, match="correct has shape"):
        metric([1, 2], correct=[0])


@pytest.mark.parametrize("coverage", [0, -0.1, 1.0001, math.nan, [0.5, 0.0], math.inf])
def test_coverage_outside_its_range_is_refused(coverage):
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\]"):
        metrics.selective_risk(**HAND, coverage=coverage)
    with pytest.raises(ValueError, match=r"coverage must lie in \(0, 1\]"):
        metrics.threshold_for_coverage(HAND["confidence"], coverage=coverage)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.aurc(**HAND, convention="median"), "convention 'median'"),
        (lambda: metrics.aurc([1], loss=[0], convention="torch_uncertainty"), "two examples"),
        (lambda: metrics.excess_aurc(**HAND, convention="torch_uncertainty"), "no excess"),
        (lambda: metrics.coverage_at_risk(**HAND, risk=-0.1), "risk must be non-negative"),
        (lambda: metrics.coverage_at_risk(**HAND, risk=math.nan), "risk must be non-negative"),
        (lambda: metrics.selective_risk(**HAND, coverage="1"), "coverage must be an array of real"),
        (lambda: metrics.threshold_table(**HAND, thresholds=["1"]), "thresholds must be an array"),
        (lambda: metrics.fpr_at_tpr([1], correct=[0], tpr=0), "tpr must lie"),
        (lambda: metrics.deployed(**HAND, threshold=math.nan), "threshold is NaN"),
        (lambda: metrics.threshold_table([1], loss=[0.5]), "loss must be 0/1"),
        (lambda: metrics.threshold_table(**HAND, thresholds=[]), "thresholds is empty"),
        (lambda: metrics.threshold_for_coverage([], coverage=1), "confidence is empty"),
        (lambda: metrics.bootstrap_interval(metrics.aurc, **HAND, level=1), "level must lie"),
        (lambda: metrics.bootstrap_interval(metrics.aurc, **HAND, resamples=0), "resamples must"),
        (
            lambda: metrics.paired_bootstrap_interval(
                metrics.aurc,
                confidence_a=[2, 1],
                loss_a=[0, 1],
                confidence_b=[1],
                loss_b=[0],
            ),
            "confidence_b has 1 examples but confidence_a 2",
        ),
    ],
)
def test_bad_options_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- Loss and correctness, exchanged --------------------------------------------------------------

CERTIFY = {"target_risk": 0.3, "delta": 0.1}
OPTIONS = {
    "selective_risk": {"coverage": 0.5},
    "coverage_at_risk": {"risk": 0.1},
    "deployed": {"threshold": 0.5},
    "conformal_risk_control": {"alpha": 0.3},
    **dict.fromkeys(("sgr", "learn_then_test", "sgr_fixed_sequence"), CERTIFY),
    "group_certificates": {**CERTIFY, "groups": np.zeros(300)},
}
NAMED = {
    name: function
    for module in (metrics, guarantees)
    for name, function in vars(module).items()
    if inspect.isfunction(function)
    and {"loss", "correct", "loss_a"} & inspect.signature(function).parameters.keys()
}


def arguments(name):
    """Returns what precedes the loss or correctness, and the keywords from there on."""
    confidence, wrong = example(300)
    if name == "paired_bootstrap_interval":
        pair = {"loss_a": wrong, "confidence_b": -confidence, "loss_b": 1 - wrong}
        return [metrics.aurc, confidence], pair, {}
    before = {"group_certificates": [guarantees.sgr]}.get(name, [metrics.aurc])
    first = next(iter(inspect.signature(NAMED[name]).parameters))
    values = {"correct": 1 - wrong} if name in CORRECT_NAMES else {"loss": wrong}
    return [*([] if first == "confidence" else before), confidence], values, OPTIONS.get(name, {})


CORRECT_NAMES = {
    name for name, function in NAMED.items() if "loss" not in inspect.signature(function).parameters
}


@pytest.mark.parametrize("name", NAMED)
def test_a_loss_or_correctness_by_position_is_deprecated_by_name(name):
    before, values, options = arguments(name)
    by_name = NAMED[name](*before, **values, **options)
    with pytest.warns(DeprecationWarning, match=f"{name} without .*{next(iter(values))}="):
        by_position = NAMED[name](*before, *values.values(), **options)
    assert repr(by_position) == repr(by_name)
    assert pickle.loads(pickle.dumps(NAMED[name])) is NAMED[name]


@pytest.mark.parametrize("name", sorted(NAMED.keys() - {"paired_bootstrap_interval"}))
def test_an_exchange_of_loss_and_correctness_is_noticed_once(name):
    before, values, options = arguments(name)
    exchanged = {key: 1 - value for key, value in values.items()}
    confidence, wrong = example(300)
    auroc = 1 - metrics.failure_auroc(confidence, correct=1 - wrong)
    with pytest.warns(UserWarning, match=f"ranks errors first .failure AUROC {auroc:.2f}") as seen:
        NAMED[name](*before, **exchanged, **options)
    assert len(seen) == 1
    assert seen[0].filename == __file__ or "bootstrap" in name or "group" in name
    with metrics.unchecked():
        NAMED[name](*before, **exchanged, **options)


def test_chance_small_samples_and_other_losses_are_no_exchange():
    """A warning is an error here."""
    rng = np.random.default_rng(0)
    for n in (10, 30, 100, 3000):
        for share in (0.02, 0.5, 0.9):
            for _ in range(100):
                metrics.aurc(rng.random(n), loss=rng.random(n) < share)
    metrics.aurc(np.arange(500), loss=np.arange(500) >= 492)  # eight errors, all on top
    metrics.aurc(np.arange(500), loss=np.arange(500) / 100)
    metrics.aurc(np.zeros(500), loss=np.arange(500) % 2)
    with pytest.warns(UserWarning, match=r"AUROC 0.00"):
        metrics.aurc(np.arange(500), loss=np.arange(500) >= 480)
    with pytest.warns(UserWarning, match=r"AUROC 0.00"):  # of so many, every hundredth
        metrics.aurc(np.arange(10**6), loss=np.arange(10**6) >= 980_000)


def test_a_bootstrap_passes_what_its_metric_takes():
    confidence, wrong = example(100)
    auroc = metrics.failure_auroc
    expected = metrics.bootstrap_interval(auroc, confidence, correct=1 - wrong, resamples=20)
    with pytest.warns(DeprecationWarning, match="the metric takes correct: pass it as correct="):
        assert expected == metrics.bootstrap_interval(
            auroc, confidence, loss=1 - wrong, resamples=20
        )
    partial = functools.partial(auroc)
    assert metrics.bootstrap_values(
        partial, confidence, correct=1 - wrong, resamples=20
    ) == pytest.approx(
        metrics.bootstrap_values(auroc, confidence, correct=1 - wrong, resamples=20), abs=1e-12
    )
    with pytest.raises(ValueError, match="the metric takes loss=, not correct="):
        metrics.bootstrap_interval(metrics.aurc, confidence, correct=1 - wrong)
    pair = {"confidence_a": confidence, "loss_a": wrong, "confidence_b": confidence}
    with pytest.raises(ValueError, match="pass loss_b beside loss_a"):
        metrics.paired_bootstrap_interval(lambda c, x: 0, **pair, correct_b=1 - wrong)
    with pytest.raises(ValueError, match="pass either loss_a or correct_a"):
        metrics.paired_bootstrap_interval(metrics.aurc, confidence_a=confidence)
