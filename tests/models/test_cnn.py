import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.models.cnn import CNN, max_pool_2x2


def make_images(batch=4, height=8, width=8, channels=1, seed=0):
    images = np.random.default_rng(seed).standard_normal((batch, height, width, channels))
    return jnp.asarray(images, jnp.float32)


def leaf_sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- Pooling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(7, 7), (5, 8)])
def test_pooling_and_its_gradient_are_flaxs(height, width):
    """Random floats have no ties."""
    x = make_images(3, height, width, 5)
    weights = jax.random.normal(jax.random.key(0), (3, height // 2, width // 2, 5))

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    def value_and_grad(pool):
        value, pullback = jax.vjp(pool, x)
        return value, pullback(weights)

    ours, flaxs = jax.jit(lambda: [value_and_grad(max_pool_2x2), value_and_grad(flax_pool)])()
    chex.assert_trees_all_equal(ours, flaxs)


def test_pooling_by_hand():
    x = jnp.arange(15.0).reshape(1, 3, 5, 1)
    np.testing.assert_array_equal(max_pool_2x2(x).reshape(-1), [6.0, 8.0])


def test_tied_maxima_share_the_gradient():
    """As the docstring says; every dead ReLU makes such ties."""
    grad = jax.grad(lambda x: jnp.sum(max_pool_2x2(x)))(jnp.zeros((1, 2, 2, 1)))
    np.testing.assert_array_equal(grad.reshape(-1), [0.25, 0.25, 0.25, 0.25])


# --- The backbone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32, 3), (8, 8, 1), (9, 15, 2)])
def test_shapes_and_dtypes(shape):
    network, images = CNN(width=2, features=5), jnp.ones((3, *shape))
    features, variables = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, train=True), images
    )
    assert features.shape == (3, 5)
    assert {x.dtype for x in jax.tree.leaves((features, variables))} == {jnp.dtype("float32")}


def test_parameters_by_hand():
    """Width 4 and 6 features on 28 x 28 x 1: 14 x 14, 7 x 7, 3 x 3 pixels."""
    network = CNN(width=4, features=6)
    variables = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
    )
    convolutions = 5 * 5 * 1 * 4 + 3 * 3 * 4 * 8 + 3 * 3 * 8 * 16
    dense = 3 * 3 * 16 * 6
    norms = 4 + 8 + 16 + 6  # each a scale and a bias, a running mean and a running variance
    assert leaf_sizes(variables["params"]) == convolutions + dense + 2 * norms
    assert leaf_sizes(variables["batch_stats"]) == 2 * norms


NETWORK = CNN(width=2, features=5)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda x: NETWORK.init(jax.random.key(0), x, train=False))(make_images(8))


@functools.partial(jax.jit, static_argnames="train")
def apply(variables, images, *, train):
    """Features, and the statistics afterwards."""
    features, updates = NETWORK.apply(variables, images, train=train, mutable=["batch_stats"])
    return features, updates.get("batch_stats", variables["batch_stats"])


def test_statistics_are_averages_with_weight_0_9_and_change_only_in_training(variables):
    images = make_images(8)
    _, after = apply(variables, images, train=True)
    convolved = nn.Conv(2, (5, 5), strides=(2, 2), use_bias=False).apply(
        {"params": variables["params"]["Conv_0"]}, images
    )
    mean, variance = np.mean(convolved, axis=(0, 1, 2)), np.var(convolved, axis=(0, 1, 2))
    statistics = after["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], 0.1 * mean, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(statistics["var"], 0.9 + 0.1 * variance, rtol=1e-5)
    _, after = apply(variables, 3 * images + 1, train=False)
    chex.assert_trees_all_equal(after, variables["batch_stats"])


def test_training_normalises_by_the_batch_and_evaluation_does_not(variables):
    images = make_images(8)
    others = jnp.concatenate([images[:3], 5 * images[3:] + 1])  # the same first three
    (together, _), (apart, _) = (apply(variables, x, train=False) for x in (images, others))
    np.testing.assert_allclose(together[:3], apart[:3], rtol=1e-5, atol=1e-6)
    (together, _), (apart, _) = (apply(variables, x, train=True) for x in (images, others))
    assert not np.allclose(together[:3], apart[:3], atol=0.01)
    # The last layer is a ReLU of a normalised value.
    assert np.all(together >= 0)
    assert np.any(together == 0)
