"""The methods against their definitions, and certificates of groups."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sync_jax.guarantees import (
    clopper_pearson_upper,
    conformal_risk_control,
    group_certificates,
    learn_then_test,
    sgr,
    sgr_fixed_sequence,
)
from sync_jax.metrics import unchecked
from tests.guarantees.examples import LTT, METHODS, check_counts, dumps, example


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
    certificate = sgr(confidence, correct=correct, target_risk=0.1, delta=0.05)
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
    certificate = sgr(confidence, correct=correct, target_risk=0.05, delta=0.1)
    share = 0.1 / 9  # ceil(log2(401)) tests
    allowed = max(k for k in range(50) if clopper_pearson_upper(k, 200 + k, share) <= 0.05)
    assert certificate.n_errors == allowed
    assert certificate.threshold == 200 - allowed - 0.5


@pytest.mark.parametrize("n", [255, 256, 257])
def test_sgr_can_certify_full_coverage(n):
    certificate = sgr(np.arange(n), correct=np.ones(n), target_risk=0.05, delta=0.1)
    assert (certificate.coverage, certificate.threshold) == (1, 0)
    assert certificate.bound == clopper_pearson_upper(0, n, 0.1 / math.ceil(math.log2(n + 1)))


def test_sgr_counts_all_of_a_tie():
    """The right answers of a tie can't be accepted without its wrong ones."""
    confidence = np.r_[np.full(100, 1.0), np.full(100, 0.5)]
    correct = np.r_[np.ones(100), np.ones(50), np.zeros(50)]
    certificate = sgr(confidence, correct=correct, target_risk=0.1, delta=0.1)
    assert (certificate.threshold, certificate.n_accepted, certificate.n_errors) == (0.75, 100, 0)


def test_bonferroni_on_given_thresholds_by_its_definition():
    confidence, correct = example()
    thresholds = np.linspace(0, 0.9, 10)
    certificate = learn_then_test(
        confidence, correct=correct, target_risk=0.1, delta=0.1, thresholds=thresholds
    )
    rejected = [
        t
        for t in thresholds
        if stats.binom.cdf((~correct[confidence >= t]).sum(), (confidence >= t).sum(), 0.1) <= 0.01
    ]
    assert certificate.threshold == min(rejected)
    check_counts(certificate, confidence, correct, thresholds_given=True)


def test_holm_leaves_more_to_the_others_after_every_rejection():
    """Two thresholds: 0.1 is split in two, and whole for the second once the first is rejected."""
    options = {"target_risk": 0.1, "delta": 0.1, "thresholds": [0, 1]}
    assert stats.binom.cdf(0, 60, 0.1) < 0.05 < stats.binom.cdf(5, 100, 0.1) < 0.1
    confidence, correct = np.arange(100) < 60, ~((np.arange(100) >= 60) & (np.arange(100) < 65))
    assert LTT["bonferroni"](confidence, correct=correct, **options).threshold == 1
    certificate = LTT["holm"](confidence, correct=correct, **options)
    assert (certificate.threshold, certificate.n_errors, certificate.bound) == (0, 5, 0.1)
    assert "at most 0.1." in certificate.promise  # thresholds fixed in advance need no proviso
    # With two of the five errors among the 60, neither is below 0.05: nothing is rejected.
    assert 0.05 < stats.binom.cdf(2, 60, 0.1) < 0.1
    correct = ~((np.arange(100) >= 58) & (np.arange(100) < 63))
    assert not LTT["holm"](confidence, correct=correct, **options).feasible


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=80),
    st.floats(0.1, 0.9),
    st.floats(0.01, 0.6),
)
def test_holm_by_its_definition_never_covers_less_than_bonferroni(data, target, delta):
    confidence, correct = (np.array(column) for column in zip(*data, strict=True))
    thresholds = np.arange(10)
    options = {"target_risk": target, "delta": delta, "thresholds": thresholds}
    holm = LTT["holm"](confidence, correct=correct, **options)
    p = np.array([
        stats.binom.cdf((~correct[confidence >= t]).sum(), (confidence >= t).sum(), target)
        for t in thresholds
    ])  # fmt: skip
    rejected = []
    for step, i in enumerate(np.argsort(p)):
        if p[i] > delta / (10 - step):
            break
        rejected.append(thresholds[i])
    assert holm.threshold == min(rejected, default=None)
    assert holm.coverage >= LTT["bonferroni"](confidence, correct=correct, **options).coverage
    options["thresholds"] = None
    ranks = [LTT[name](confidence, correct=correct, **options) for name in ("bonferroni", "holm")]
    assert ranks[0].coverage <= ranks[1].coverage
    assert ranks[0].feasible == ranks[1].feasible


