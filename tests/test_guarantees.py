"""Bounds against exact arithmetic, methods against their definitions, certificates as values."""

import dataclasses
import functools
import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sync_jax.guarantees import (
    Certificate,
    calibration_size,
    clopper_pearson_upper,
    conformal_risk_control,
    group_certificates,
    learn_then_test,
    sgr,
)

settings.register_profile("sync_jax", deadline=None)  # shared machines pause at will
settings.load_profile("sync_jax")

LTT = {
    "bonferroni": learn_then_test,
    "fixed_sequence": functools.partial(learn_then_test, procedure="fixed_sequence"),
}
METHODS = {"sgr": sgr, **LTT}


def example(n=2000, seed=0, dtype=np.float64):
    """Errors fall from 30 % at confidence 0 to none at 1."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n).astype(dtype)
    return confidence, rng.random(n) >= 0.3 * (1 - confidence)


def check_counts(certificate, confidence, correct):
    """The counts are what the threshold does on the split; the bound keeps the target."""
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    assert certificate.n_calibration == confidence.size
    for count in (certificate.n_calibration, certificate.n_accepted, certificate.n_errors):
        assert type(count) is int
    if not certificate.feasible:
        assert (certificate.threshold, certificate.bound) == (None, None)
        assert (certificate.coverage, certificate.n_accepted, certificate.n_errors) == (0, 0, 0)
        assert certificate.reason
        return
    accepted = confidence >= certificate.threshold
    assert certificate.n_accepted == accepted.sum() > 0
    assert certificate.n_errors == (accepted & (correct == 0)).sum()
    assert certificate.coverage == certificate.n_accepted / confidence.size
    assert certificate.bound <= certificate.target_risk
    assert certificate.reason == ""


# --- Clopper-Pearson ------------------------------------------------------------------------------


def exact_tail(errors, n, rate):
    """P(Binomial(n, rate) <= errors) in rational arithmetic."""
    p = Fraction(rate)
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(errors + 1))


@pytest.mark.parametrize("delta", [0.2, 0.05, 1e-3, 1e-9])
@pytest.mark.parametrize(("errors", "n"), [(0, 1), (0, 30), (1, 2), (3, 100), (29, 30), (57, 80)])
def test_clopper_pearson_inverts_the_exact_binomial_tail(errors, n, delta):
    bound = clopper_pearson_upper(errors, n, delta)
    assert float(exact_tail(errors, n, bound)) == pytest.approx(delta, rel=1e-9)
    assert isinstance(bound, float)


def test_clopper_pearson_closed_forms_and_edges():
    assert clopper_pearson_upper(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50), rel=1e-13)
    assert clopper_pearson_upper(49, 50, 0.05) == pytest.approx(0.95 ** (1 / 50), rel=1e-13)
    assert clopper_pearson_upper(50, 50, 0.05) == 1
    assert clopper_pearson_upper(0, 0, 0.05) == 1


@given(st.integers(1, 10**6), st.floats(0, 1), st.floats(1e-6, 0.5))
def test_clopper_pearson_matches_the_beta_quantile_of_scipy(n, share, delta):
    errors = math.floor(share * (n - 1))
    bound = clopper_pearson_upper(errors, n, delta)
    assert bound == pytest.approx(stats.beta.ppf(1 - delta, errors + 1, n - errors), rel=1e-8)
    assert bound > errors / n
    assert clopper_pearson_upper(errors + 1, n, delta) > bound
    assert clopper_pearson_upper(errors, n + 1, delta) < bound
    assert clopper_pearson_upper(errors, n, delta / 2) > bound


def test_clopper_pearson_broadcasts():
    bounds = clopper_pearson_upper(np.array([[0], [2]]), np.array([2, 10, 100]), 0.1)
    assert bounds.shape == (2, 3)
    assert bounds[1, 0] == 1
    assert bounds[1, 2] == clopper_pearson_upper(2, 100, 0.1)


@pytest.mark.parametrize(
    ("errors", "n", "delta", "message"),
    [
        (0.29 * 100, 100, 0.1, "errors must be integers"),  # 28.999...: which count is meant?
        (1, 10.0, 0.1, "n must be integers"),
        (-1, 10, 0.1, "errors must lie in"),
        (11, 10, 0.1, "errors must lie in"),
        (0, -1, 0.1, "n must be non-negative"),
        (0, 10, 0, "delta must lie"),
        (0, 10, 1, "delta must lie"),
        (0, 10, math.nan, "delta must lie"),
    ],
)
def test_clopper_pearson_refuses_by_name(errors, n, delta, message):
    with pytest.raises(ValueError, match=message):
        clopper_pearson_upper(errors, n, delta)


# --- SGR ------------------------------------------------------------------------------------------


def sgr_by_the_paper(confidence, correct, target, delta):
    """Algorithm 1, ranks from the least confident up, without ties; n isn't a power of 2."""
    order = np.argsort(confidence)
    sorted_confidence, errors = confidence[order], ~correct[order]
    m = len(order)
    steps = math.ceil(math.log2(m))
    low, high, best = 1, m, None
    for _ in range(steps):
        z = math.ceil((low + high) / 2)
        k, accepted = int(errors[z - 1 :].sum()), m - z + 1
        bound = stats.beta.ppf(1 - delta / steps, k + 1, accepted - k) if k < accepted else 1.0
        if bound <= target:
            high, best = z, (sorted_confidence[z - 1], bound)
        else:
            low = z
    return best


