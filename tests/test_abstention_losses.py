"""Losses with an abstention class, and CCL-SC's contrastive term."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sync_jax import losses
from sync_jax.losses import contrastive_loss, unit_length

# Class weights (3, 1) and (1, 1), abstentions 4 and 2: p = (3/8, 1/8; 1/2) and (1/4, 1/4; 1/2).
HAND = (
    jnp.log(jnp.array([[3.0, 1.0], [1.0, 1.0]])),
    jnp.log(jnp.array([4.0, 2.0])),
    jnp.array([0, 1]),
)
TARGETS = jnp.array([1 / 4, 1.0])


class HandComputedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_deep_gamblers(self):
        loss = functools.partial(losses.deep_gamblers_loss, payoff=2.0)
        value = self.variant(loss)(*HAND)
        chex.assert_shape(value, (2,))
        chex.assert_type(value, jnp.float32)
        # 3/8 + 1/2 / 2 = 5/8 and 1/4 + 1/4 = 1/2.
        np.testing.assert_allclose(value, [math.log(8 / 5), math.log(2)], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_self_adaptive(self):
        value = self.variant(losses.self_adaptive_loss)(*HAND, TARGETS)
        chex.assert_type(value, jnp.float32)
        expected = [math.log(8 / 3) / 4 + 3 * math.log(2) / 4, math.log(4)]
        np.testing.assert_allclose(value, expected, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_update_targets(self):
        update = functools.partial(losses.update_targets, momentum=0.9)
        value = self.variant(update)(TARGETS, HAND[0], HAND[2])  # p over the classes: 3/4, 1/2
        np.testing.assert_allclose(value, [0.9 / 4 + 0.1 * 3 / 4, 0.9 + 0.1 / 2], rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_entropy(self):
        value = self.variant(losses.entropy)(HAND[0])
        chex.assert_shape(value, (2,))
        expected = [math.log(4) - 3 / 4 * math.log(3), math.log(2)]
        np.testing.assert_allclose(value, expected, rtol=1e-6)


def make_inputs(seed=0, batch=5, classes=4):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(2 * rng.standard_normal((batch, classes)), jnp.float32),
        jnp.asarray(2 * rng.standard_normal(batch), jnp.float32),
        jnp.asarray(rng.integers(0, classes, batch), jnp.int32),
    )


def gamblers(logits, abstention_logits, labels, payoff=2.2):
    return losses.deep_gamblers_loss(logits, abstention_logits, labels, payoff=payoff)


def self_adaptive(logits, abstention_logits, labels):
    targets = jnp.linspace(0.0, 1.0, len(labels))
    return losses.self_adaptive_loss(logits, abstention_logits, labels, targets)


every_loss = pytest.mark.parametrize("loss", [gamblers, self_adaptive])


@every_loss
def test_gradients_agree_with_finite_differences(loss):
    logits, abstention_logits, labels = make_inputs()
    jax.test_util.check_grads(
        lambda f, a: loss(f, a, labels), (logits, abstention_logits), order=1, rtol=1e-2
    )
    jax.test_util.check_grads(losses.entropy, (logits,), order=1, rtol=1e-2)


def test_targets_are_constants():
    logits, _, labels = make_inputs()
    gradient = jax.grad(
        lambda f: losses.update_targets(jnp.ones(5), f, labels, momentum=0.9).sum()
    )(logits)
    assert not gradient.any()


@given(
    hnp.arrays(np.float64, (4, 3), elements=st.floats(-20, 20)),
    hnp.arrays(np.float64, 4, elements=st.floats(-20, 20)),
    st.floats(1.01, 3),
)
def test_losses_match_explicit_probabilities(logits, abstention_logits, payoff):
    labels = np.array([0, 1, 2, 1])
    weights = np.exp(np.concatenate([logits, abstention_logits[:, None]], axis=1))
    p = weights / weights.sum(axis=1, keepdims=True)
    right, abstain = p[np.arange(4), labels], p[:, -1]
    inputs = jnp.asarray(logits), jnp.asarray(abstention_logits), jnp.asarray(labels)
    value = losses.deep_gamblers_loss(*inputs, payoff=payoff)
    np.testing.assert_allclose(value, -np.log(right + abstain / payoff), rtol=1e-5, atol=3e-6)
    targets = np.array([0.0, 0.3, 0.9, 1.0])
    value = losses.self_adaptive_loss(*inputs, jnp.asarray(targets))
    expected = -targets * np.log(right) - (1 - targets) * np.log(abstain)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=3e-6)


def test_special_cases():
    """Never abstaining, both are the cross-entropy; always, the logarithm of the payoff."""
    logits, _, labels = make_inputs()
    never = jnp.full(5, -1e4)
    expected = losses.cross_entropy(logits, labels)
    np.testing.assert_allclose(gamblers(logits, never, labels), expected, rtol=1e-6)
    believed = losses.self_adaptive_loss(logits, never, labels, jnp.ones(5))
    np.testing.assert_allclose(believed, expected, rtol=1e-6)
    np.testing.assert_allclose(gamblers(logits, -never, labels), math.log(2.2), rtol=1e-6)


@every_loss
@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (5, 4)])
@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_extreme_logits_have_finite_values_and_gradients(loss, classes, batch, signs):
    logits, abstention_logits, labels = make_inputs(batch=batch, classes=classes)
    inputs = 1e4 * signs[0] * logits, 1e4 * signs[1] * jnp.abs(abstention_logits)
    value, gradients = jax.value_and_grad(lambda *x: loss(*x, labels).sum(), (0, 1))(*inputs)
    chex.assert_tree_all_finite((value, gradients))
    assert value >= 0
    entropy, gradient = jax.value_and_grad(lambda x: losses.entropy(x).sum())(inputs[0])
    chex.assert_tree_all_finite((entropy, gradient))
    assert -1e-5 <= entropy <= batch * math.log(classes) + 1e-5


@given(hnp.arrays(np.float32, (5, 4), elements=st.integers(-20, 20)), st.integers(-20, 20))
def test_a_shift_of_all_outputs_changes_nothing(logits, shift):
    _, abstention_logits, labels = make_inputs()
    for loss in (gamblers, self_adaptive):
        moved = loss(logits + shift, abstention_logits + shift, labels)
        np.testing.assert_allclose(moved, loss(logits, abstention_logits, labels), atol=2e-5)
    np.testing.assert_allclose(losses.entropy(logits + shift), losses.entropy(logits), atol=1e-5)


@every_loss
def test_a_shift_of_the_classes_alone_changes_the_loss(loss):
    """Negative control: the abstention competes with the classes."""
    logits, abstention_logits, labels = make_inputs()
    moved = loss(logits + 1, abstention_logits, labels)
    assert np.abs(moved - loss(logits, abstention_logits, labels)).min() > 1e-3


@every_loss
def test_low_precision_inputs_are_computed_in_float32(loss):
    logits, abstention_logits, labels = make_inputs()
    low = logits.astype(jnp.bfloat16), abstention_logits.astype(jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in low]
    chex.assert_trees_all_equal(loss(*low, labels), loss(*exact, labels))


# --- The contrastive term -------------------------------------------------------------------------


class ContrastiveTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_by_hand(self):
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


def contrastive_inputs(seed=0, batch=5, size=12, units=4, classes=3):
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
    inputs = contrastive_inputs(seed)
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
    inputs = contrastive_inputs()
    features = inputs.pop("features")
    loss = functools.partial(contrastive_loss, **inputs, temperature=0.5)
    jax.test_util.check_grads(loss, (features,), order=1, rtol=1e-2)


def test_the_confidence_is_a_constant_weight():
    inputs = contrastive_inputs()
    logits = inputs.pop("logits")

    def loss(logits):
        return contrastive_loss(logits=logits, **inputs, temperature=0.5).sum()

    assert not jax.grad(loss)(logits).any()
    assert loss(2 * logits) != loss(logits)


@pytest.mark.parametrize(("changes", "learns"), [
    ({"correct_classes": jnp.full(12, -1)}, False),
    ({"error_classes": jnp.full(12, -1)}, False),
    ({}, True),
])  # fmt: skip
def test_without_positives_or_negatives_it_is_zero(changes, learns):
    inputs = contrastive_inputs() | changes
    features = inputs.pop("features")
    value, gradient = jax.value_and_grad(
        lambda x: contrastive_loss(x, **inputs, temperature=0.1).sum()
    )(features)
    assert bool(value) == bool(gradient.any()) == learns


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e-4, 1e4])
def test_extreme_inputs_have_finite_values_and_gradients(scale):
    inputs = contrastive_inputs(batch=1)
    features, inputs["logits"] = scale * inputs.pop("features"), 1e4 * inputs["logits"]
    result = jax.value_and_grad(lambda x: contrastive_loss(x, **inputs, temperature=1e-3).sum())(
        features
    )
    chex.assert_tree_all_finite(result)


def test_the_features_length_and_the_keys_order_do_not_matter():
    inputs, order = contrastive_inputs(), np.random.default_rng(1).permutation(12)
    expected = contrastive_loss(**inputs, temperature=0.3)
    longer = inputs | {"features": 7 * inputs["features"]}
    moved = inputs | {
        name: inputs[name][order] for name in inputs if name.startswith(("correct", "error"))
    }
    for changed in (longer, moved):
        value = contrastive_loss(**changed, temperature=0.3)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