def test_the_hybrid_takes_the_larger_coverage_of_two_at_half_of_delta():
    half, chosen = {"target_risk": 0.05, "delta": 0.05}, set()
    for seed in range(20):
        confidence, correct = example(1500, seed)
        found = {
            "sgr": sgr(confidence, correct=correct, **half),
            "sequence": LTT["fixed_sequence"](confidence, correct=correct, **half),
        }
        best = max(found, key=lambda name: found[name].coverage)
        hybrid = sgr_fixed_sequence(confidence, correct=correct, target_risk=0.05, delta=0.1)
        check_counts(hybrid, confidence, correct)
        same = "threshold", "n_accepted", "bound"
        assert [getattr(hybrid, k) for k in same] == [getattr(found[best], k) for k in same]
        assert (hybrid.method, hybrid.delta) == ("sgr_fixed_sequence", 0.1)
        chosen.add(best)
    assert chosen == {"sgr", "sequence"}


@unchecked()
def test_fixed_sequence_stops_at_the_first_failure():
    """0.8 passes, 0.6 fails, 0.4 would pass: Bonferroni may take it, the sequence may not."""
    confidence = np.r_[np.full(100, 0.8), np.full(20, 0.6), np.full(2000, 0.4)]
    correct = np.r_[np.ones(100), np.zeros(20), np.ones(2000)]
    options = {"target_risk": 0.1, "delta": 0.05, "thresholds": [0.4, 0.8, 0.6]}
    assert LTT["fixed_sequence"](confidence, correct=correct, **options).threshold == 0.8
    assert LTT["bonferroni"](confidence, correct=correct, **options).threshold == 0.4


def test_fixed_sequence_starts_where_enough_are_accepted():
    """At target 0.1 and delta 0.05 fewer than 29 accepted examples prove nothing."""
    needed = math.ceil(math.log(0.05) / math.log(0.9))
    assert needed == 29
    confidence, correct = np.arange(100), np.ones(100)
    for n in (needed - 1, needed):
        certificate = LTT["fixed_sequence"](
            confidence[:n], correct=correct[:n], target_risk=0.1, delta=0.05
        )
        assert certificate.feasible == (n == needed)
    # 46 accepted may hold one error, 61 two; but a start may not take more than half.
    for slack, n, feasible in [(0, 200, False), (1, 200, True), (2, 122, True), (2, 91, False)]:
        certificate = LTT["fixed_sequence"](
            np.arange(n), correct=np.arange(n) < n - 1, target_risk=0.1, delta=0.05, slack=slack
        )
        assert certificate.feasible == feasible  # the most confident example is wrong
    # Thresholds that accept fewer are passed over, not failed.
    certificate = LTT["fixed_sequence"](
        confidence, correct=correct, target_risk=0.1, delta=0.05, thresholds=[99, 90, 50, 0]
    )
    assert certificate.coverage == 1


@pytest.mark.parametrize("procedure", LTT)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rank_candidates_accept_strictly_above_an_example_in_its_own_dtype(procedure, dtype):
    confidence, correct = example(dtype=dtype)
    certificate = LTT[procedure](confidence, correct=correct, target_risk=0.1, delta=0.1)
    check_counts(certificate, confidence, correct)
    assert certificate.feasible
    # Holm and a fixed sequence promise the target, not their last bound.
    assert (certificate.bound == 0.1) == (procedure != "bonferroni")
    assert float(dtype(certificate.threshold)) == certificate.threshold  # deployed in that dtype


@pytest.mark.parametrize("procedure", LTT)
def test_all_right_is_certified_at_full_coverage(procedure):
    certificate = LTT[procedure](np.arange(300), correct=np.ones(300), target_risk=0.05, delta=0.1)
    # The sequence accepts the lowest seen; where nothing is assumed, all that may come.
    least = 0 if procedure == "fixed_sequence" else np.finfo(np.float32).min
    assert (certificate.coverage, certificate.threshold) == (1, least)
    dumps(certificate)