@pytest.mark.parametrize("seed", range(20))
def test_sgr_is_algorithm_1(seed):
    """Same K, same bound; the search may end elsewhere, where its midpoints round differently."""
    confidence, correct = example(1500, seed)
    certificate = sgr(confidence, correct, target_risk=0.1, delta=0.05)
    threshold, bound = sgr_by_the_paper(confidence, correct, 0.1, 0.05)
    check_counts(certificate, confidence, correct)
    n_paper = (confidence >= threshold).sum()
    assert certificate.n_accepted == pytest.approx(n_paper, rel=0.1)
    assert certificate.bound == pytest.approx(bound, abs=0.003)
    assert certificate.bound == pytest.approx(
        stats.beta.ppf(
            1 - 0.05 / 11,
            certificate.n_errors + 1,
            certificate.n_accepted - certificate.n_errors,
        )
    )


def test_sgr_finds_the_threshold_of_a_clean_step():
    """200 right answers above 200 wrong ones: every further example is an error."""
    confidence, correct = np.arange(400), np.arange(400) >= 200
    certificate = sgr(confidence, correct, target_risk=0.05, delta=0.1)
    share = 0.1 / 9  # ceil(log2(401)) tests
    allowed = max(k for k in range(50) if clopper_pearson_upper(k, 200 + k, share) <= 0.05)
    assert certificate.n_errors == allowed
    assert certificate.threshold == 200 - allowed


@pytest.mark.parametrize("n", [255, 256, 257])
def test_sgr_can_certify_full_coverage(n):
    certificate = sgr(np.arange(n), np.ones(n), target_risk=0.05, delta=0.1)
    assert (certificate.coverage, certificate.threshold) == (1, 0)
    assert certificate.bound == clopper_pearson_upper(0, n, 0.1 / math.ceil(math.log2(n + 1)))


def test_sgr_counts_all_of_a_tie():
    """The right answers of a tie can't be accepted without its wrong ones."""
    confidence = np.r_[np.full(100, 1.0), np.full(100, 0.5)]
    correct = np.r_[np.ones(100), np.ones(50), np.zeros(50)]
    certificate = sgr(confidence, correct, target_risk=0.1, delta=0.1)
    assert (certificate.threshold, certificate.n_accepted, certificate.n_errors) == (1.0, 100, 0)


# --- Learn then test ------------------------------------------------------------------------------


def test_bonferroni_on_given_thresholds_by_its_definition():
    confidence, correct = example()
    thresholds = np.linspace(0, 0.9, 10)
    certificate = learn_then_test(
        confidence, correct, target_risk=0.1, delta=0.1, thresholds=thresholds
    )
    rejected = [
        t
        for t in thresholds
        if stats.binom.cdf((~correct[confidence >= t]).sum(), (confidence >= t).sum(), 0.1) <= 0.01
    ]
    assert certificate.threshold == min(rejected)
    check_counts(certificate, confidence, correct)


