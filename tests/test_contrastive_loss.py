"""CCL-SC's contrastive term: by hand, against float64, by finite differences, at its extremes."""

import math

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync_jax.losses import contrastive_loss, unit_length


class HandComputedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_value(self):
        """The query is at similarity 1 and 0 to its positives and 0 to the only negative."""
        value = self.variant(contrastive_loss)(
            jnp.array([[2.0, 0.0]]),
            jnp.log(jnp.array([[3.0, 1.0]])),  # softmax response 3/4
            jnp.array([0]),
            correct_keys=jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [-1.0, 0.0]]),
            correct_classes=jnp.array([0, 0, 1, -1]),
            error_keys=jnp.array([[0.0, 1.0], [1.0, 0.0]]),
            error_classes=jnp.array([0, 1]),
            temperature=0.5,
        )
        chex.assert_shape(value, (1,))
        chex.assert_type(value, jnp.float32)
        expected = 3 / 4 * (math.log(1 + math.exp(-2)) + math.log(2)) / 2
        np.testing.assert_allclose(value, [expected], rtol=1e-6)


def make_inputs(seed=0, batch=5, size=12, units=4, classes=3):
    rng = np.random.default_rng(seed)
    arrays = {
        "features": rng.standard_normal((batch, units)),
        "logits": rng.standard_normal((batch, classes)),
    }
    for name in ("correct", "error"):
        arrays[f"{name}_keys"] = unit_length(jnp.asarray(rng.standard_normal((size, units))))
    inputs = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    inputs["labels"] = jnp.asarray(rng.integers(0, classes, batch))
    for name in ("correct", "error"):
        inputs[f"{name}_classes"] = jnp.asarray(rng.integers(-1, classes, size))
    return inputs


@given(st.integers(0, 1000), st.floats(0.05, 2))
def test_it_matches_explicit_sums(seed, temperature):
    inputs = make_inputs(seed)
    value = contrastive_loss(**inputs, temperature=temperature)
    x = {name: np.asarray(array, np.float64) for name, array in inputs.items()}
    expected = np.zeros(5)
    for i in range(5):
        q = x["features"][i] / np.linalg.norm(x["features"][i])
        same = {name: x[f"{name}_classes"] == x["labels"][i] for name in ("correct", "error")}
        positive, negative = (
            np.exp(x[f"{name}_keys"][same[name]] @ q / temperature) for name in ("correct", "error")
        )
        if positive.size:
            weights = np.exp(x["logits"][i])
            response = weights.max() / weights.sum()
            expected[i] = response * np.mean(-np.log(positive / (positive + negative.sum())))
    np.testing.assert_allclose(value, expected, rtol=2e-4, atol=1e-5)


def test_the_gradient_of_the_features_agrees_with_finite_differences():
    inputs = make_inputs()
    features = inputs.pop("features")
    jax.test_util.check_grads(
        lambda x: contrastive_loss(x, **inputs, temperature=0.5),
        (features,),
        order=1,
        rtol=1e-2,
    )


def test_the_confidence_is_a_constant():
    inputs = make_inputs()
    logits = inputs.pop("logits")

    def loss(logits):
        return contrastive_loss(logits=logits, **inputs, temperature=0.5).sum()

    assert not jax.grad(loss)(logits).any()
    assert loss(2 * logits) != loss(logits)  # it does weigh


def test_without_positives_it_is_zero_and_without_negatives_it_has_no_gradient():
    inputs = make_inputs()
    features = inputs.pop("features")
    empty = jnp.full(12, -1)

    def value_and_gradient(**changes):
        def loss(x):
            return contrastive_loss(x, **inputs | changes, temperature=0.1).sum()

        return jax.value_and_grad(loss)(features)

    for changes in ({"correct_classes": empty}, {"error_classes": empty}):
        value, gradient = value_and_gradient(**changes)
        assert value == 0
        assert not gradient.any()
    assert value_and_gradient()[1].any()  # negative control


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1e4])
def test_extreme_inputs_have_finite_values_and_gradients(scale):
    inputs = make_inputs(batch=1)
    features, inputs["logits"] = scale * inputs.pop("features"), 1e4 * inputs["logits"]
    result = jax.value_and_grad(lambda x: contrastive_loss(x, **inputs, temperature=1e-3).sum())(
        features
    )
    chex.assert_tree_all_finite(result)


def test_the_features_length_and_the_keys_order_do_not_matter():
    inputs, order = make_inputs(), np.random.default_rng(1).permutation(12)
    expected = contrastive_loss(**inputs, temperature=0.3)
    longer = inputs | {"features": 7 * inputs["features"]}
    moved = inputs | {
        name: inputs[name][order] for name in inputs if name.startswith(("correct", "error"))
    }
    for changed in (longer, moved):
        value = contrastive_loss(**changed, temperature=0.3)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