@pytest.mark.parametrize("method", METHODS)
def test_heavy_ties_at_the_top(method):
    """Saturated softmax responses: half of the examples at exactly 1.0."""
    confidence, correct = example(4000, dtype=np.float32)
    confidence[::2], correct[::2] = 1.0, True
    correct[:20:2] = False
    certificate = METHODS[method](confidence, correct=correct, target_risk=0.02, delta=0.1)
    check_counts(certificate, confidence, correct)
    assert certificate.feasible
    assert certificate.n_accepted >= 2000


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"procedure": "hochberg"}, "procedure 'hochberg'"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"slack": -1}, "slack must not be negative"),
        ({"thresholds": []}, "thresholds is empty"),
        ({"thresholds": [0.5, math.nan]}, "thresholds is empty or contains NaN"),
    ],
)
def test_bad_options_of_learn_then_test_are_refused_by_name(option, message):
    with pytest.raises(ValueError, match=message):
        learn_then_test([0.5, 1.0], correct=[0, 1], target_risk=0.1, delta=0.1, **option)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "the smallest bound among 50 candidates is 0."),
        ({"procedure": "fixed_sequence"}, "the first in the sequence has a bound of 0."),
        (
            {"procedure": "fixed_sequence", "slack": 3, "thresholds": [160]},
            "none accepts the 76 examples that the sequence starts from",
        ),
    ],
)
def test_the_reason_of_learn_then_test_is_that_of_its_procedure(options, reason):
    """The 40 most confident are right, all others wrong: too few where a sequence starts."""
    certificate = learn_then_test(
        np.arange(200), correct=np.arange(200) >= 160, target_risk=0.1, delta=0.05, **options
    )
    assert not certificate.feasible
    assert reason in certificate.reason


@given(
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
)
def test_conformal_risk_control_by_its_definition(data, alpha):
    confidence, correct = (np.array(column) for column in zip(*data, strict=True))
    n = confidence.size
    certificate = conformal_risk_control(confidence, correct=correct, alpha=alpha)
    check_counts(certificate, confidence, correct)
    meets = [
        t
        for t in np.unique(confidence)
        if (((confidence >= t) & ~correct).sum() + 1) / (n + 1) <= alpha
    ]
    expected = (confidence >= min(meets)).sum() if meets else 0
    assert certificate.n_accepted == expected
    assert certificate.delta is None
    if certificate.feasible:
        assert certificate.bound == (certificate.n_errors + 1) / (n + 1)


def test_conformal_risk_control_says_how_many_examples_it_needs():
    certificate = conformal_risk_control(np.arange(98), correct=np.ones(98), alpha=0.01)
    assert not certificate.feasible
    assert "at least 99" in certificate.reason
    assert conformal_risk_control(np.arange(99), correct=np.ones(99), alpha=0.01).feasible
    wrong_on_top = conformal_risk_control(np.arange(150), correct=np.arange(150) < 149, alpha=0.01)
    assert "most confident" in wrong_on_top.reason


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_certified_alone_at_their_share_of_delta(method):
    confidence, correct = example(3000)
    groups = np.array(["cat", "dog", "eel"])[np.arange(3000) % 3]
    certificates = group_certificates(
        METHODS[method], confidence, correct=correct, groups=groups, target_risk=0.1, delta=0.1
    )
    assert list(certificates) == ["cat", "dog", "eel"]
    for name, certificate in certificates.items():
        inside = groups == name
        assert certificate == METHODS[method](
            confidence[inside], correct=correct[inside], target_risk=0.1, delta=0.1 / 3
        )
        assert certificate.feasible


def test_groups_without_examples_pay_and_are_infeasible():
    confidence, correct = example(500)
    certificates = group_certificates(
        learn_then_test,
        confidence,
        correct=correct,
        groups=np.zeros(500, int),
        names=range(10),
        target_risk=0.2,
        delta=0.1,
        procedure="fixed_sequence",
    )
    assert list(certificates) == list(range(10))
    assert certificates[0].delta == pytest.approx(0.01)
    assert certificates[0].method == "learn_then_test/fixed_sequence"
    assert certificates[7].method == certificates[0].method
    assert certificates[7].feasible is False
    assert certificates[7].n_calibration == 0
    assert "no calibration example" in certificates[7].reason
    dumps(certificates[7])


def test_groups_that_cannot_be_are_refused():
    options = {"target_risk": 0.1, "delta": 0.1}
    with pytest.raises(ValueError, match=r"groups holds \[3\]"):
        group_certificates(sgr, [1, 2], correct=[1, 1], groups=[0, 3], names=[0, 1, 2], **options)
    with pytest.raises(ValueError, match="groups has shape"):
        group_certificates(sgr, [1, 2], correct=[1, 1], groups=[0], **options)
    with pytest.raises(ValueError, match="groups contains NaN"):
        group_certificates(sgr, [1, 2], correct=[1, 1], groups=[0, np.nan], **options)
    with pytest.raises(ValueError, match="conformal_risk_control promises an average"):
        group_certificates(conformal_risk_control, [1, 2], correct=[1, 1], groups=[0, 1], **options)