def test_fixed_sequence_stops_at_the_first_failure():
    """0.8 passes, 0.6 fails, 0.4 would pass: Bonferroni may take it, the sequence may not."""
    confidence = np.r_[np.full(100, 0.8), np.full(20, 0.6), np.full(2000, 0.4)]
    correct = np.r_[np.ones(100), np.zeros(20), np.ones(2000)]
    options = {"target_risk": 0.1, "delta": 0.05, "thresholds": [0.4, 0.8, 0.6]}
    assert LTT["fixed_sequence"](confidence, correct, **options).threshold == 0.8
    assert LTT["bonferroni"](confidence, correct, **options).threshold == 0.4


def test_fixed_sequence_starts_where_enough_are_accepted():
    """At target 0.1 and delta 0.05 fewer than 29 accepted examples prove nothing."""
    needed = math.ceil(math.log(0.05) / math.log(0.9))
    assert needed == 29
    confidence, correct = np.arange(100), np.ones(100)
    for n in (needed - 1, needed):
        certificate = LTT["fixed_sequence"](
            confidence[:n], correct[:n], target_risk=0.1, delta=0.05
        )
        assert certificate.feasible == (n == needed)
    # 46 accepted may hold one error, 61 two; but a start may not take more than half.
    for slack, n, feasible in [(0, 200, False), (1, 200, True), (2, 122, True), (2, 91, False)]:
        certificate = LTT["fixed_sequence"](
            np.arange(n), np.arange(n) < n - 1, target_risk=0.1, delta=0.05, slack=slack
        )
        assert certificate.feasible == feasible  # the most confident example is wrong
    # Thresholds that accept fewer are passed over, not failed.
    certificate = LTT["fixed_sequence"](
        confidence, correct, target_risk=0.1, delta=0.05, thresholds=[99, 90, 50, 0]
    )
    assert certificate.coverage == 1


def test_a_fixed_sequence_promises_the_target_and_not_its_last_bound():
    certificate = LTT["fixed_sequence"](*example(), target_risk=0.1, delta=0.1)
    assert certificate.bound == 0.1


@pytest.mark.parametrize("procedure", LTT)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rank_candidates_accept_strictly_above_an_example_in_its_own_dtype(procedure, dtype):
    confidence, correct = example(dtype=dtype)
    certificate = LTT[procedure](confidence, correct, target_risk=0.1, delta=0.1)
    check_counts(certificate, confidence, correct)
    assert certificate.feasible
    threshold = dtype(certificate.threshold)
    assert float(threshold) == certificate.threshold  # survives deployment in that dtype
    assert np.nextafter(threshold, dtype(0)) in confidence


@pytest.mark.parametrize("procedure", LTT)
def test_all_right_is_certified_at_full_coverage(procedure):
    confidence = np.r_[np.linspace(0, 1, 300)]
    certificate = LTT[procedure](confidence, np.ones(300), target_risk=0.05, delta=0.1)
    assert certificate.coverage == 1
    assert certificate.threshold == np.finfo(np.float64).min
    json.dumps(certificate.to_dict(), allow_nan=False)


@pytest.mark.parametrize("method", METHODS)
def test_heavy_ties_at_the_top(method):
    """Saturated softmax responses: half of the examples at exactly 1.0."""
    confidence, correct = example(4000, dtype=np.float32)
    confidence[::2], correct[::2] = 1.0, True
    correct[:20:2] = False
    certificate = METHODS[method](confidence, correct, target_risk=0.02, delta=0.1)
    check_counts(certificate, confidence, correct)
    assert certificate.feasible
    assert certificate.n_accepted >= 2000


# --- Conformal risk control -----------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
)
def test_conformal_risk_control_by_its_definition(data, alpha):
    confidence, correct = (np.array(column) for column in zip(*data, strict=True))
    n = confidence.size
    certificate = conformal_risk_control(confidence, correct, alpha=alpha)
    check_counts(certificate, confidence, correct)
    meets = [
        t
        for t in np.unique(confidence)
        if (((confidence >= t) & ~correct).sum() + 1) / (n + 1) <= alpha
    ]
    assert certificate.threshold == (min(meets) if meets else None)
    assert certificate.delta is None
    if certificate.feasible:
        assert certificate.bound == (certificate.n_errors + 1) / (n + 1)


