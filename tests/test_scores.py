import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sync_jax.methods import METHODS
from sync_jax.scores import (
    LOG_ODDS,
    SCORES,
    log_odds,
    max_logit_pnorm,
    selection,
    softmax,
    softmax_response,
)

LOGITS = {"logits": np.log([[1.0, 1.0, 2.0], [8.0, 1.0, 1.0], [1.0, 1.0, 1.0]])}
SELECTION = {"selection_logits": np.array([0.0, math.log(3), -math.log(3)])}
OUTPUTS = {
    **LOGITS,
    **SELECTION,
    "abstention_logits": np.log([1.0, 10.0, 9.0]),
    "auxiliary_logits": np.log([[3.0, 1.0, 4.0], [1.0, 8.0, 1.0], [8.0, 1.0, 1.0]]),
    "expected_entropy": np.array([math.log(2) / 2, 0.0, math.log(3) / 2]),
}


UNSATURATED = {s.unsaturated.label: s.unsaturated for s in SCORES.values() if s.unsaturated}
ALL = SCORES | UNSATURATED  # log odds under both names


def call(score, outputs):
    """Takes the second of several choices of arguments: p = 1."""
    return score.function(outputs, **score.choices[:2][-1])


def available(outputs):
    return [name for name, score in SCORES.items() if score.applies(outputs)]


@pytest.mark.parametrize("name", ALL)
def test_the_type_and_precision_of_the_input_stay(name):
    score_of = functools.partial(call, ALL[name])
    for dtype in (np.float64, np.float32):
        outputs = {key: array.astype(dtype) for key, array in OUTPUTS.items()}
        score = score_of(outputs)
        assert type(score) is np.ndarray
        assert score.dtype == dtype
        assert score.shape == (3,)
    on_device = jax.jit(score_of)({key: jnp.asarray(array) for key, array in outputs.items()})
    chex.assert_type(on_device, jnp.float32)
    np.testing.assert_allclose(on_device, score, rtol=2e-6)


@pytest.mark.parametrize("xp", [np, jnp])
def test_extreme_logits(xp):
    """Warnings are errors here: nothing may overflow."""
    logits = xp.asarray([[1e4, -1e4], [-1e4, -1e4], [-1e4, 1e4]], dtype=xp.float32)
    np.testing.assert_array_equal(softmax_response({"logits": logits}), [1.0, 0.5, 1.0])
    logits = xp.asarray([1e4, 0.0, -1e4], dtype=xp.float32)
    np.testing.assert_array_equal(selection({"selection_logits": logits}), [1.0, 0.5, 0.0])
    logits = xp.asarray([[1e4, -1e4, 0], [-1e4, 1e4, 9999], [0, 0, 1e4]], dtype=xp.float32)
    expected = [1e4, 1.0, 1e4 - math.log(2)]
    np.testing.assert_allclose(log_odds({"logits": logits}), expected, rtol=1e-7)


def test_float64_keeps_confident_examples_apart():
    logits = np.array([[20.0, 0.0], [21.0, 0.0], [22.0, 0.0]])
    assert len(set(softmax_response({"logits": logits}))) == 3
    # Why the module says so: in float32 they are the same number.
    assert set(softmax_response({"logits": logits.astype(np.float32)})) == {1.0}


@pytest.mark.parametrize("name", [name for name, score in SCORES.items() if score.unsaturated])
@pytest.mark.parametrize("xp", [np, jnp])
def test_the_unsaturated_form_ranks_alike_and_float32_keeps_it_apart(name, xp):
    sure = np.linspace(0, 60, 121)
    outputs = {
        "logits": np.stack([sure, 0 * sure], axis=1),
        "selection_logits": sure,
        "abstention_logits": 3 * sure,
    }
    form = call(SCORES[name].unsaturated, outputs)
    assert np.all(np.diff(call(SCORES[name], outputs)[np.argsort(form)]) >= 0)
    single = {key: xp.asarray(array, dtype=xp.float32) for key, array in outputs.items()}
    assert len(np.unique(np.asarray(call(SCORES[name].unsaturated, single)))) == 121
    assert len(np.unique(np.asarray(call(SCORES[name], single)))) < 121


def test_a_product_near_one_does_not_saturate():
    outputs = {
        "logits": np.array([[30.0, 0.0], [40.0, 0.0], [40.0, 0.0]], np.float32),
        "selection_logits": np.array([60.0, 60.0, 30.0], np.float32),
    }
    score = SCORES["selection_times_response"].function(outputs)
    assert score[1] > score[0]
    assert score[1] > score[2]


def test_every_score_says_what_it_needs():
    for score in ALL.values():
        needed = {key: OUTPUTS[key] for key in score.needs}
        np.testing.assert_array_equal(call(score, needed), call(score, OUTPUTS))
        for key in needed:  # and nothing less
            with pytest.raises(KeyError):
                call(score, {other: array for other, array in needed.items() if other != key})
    assert {method.score for method in METHODS.values()} <= SCORES.keys()


