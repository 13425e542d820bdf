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
from sync_jax.scores import REQUIRED_OUTPUT, SCORES, selection, softmax_response

LOGITS = {"logits": np.log([[1.0, 1.0, 2.0], [8.0, 1.0, 1.0], [1.0, 1.0, 1.0]])}
SELECTION = {"selection_logits": np.array([0.0, math.log(3), -math.log(3)])}


def test_softmax_response_by_hand():
    np.testing.assert_allclose(softmax_response(LOGITS), [0.5, 0.8, 1 / 3], rtol=1e-15)


def test_selection_by_hand():
    np.testing.assert_allclose(selection(SELECTION), [0.5, 0.75, 0.25], rtol=1e-15)


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_in_numpy_out_with_its_precision(name, dtype):
    outputs = {key: array.astype(dtype) for key, array in (LOGITS | SELECTION).items()}
    score = SCORES[name](outputs)
    assert type(score) is np.ndarray
    assert score.dtype == dtype
    assert score.shape == (3,)


@pytest.mark.parametrize("name", SCORES)
def test_jax_agrees_with_numpy(name):
    outputs = {key: array.astype(np.float32) for key, array in (LOGITS | SELECTION).items()}
    on_device = {key: jnp.asarray(array) for key, array in outputs.items()}
    for function in (SCORES[name], jax.jit(SCORES[name])):
        score = function(on_device)
        assert isinstance(score, jax.Array)
        chex.assert_type(score, jnp.float32)
        np.testing.assert_allclose(score, SCORES[name](outputs), rtol=1e-6)


@pytest.mark.parametrize("xp", [np, jnp])
def test_extreme_logits(xp):
    """Warnings are errors here: nothing may overflow."""
    logits = xp.asarray([[1e4, -1e4], [-1e4, -1e4], [-1e4, 1e4]], dtype=xp.float32)
    np.testing.assert_array_equal(softmax_response({"logits": logits}), [1.0, 0.5, 1.0])
    logits = xp.asarray([1e4, 0.0, -1e4], dtype=xp.float32)
    np.testing.assert_array_equal(selection({"selection_logits": logits}), [1.0, 0.5, 0.0])


@given(hnp.arrays(np.float64, (6, 4), elements=st.floats(-50, 50)))
def test_softmax_response_is_the_largest_probability(logits):
    exponentials = np.exp(logits)
    expected = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)
    np.testing.assert_allclose(softmax_response({"logits": logits}), expected, rtol=1e-12)


@given(hnp.arrays(np.float64, 20, elements=st.floats(-700, 700)))
def test_selection_is_the_sigmoid_and_keeps_the_order(logits):
    g = selection({"selection_logits": logits})
    np.testing.assert_allclose(g, 1 / (1 + np.exp(-logits)), rtol=1e-12)
    assert np.all(np.diff(g[np.argsort(logits)]) >= 0)


def test_float64_keeps_confident_examples_apart():
    logits = np.array([[20.0, 0.0], [21.0, 0.0], [22.0, 0.0]])
    assert len(set(softmax_response({"logits": logits}))) == 3
    # Why the module says so: in float32 they are the same number.
    assert set(softmax_response({"logits": logits.astype(np.float32)})) == {1.0}


def test_every_score_says_what_it_needs():
    assert REQUIRED_OUTPUT.keys() == SCORES.keys()
    outputs = LOGITS | SELECTION
    for name, score in SCORES.items():
        score({REQUIRED_OUTPUT[name]: outputs[REQUIRED_OUTPUT[name]]})  # needs nothing else
    assert {method.score for method in METHODS.values()} <= SCORES.keys()