def test_conformal_risk_control_says_how_many_examples_it_needs():
    certificate = conformal_risk_control(np.arange(98), np.ones(98), alpha=0.01)
    assert not certificate.feasible
    assert "at least 99" in certificate.reason
    assert conformal_risk_control(np.arange(99), np.ones(99), alpha=0.01).feasible
    wrong_on_top = conformal_risk_control(np.arange(150), np.arange(150) < 149, alpha=0.01)
    assert "most confident" in wrong_on_top.reason


# --- Every method ---------------------------------------------------------------------------------

confidences = st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 0.5, 1.0, math.inf])


@given(
    st.lists(st.tuples(confidences, st.booleans()), min_size=1, max_size=60),
    st.sampled_from(sorted(METHODS)),
    st.floats(0.05, 0.95),
    st.floats(0.01, 0.6),
    st.randoms(use_true_random=False),
)
@settings(max_examples=300)
def test_certificates_are_consistent_and_independent_of_the_input_order(
    data, method, target_risk, delta, random
):
    options = {"target_risk": target_risk, "delta": delta}
    confidence, correct = (np.array(column) for column in zip(*data, strict=True))
    certificate = METHODS[method](confidence, correct, **options)
    check_counts(certificate, confidence, correct)
    assert Certificate.from_dict(json.loads(dumps(certificate))) == certificate
    shuffled = list(data)
    random.shuffle(shuffled)
    again = METHODS[method](*(np.array(c) for c in zip(*shuffled, strict=True)), **options)
    assert repr(again) == repr(certificate)
    if certificate.feasible and method != "fixed_sequence":
        tests = {"sgr": len(data).bit_length(), "bonferroni": 1}[method]
        least = clopper_pearson_upper(certificate.n_errors, certificate.n_accepted, delta / tests)
        assert certificate.bound >= least - 1e-12


def dumps(certificate):
    return json.dumps(certificate.to_dict(), allow_nan=False)


def test_infinite_thresholds_survive_strict_json():
    certificate = sgr([math.inf] * 50 + [0.0] * 50, [1] * 50 + [0] * 50, target_risk=0.2, delta=0.1)
    assert certificate.threshold == math.inf
    assert json.loads(dumps(certificate))["threshold"] == "Infinity"
    assert Certificate.from_dict(json.loads(dumps(certificate))) == certificate


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_certified_is_infeasible_and_says_why(method):
    hopeless = METHODS[method](np.arange(500), np.arange(500) % 2, target_risk=0.01, delta=0.05)
    few = METHODS[method](np.arange(20), np.ones(20), target_risk=0.01, delta=0.05)
    for certificate in (hopeless, few):
        assert not certificate.feasible
        assert certificate.threshold is None
        assert "0.01" in certificate.reason
        assert "accepted examples are needed" in certificate.reason
        assert "Nothing is promised" in certificate.promise
        dumps(certificate)
    numbers = [int(word) for word in few.reason.split() if word.isdigit()]
    assert numbers[-1] >= math.log(0.05) / math.log(0.99)