LOG = math.log
BY_HAND = {
    "softmax_response": [0.5, 0.8, 1 / 3],
    "log_odds": [0, LOG(4), -LOG(2)],
    "selection": [0.5, 0.75, 0.25],
    "logit of g": [0, LOG(3), -LOG(3)],
    # Probabilities (1/4, 1/4, 1/2), (8/10, 1/10, 1/10), (1/3, 1/3, 1/3).
    "margin": [1 / 4, 7 / 10, 0],
    "negative_entropy": [-1.5 * LOG(2), 0.8 * LOG(0.8) + 0.2 * LOG(0.1), -LOG(3)],
    "max_logit": [LOG(2), LOG(8), 0],
    "energy": [LOG(4), LOG(10), LOG(3)],
    # Centred: log 2 (-1, -1, 2)/3 and log 8 (2, -1, -1)/3; 1-norms of 4/3, no norm for equals.
    "max_logit_pnorm": [1 / 2, 1 / 2, 0],
    # Of samples of which half are sure, the mean entropy.
    "mutual_information": [LOG(2) / 2 - 1.5 * LOG(2), 0.8 * LOG(0.8) + 0.2 * LOG(0.1), -LOG(3) / 2],
    "selection_times_response": [LOG(0.5 * 0.5), LOG(0.75 * 0.8), LOG(0.25 / 3)],
    # The auxiliary head's are (3/8, 1/8, 1/2), (1/10, 8/10, 1/10), (8/10, 1/10, 1/10).
    "mean_heads_response": [1 / 2, 9 / 20, 17 / 30],
    # The abstention weighs 1, 10 and 9 against 4, 10 and 3.
    "abstention": [-1 / 5, -1 / 2, -3 / 4],
    "log odds of answering": [LOG(4), 0, -LOG(3)],
}


def test_softmax_of_large_logits():
    np.testing.assert_array_equal(softmax(np.array([[1e4, 0.0], [-1e4, 1e4]])), [[1, 0], [0, 1]])
    np.testing.assert_allclose(softmax(LOGITS["logits"])[1], [0.8, 0.1, 0.1], rtol=1e-15)


@pytest.mark.parametrize("name", BY_HAND)
def test_scores_by_hand(name):
    np.testing.assert_allclose(call(ALL[name], OUTPUTS), BY_HAND[name], rtol=1e-12, atol=1e-12)


def test_pnorm_of_another_order_by_hand_and_its_fallback():
    np.testing.assert_allclose(
        max_logit_pnorm(LOGITS, p=2), [2 / math.sqrt(6)] * 2 + [0], rtol=1e-12
    )
    np.testing.assert_array_equal(max_logit_pnorm(LOGITS, p=None), softmax_response(LOGITS))
    equal = {"logits": np.full((1, 3), 0.1)}  # whose mean is not quite 0.1 in floats
    assert max_logit_pnorm(equal, p=2) == 0
    tiny = {"logits": 1e-200 * LOGITS["logits"]}  # its squares underflow
    np.testing.assert_allclose(max_logit_pnorm(tiny, p=2), max_logit_pnorm(LOGITS, p=2), rtol=1e-12)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("xp", [np, jnp])
def test_every_score_is_finite_for_extreme_logits_one_class_and_one_example(name, xp):
    for logits in ([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4]], [[0.0]], [[-1e4], [1e4]]):
        for sign in (1e4, -1e4):
            outputs = {
                "logits": xp.asarray(logits, dtype=xp.float32),
                "auxiliary_logits": xp.asarray(logits[::-1], dtype=xp.float32),
                "selection_logits": xp.full(len(logits), sign, dtype=xp.float32),
                "abstention_logits": xp.full(len(logits), -sign, dtype=xp.float32),
                "expected_entropy": xp.zeros(len(logits), dtype=xp.float32),
            }
            score = call(ALL[name], outputs)
            assert score.shape == (len(logits),)
            if ALL[name] is LOG_ODDS and len(logits[0]) == 1:  # a single class has no rival
                np.testing.assert_array_equal(score, math.inf)
            else:
                assert np.isfinite(score).all()


@given(
    hnp.arrays(np.float64, (5, 4), elements=st.integers(-30, 30)),
    st.integers(-30, 30),
    st.permutations(range(4)),
)
def test_the_order_of_the_classes_and_a_common_shift(logits, shift, order):
    """All outputs of the softmax together; the abstention stays when it is shifted too."""
    outputs = {
        "logits": logits,
        "auxiliary_logits": logits[::-1] / 3,
        "selection_logits": logits[:, 1],
        "abstention_logits": logits[:, 0] / 2,
    }
    changed = {
        "logits": logits[:, order] + shift,
        "auxiliary_logits": outputs["auxiliary_logits"][:, order] - shift,
        "selection_logits": outputs["selection_logits"],
        "abstention_logits": outputs["abstention_logits"] + shift,
    }
    for name in SCORES.keys() - {"mutual_information"}:
        moves = shift if name in ("max_logit", "energy") else 0.0
        expected = call(SCORES[name], outputs) + moves
        np.testing.assert_allclose(call(SCORES[name], changed), expected, rtol=1e-6, atol=1e-6)


def test_with_two_classes_margin_and_entropy_rank_as_the_softmax_response():
    logits = np.random.default_rng(0).normal(size=(50, 2))
    order = np.argsort(softmax_response({"logits": logits}))
    for name in ("margin", "negative_entropy"):
        np.testing.assert_array_equal(np.argsort(SCORES[name].function({"logits": logits})), order)


def test_which_scores_mean_something():
    of_classes = ["softmax_response", "log_odds", "margin", "negative_entropy"]
    of_logits = [*of_classes, "max_logit", "max_logit_pnorm", "energy"]
    assert available(LOGITS) == of_logits
    of_g = ["selection", "selection_times_response"]
    assert available(LOGITS | SELECTION) == [*of_logits, *of_g]
    heads = LOGITS | SELECTION | {"auxiliary_logits": np.zeros((3, 3))}
    assert available(heads) == [*of_logits, *of_g, "mean_heads_response"]
    assert available(LOGITS | {"abstention_logits": np.zeros(3)}) == [*of_logits, "abstention"]
    # Averaged probabilities: their logarithms are no raw logits.
    averaged = LOGITS | {"expected_entropy": np.zeros(3)}
    assert available(averaged) == [*of_classes, "mutual_information"]
