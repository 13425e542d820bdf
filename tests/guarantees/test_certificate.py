"""What holds of the certificates of every method."""

import dataclasses
import functools
import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sync_jax.guarantees import (
    Certificate,
    clopper_pearson_upper,
    conformal_risk_control,
    group_certificates,
    sgr,
)
from tests.guarantees.examples import METHODS, check_counts, dumps, example

# Some differ by less than a float32 can tell, some are larger than any.
confidences = st.sampled_from(
    [-math.inf, -1e300, -1.5, -0.0, 0.0, 1e-300, 0.5, 0.5 + 1e-12, 0.5 + 3e-8, 1.0, 1e300, math.inf]
)


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
    certificate = METHODS[method](confidence, correct=correct, **options)
    check_counts(certificate, confidence, correct)
    assert Certificate.from_dict(json.loads(dumps(certificate))) == certificate
    shuffled = list(data)
    random.shuffle(shuffled)
    confidence, correct = (np.array(column) for column in zip(*shuffled, strict=True))
    again = METHODS[method](confidence, correct=correct, **options)
    assert repr(again) == repr(certificate)
    if certificate.feasible and "fixed_sequence" not in method:
        tests = {"sgr": len(data).bit_length(), "bonferroni": 1, "holm": 1}[method]
        least = clopper_pearson_upper(certificate.n_errors, certificate.n_accepted, delta / tests)
        assert certificate.bound >= least - 1e-12


def test_infinite_thresholds_survive_strict_json():
    certificate = sgr(
        [math.inf] * 50 + [0.0] * 50, correct=[1] * 50 + [0] * 50, target_risk=0.2, delta=0.1
    )
    assert certificate.threshold == math.inf
    fields = json.loads(dumps(certificate))
    assert fields["threshold"] == "Infinity"
    assert Certificate.from_dict({**fields, "seed": 3}) == certificate  # of a later version


def test_integers_and_big_endian_numbers_are_welcome():
    confidence, correct = example()
    expected = sgr(confidence, correct=correct, target_risk=0.1, delta=0.1)
    assert sgr(confidence.astype(">f8"), correct=correct, target_risk=0.1, delta=0.1) == expected
    integers = (confidence * 1000).astype(np.int32)
    certificate = sgr(integers, correct=correct, target_risk=0.1, delta=0.1)
    assert certificate == sgr(integers.astype(float), correct=correct, target_risk=0.1, delta=0.1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target_risk", [0.01, 1e-9, 1e-17, 1e-200])
def test_what_cannot_be_certified_is_infeasible_and_says_why(method, target_risk):
    hopeless = METHODS[method](
        np.arange(20), correct=np.arange(20) % 2, target_risk=0.01, delta=0.05
    )
    few = METHODS[method](np.arange(20), correct=np.ones(20), target_risk=target_risk, delta=0.05)
    for certificate in (hopeless, few):
        assert not certificate.feasible
        assert "Nothing is promised" in certificate.promise
        dumps(certificate)
    assert f"{target_risk:g}" in few.reason
    needed, *words = few.reason.split()[-5:]
    assert words == ["accepted", "examples", "are", "needed"]
    # Bonferroni: all candidates are the same here.
    tests = {"sgr": 5, "sgr_fixed_sequence": 2}.get(method, 1)
    expected = math.ceil(math.log(0.05 / tests) / math.log1p(-target_risk))
    assert int(needed) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_promise_names_its_probability_its_randomness_and_its_bound(method):
    confidence, correct = example()
    certificate = METHODS[method](confidence, correct=correct, target_risk=0.1, delta=0.1)
    start = (
        "With probability at least 1 - 0.1 over the draw of the calibration split, the selective "
    )
    assert certificate.promise.startswith(start)
    printed = float(
        certificate.promise.partition("is at most ")[2].split(",")[0].rstrip(".").split()[0]
    )
    assert certificate.bound <= printed < certificate.bound + 1e-6  # rounded up, not down
    assert ("union bound" in certificate.promise) == ("sgr" in method)
    assert ("step-down" in certificate.promise) == (method == "holm")
    assert ("provided that errors are no" in certificate.promise) == ("fixed_sequence" in method)
    assert certificate.promise.count(".") <= 4  # one sentence, and decimal points
    assert (certificate.target_risk, certificate.delta) == (0.1, 0.1)
    tiny = METHODS[method](np.zeros(2000), correct=np.ones(2000), target_risk=0.1, delta=1e-20)
    assert tiny.promise.startswith("With probability at least 1 - 1e-20 over")
    with pytest.raises(dataclasses.FrozenInstanceError):
        certificate.threshold = 0.0


@pytest.mark.parametrize("method", METHODS)
def test_stricter_wishes_cost_coverage(method):
    confidence, correct = example(5000)
    coverage = [
        METHODS[method](confidence, correct=correct, target_risk=r, delta=d).coverage
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
    ([0.5, 1.0], [0, math.nan], "correct contains NaN"),
    (["a", "b"], [0, 1], "confidence must hold .* got <U1"),
    ([0.5, 1.0], ["0", "1"], "correct must be .* not of <U1"),
    (np.array([0.5, 1.0], complex), [0, 1], "confidence must hold .* got complex128"),
    ([0.5, None], [0, 1], "confidence must hold .* got object"),
    # Neither has the successors and the comparisons of float64 that a count relies on.
    (np.array([0.5, 1.0], np.longdouble), [0, 1], "confidence must hold .* got float128"),
    (np.array([0.5, 1.0], ml_dtypes.bfloat16), [0, 1], "confidence must hold .* got bfloat16"),
]


@pytest.mark.parametrize(("confidence", "correct", "message"), BAD_INPUT)
def test_bad_input_is_refused_by_name(confidence, correct, message):
    for method in METHODS.values():
        with pytest.raises(ValueError, match=message):
            method(confidence, correct=correct, target_risk=0.1, delta=0.1)
    with pytest.raises(ValueError, match=message):
        conformal_risk_control(confidence, correct=correct, alpha=0.1)
    with pytest.raises(ValueError, match=message):
        group_certificates(
            sgr, confidence, correct=correct, groups=[0, 1], target_risk=0.1, delta=0.1
        )


@pytest.mark.parametrize("value", [0, 1, -0.1, math.nan])
@pytest.mark.parametrize("name", ["target_risk", "delta"])
def test_probabilities_out_of_range_are_refused_by_name(name, value):
    options = {"target_risk": 0.1, "delta": 0.1, name: value}
    for method in (*METHODS.values(), functools.partial(group_certificates, sgr, groups=[0, 1])):
        with pytest.raises(ValueError, match=f"{name} must lie"):
            method(confidence=[0.5, 1.0], correct=[0, 1], **options)
    with pytest.raises(ValueError, match="alpha must lie"):
        conformal_risk_control([0.5, 1.0], correct=[0, 1], alpha=value)