@pytest.mark.parametrize("method", METHODS)
def test_a_promise_names_its_probability_its_randomness_and_its_bound(method):
    certificate = METHODS[method](*example(), target_risk=0.1, delta=0.1)
    assert certificate.promise.startswith("With probability at least 0.9 over the draw of the cal")
    assert f"{certificate.bound:.6g}" in certificate.promise
    assert certificate.promise.count(".") <= 4  # one sentence, and decimal points
    assert (certificate.target_risk, certificate.delta) == (0.1, 0.1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.threshold = 0.0


@pytest.mark.parametrize("method", METHODS)
def test_stricter_wishes_cost_coverage(method):
    confidence, correct = example(5000)
    coverage = [
        METHODS[method](confidence, correct, target_risk=r, delta=d).coverage
        for r, d in [(0.04, 0.001), (0.04, 0.1), (0.08, 0.1), (0.5, 0.1)]
    ]
    assert coverage == sorted(coverage)
    assert 0 < coverage[0] < coverage[-1] == 1


BAD_INPUT = [
    ([], [], "confidence is empty"),
    ([math.nan, 1.0], [0, 1], "confidence contains NaN"),
    ([[0.5, 1.0]], [0, 1], r"confidence must have shape \[n\]"),
    ([0.5, 1.0], [1], "correct has shape"),
    ([0.5, 1.0], [0, 2], "correct must hold only 0 and 1"),
    ([0.5, 1.0], [0, math.nan], "correct must hold only 0 and 1"),
    (["a", "b"], [0, 1], "must be arrays of real numbers"),
]


@pytest.mark.parametrize(("confidence", "correct", "message"), BAD_INPUT)
def test_bad_input_is_refused_by_name(confidence, correct, message):
    for method in METHODS.values():
        with pytest.raises(ValueError, match=message):
            method(confidence, correct, target_risk=0.1, delta=0.1)
    with pytest.raises(ValueError, match=message):
        conformal_risk_control(confidence, correct, alpha=0.1)
    with pytest.raises(ValueError, match=message):
        group_certificates(sgr, confidence, correct, [0, 1], target_risk=0.1, delta=0.1)


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan])
@pytest.mark.parametrize("name", ["target_risk", "delta"])
def test_probabilities_out_of_range_are_refused_by_name(name, value):
    options = {"target_risk": 0.1, "delta": 0.1, name: value}
    for method in (*METHODS.values(), functools.partial(group_certificates, sgr, groups=[0, 1])):
        with pytest.raises(ValueError, match=f"{name} must lie"):
            method(confidence=[0.5, 1.0], correct=[0, 1], **options)
    with pytest.raises(ValueError, match="alpha must lie"):
        conformal_risk_control([0.5, 1.0], [0, 1], alpha=value)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"procedure": "holm"}, "procedure 'holm'"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"slack": -1}, "slack must not be negative"),
        ({"thresholds": []}, "thresholds is empty"),
        ({"thresholds": [0.5, math.nan]}, "thresholds is empty or contains NaN"),
    ],
)
def test_bad_options_of_learn_then_test_are_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        learn_then_test([0.5, 1.0], [0, 1], target_risk=0.1, delta=0.1, **option)


# --- Groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_certified_alone_at_their_share_of_delta(method):
    confidence, correct = example(3000)
    groups = np.array(["cat", "dog", "eel"])[np.arange(3000) % 3]
    certificates = group_certificates(
        METHODS[method], confidence, correct, groups, target_risk=0.1, delta=0.1
    )
    assert list(certificates) == ["cat", "dog", "eel"]
    for name, certificate in certificates.items():
        inside = groups == name
        assert certificate == METHODS[method](
            confidence[inside], correct[inside], target_risk=0.1, delta=0.1 / 3
        )
        assert certificate.feasible


def test_groups_without_examples_pay_and_are_infeasible():
    confidence, correct = example(500)
    certificates = group_certificates(
        learn_then_test,
        confidence,
        correct,
        np.zeros(500, int),
        names=range(10),
        target_risk=0.2,
        delta=0.1,
        procedure="fixed_sequence",
    )
    assert list(certificates) == list(range(10))
    assert certificates[0].delta == pytest.approx(0.01)
    assert certificates[0].method == "learn_then_test/fixed_sequence"
    assert certificates[7].feasible is False
    assert certificates[7].n_calibration == 0
    assert "no calibration example" in certificates[7].reason
    dumps(certificates[7])


def test_unknown_groups_and_shapes_are_refused():
    options = {"target_risk": 0.1, "delta": 0.1}
    with pytest.raises(ValueError, match=r"groups holds \[3\]"):
        group_certificates(sgr, [1, 2], [1, 1], [0, 3], names=[0, 1, 2], **options)
    with pytest.raises(ValueError, match="groups has shape"):
        group_certificates(sgr, [1, 2], [1, 1], [0], **options)


# --- Planner --------------------------------------------------------------------------------------


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
