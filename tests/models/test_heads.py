import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.config import default_config
from sync_jax.methods import METHODS
from sync_jax.models import make_backbone, make_network
from sync_jax.models.cnn import CNN
from sync_jax.models.heads import SelectionHead, SelectiveNetwork
from sync_jax.scores import selection, softmax_response

BOTH = ("selection", "auxiliary")


class Flatten(nn.Module):
    """The simplest backbone."""

    @nn.compact
    def __call__(self, images, *, train):
        return images.reshape(images.shape[0], -1)


def make_images(batch=64, size=8, seed=0):
    images = np.random.default_rng(seed).standard_normal((batch, size, size, 1))
    return jnp.asarray(images, jnp.float32)


def leaf_norm(tree):
    return sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(tree))


def leaf_sizes(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("heads", "names"), [
    ((), {"logits"}),
    (BOTH, {"logits", "selection_logits", "auxiliary_logits"}),
])  # fmt: skip
def test_outputs(heads, names):
    network = SelectiveNetwork(Flatten(), num_classes=3, heads=heads, target_coverage=0.8)
    images = make_images(6)

    @jax.jit
    def outputs():
        variables = network.init(jax.random.key(0), images, train=False)
        training, _ = network.apply(variables, images, train=True, mutable=["batch_stats"])
        return network.apply(variables, images, train=False), training

    for of_mode in outputs():
        assert of_mode.keys() == names
        for name, output in of_mode.items():
            chex.assert_shape(output, (6,) if name == "selection_logits" else (6, 3))
            chex.assert_type(output, jnp.float32)
            assert np.std(output) > 0


def test_parameters_by_hand():
    network = SelectiveNetwork(Flatten(), num_classes=3, heads=BOTH, target_coverage=0.8)
    variables = jax.eval_shape(
        lambda x: network.init(jax.random.key(0), x, train=False), make_images(1)
    )
    units = 64
    assert {name: leaf_sizes(tree) for name, tree in variables["params"].items()} == {
        "class_head": units * 3 + 3,
        "auxiliary_head": units * 3 + 3,
        # Dense, BatchNorm's scale and bias, Dense
        "selection_head": (units * 512 + 512) + 2 * 512 + (512 + 1),
    }
    assert leaf_sizes(variables["batch_stats"]) == 2 * 512


def test_selection_head_in_numpy():
    """Dense, ReLU, BatchNorm, a tenth, Dense, in this order."""
    head = SelectionHead(target_coverage=0.7)
    features = make_images(10, size=3).reshape(10, 9)
    variables = head.init(jax.random.key(0), features, features, train=False)
    rng = np.random.default_rng(1)
    statistics = {
        "mean": jnp.asarray(rng.standard_normal(512), jnp.float32),
        "var": jnp.asarray(rng.uniform(0.5, 2.0, 512), jnp.float32),
    }
    params = variables["params"]
    params["BatchNorm_0"] = {
        "scale": jnp.asarray(rng.standard_normal(512), jnp.float32),
        "bias": jnp.asarray(rng.standard_normal(512), jnp.float32),
    }
    result = head.apply(
        {"params": params, "batch_stats": {"BatchNorm_0": statistics}},
        features,
        features,
        train=False,
    )
    first, norm, last = params["Dense_0"], params["BatchNorm_0"], params["Dense_1"]
    x = np.maximum(np.asarray(features, np.float64) @ first["kernel"] + first["bias"], 0)
    x = (x - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5) * norm["scale"] + norm["bias"]
    expected = (x / 10 @ last["kernel"] + last["bias"])[:, 0]
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(last["bias"], [math.log(0.7 / 0.3)], rtol=1e-6)


def starting_selection(target_coverage):
    """Mean g of untrained networks of three seeds, in evaluation and in training: `[2, 3]`."""
    images = make_images()
    network = SelectiveNetwork(
        Flatten(), num_classes=3, heads=("selection",), target_coverage=target_coverage
    )

    @jax.jit
    @jax.vmap
    def mean_selection(key):
        variables = network.init(key, images, train=False)
        evaluation = network.apply(variables, images, train=False)
        training, _ = network.apply(variables, images, train=True, mutable=["batch_stats"])
        outputs = [evaluation["selection_logits"], training["selection_logits"]]
        return [jnp.mean(jax.nn.sigmoid(output)) for output in outputs]

    return np.asarray(mean_selection(jax.random.split(jax.random.key(0), 3)))


@pytest.mark.parametrize("target_coverage", [0.5, 0.8, 0.95, 1.0])
def test_selection_starts_at_its_target(target_coverage):
    np.testing.assert_allclose(starting_selection(target_coverage), target_coverage, atol=0.02)


@pytest.mark.parametrize("logit_prior", ["fixed", "learnt"])
def test_with_a_prior_in_its_logit_g_begins_as_the_softmax_response(logit_prior):
    """And it is a constant, times 1 or a parameter that is 1 at first."""
    images = make_images(6)
    network = SelectiveNetwork(Flatten(), 3, BOTH, target_coverage=0.8, logit_prior=logit_prior)
    variables = network.init(jax.random.key(0), images, train=False)
    outputs = network.apply(variables, images, train=False)
    g, response = selection(outputs), softmax_response(outputs)
    np.testing.assert_allclose(g, response, rtol=1e-5)
    assert np.ptp(g) > 0.1
    head = variables["params"]["selection_head"]
    head["Dense_1"]["bias"] += 0.7
    if logit_prior == "learnt":
        assert head["prior_strength"] == 1.0
        head["prior_strength"] += 1.0
    else:
        assert "prior_strength" not in head
    strength = {"fixed": 1.0, "learnt": 2.0}[logit_prior]
    moved = network.apply(variables, images, train=False)["selection_logits"]
    expected = 0.7 + strength * np.log(response / (1 - response))
    np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-5)

    def mean_selection_logit(params):
        changed = {**variables, "params": params}
        return network.apply(changed, images, train=False)["selection_logits"].mean()

    gradient = jax.grad(mean_selection_logit)(variables["params"])
    assert not any(x.any() for x in jax.tree.leaves(gradient.pop("class_head")))
    assert gradient["selection_head"]["Dense_1"]["bias"] == pytest.approx(1)


@pytest.mark.parametrize("detach", [True, False])
def test_detached_features_learn_nothing_from_the_selection_head(detach):
    network = SelectiveNetwork(CNN(width=2, features=8), 3, BOTH, 0.8, detach_features=detach)
    variables = network.init(jax.random.key(0), make_images(4), train=False)

    @jax.jit
    @jax.grad
    def gradient(params):
        outputs = network.apply({**variables, "params": params}, make_images(4), train=False)
        return jnp.sum(outputs["selection_logits"])

    of_selection = gradient(variables["params"])
    assert leaf_norm(of_selection["selection_head"]) > 0
    assert (leaf_norm(of_selection["backbone"]) == 0) == detach


@pytest.mark.parametrize(("method", "backbone"), [
    *((method, "cnn") for method in METHODS),
    *(("mc_dropout", name) for name in ("mlp", "vgg16_bn", "resnet18")),
    ("sync", "vgg16_bn"),
])  # fmt: skip
def test_make_network_follows_the_config(method, backbone):
    method = METHODS[method]
    config = default_config().model
    config.name = backbone
    config.width = 3
    network = make_network(
        config,
        heads=method.heads,
        num_classes=4,
        target_coverage=0.9,
        dropout=0.4,
        dropout_samples=6,
    )
    drops = "dropout" in method.heads
    own = make_backbone(config)
    if backbone == "vgg16_bn":
        assert (own.last_dropout, network.backbone.last_dropout) == (0.5, 0.0 if drops else 0.5)
        own = own.clone(last_dropout=network.backbone.last_dropout)
    assert network == SelectiveNetwork(
        backbone=own,
        num_classes=4,
        heads=method.heads,
        target_coverage=0.9,
        dropout=0.4 if drops else 0.0,
        dropout_samples=6 if drops else 0,
    )
    outputs = jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, train=False)[0], make_images(2)
    )
    assert outputs["logits"].shape == (2, 4)
    # Features serve a training objective and no score: evaluation does not keep them.
    assert len(outputs) == 1 + len(set(method.heads) - {"features"})


# --- Dropout --------------------------------------------------------------------------------------


def dropout_network(samples):
    return SelectiveNetwork(Flatten(), 3, ("dropout",), dropout=0.5, dropout_samples=samples)


def test_samples_are_averaged_as_probabilities():
    """Against the mean over masks in NumPy; every example sees the same masks."""
    network = dropout_network(7)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2, 1)), jnp.float32)
    variables = network.init(jax.random.key(1), images, train=False)
    outputs = network.apply(variables, images, train=False)
    masks = jax.random.bernoulli(jax.random.key(0), 0.5, (7, 4)) / 0.5
    head = variables["params"]["class_head"]
    logits = (images.reshape(5, 4) * masks[:, None]) @ head["kernel"] + head["bias"]
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp(outputs["logits"]), p.mean(axis=0), rtol=1e-5)
    entropy = -(p * np.log(p)).sum(axis=-1).mean(axis=0)
    np.testing.assert_allclose(outputs["expected_entropy"], entropy, rtol=1e-5)
    assert np.unique(np.asarray(masks), axis=0).shape[0] > 1
    # So an example's outputs do not depend on the batch.
    alone = network.apply(variables, images[2:3], train=False)
    np.testing.assert_allclose(alone["logits"], outputs["logits"][2:3], rtol=1e-6)


def test_training_drops_by_its_key():
    network, images = dropout_network(400), jnp.ones((64, 4, 4, 1))
    variables = network.init(jax.random.key(1), images, train=False)

    @jax.jit
    def logits(seed):
        rngs = {"dropout": jax.random.key(seed)}
        return network.apply(variables, images, train=True, rngs=rngs)["logits"]

    np.testing.assert_array_equal(logits(0), logits(0))
    assert not np.array_equal(logits(0), logits(1))
    assert np.ptp(logits(0), axis=0).min() > 0  # each example on its own
    expected = SelectiveNetwork(Flatten(), 3).apply(variables, images, train=True)["logits"][0]
    mean = np.mean([logits(seed).mean(axis=0) for seed in range(50)], axis=0)
    np.testing.assert_allclose(mean, expected, atol=0.1)
