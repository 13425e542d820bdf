import functools

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sync_jax import losses
from sync_jax.config import default_config
from sync_jax.methods import METHODS
from sync_jax.scores import REQUIRED_OUTPUT

# What a head adds to the network's outputs.
OUTPUT_OF_HEAD = {"selection": "selection_logits", "auxiliary": "auxiliary_logits"}


def make_outputs():
    rng = np.random.default_rng(0)
    outputs = {
        "logits": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32),
        "selection_logits": jnp.asarray(rng.standard_normal(6), jnp.float32),
        "auxiliary_logits": jnp.asarray(rng.standard_normal((6, 3)), jnp.float32),
    }
    return outputs, jnp.asarray(rng.integers(0, 3, 6)), jnp.array([1.0, 1, 0, 1, 1, 1])


def unusual_config() -> ConfigDict:
    """Every hyperparameter apart from its default, and from every other."""
    config = default_config()
    config.target_coverage = 0.9
    config.loss = ConfigDict(
        {
            "coverage_weight": 7.0,
            "alpha": 0.3,
            "prior_power": 2.0,
            "prior_weight": 0.6,
            "sync_weight": 1.7,
            "divergence": "mse",
        }
    )
    return config


def available(method):
    outputs, labels, mask = make_outputs()
    names = {"logits", *(OUTPUT_OF_HEAD[head] for head in method.heads)}
    return {name: outputs[name] for name in names}, labels, mask


def test_the_methods_are_the_issues():
    assert METHODS.keys() == {"ce", "selectivenet", "sync"}
    assert METHODS["ce"].heads == ()
    assert METHODS["ce"].score == "softmax_response"
    for name in ("selectivenet", "sync"):
        assert set(METHODS[name].heads) == {"selection", "auxiliary"}
        assert METHODS[name].score == "selection"


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_its_heads_suffice(method):
    """For the objective and for the score."""
    outputs, labels, mask = available(method)
    loss, terms = method.objective(outputs, labels, mask, default_config())
    chex.assert_shape([loss, *terms.values()], ())
    chex.assert_tree_all_finite((loss, terms))
    assert REQUIRED_OUTPUT[method.score] in outputs


def test_objectives_are_the_losses_with_the_configs_values():
    outputs, labels, mask = make_outputs()
    config = unusual_config()
    common = {"target_coverage": 0.9, "coverage_weight": 7.0, "alpha": 0.3, "mask": mask}
    arrays = (
        outputs["logits"],
        outputs["selection_logits"],
        outputs["auxiliary_logits"],
        labels,
    )
    expected = {
        "ce": losses.cross_entropy_loss(outputs["logits"], labels, mask=mask),
        "selectivenet": losses.selectivenet_loss(*arrays, **common),
        "sync": losses.sync_loss(
            *arrays,
            **common,
            prior_power=2.0,
            prior_weight=0.6,
            sync_weight=1.7,
            divergence="mse",
        ),
    }
    actual = {
        name: method.objective(outputs, labels, mask, config) for name, method in METHODS.items()
    }
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(("name", "fields"), [
    ("ce", set()),
    ("selectivenet", {"target_coverage", "coverage_weight", "alpha"}),
    ("sync", {"target_coverage", "coverage_weight", "alpha", "prior_power", "prior_weight",
              "sync_weight", "divergence"}),
])  # fmt: skip
def test_which_fields_matter(name, fields):
    """Each changes the loss of the methods that have it, and of no other."""
    outputs, labels, mask = make_outputs()
    objective = functools.partial(METHODS[name].objective, outputs, labels, mask)
    before = objective(unusual_config())[0]
    changes = {
        "target_coverage": 0.95,
        **dict.fromkeys(unusual_config().loss, 0.1),
        "divergence": "bce",
    }
    changed = set()
    for field, value in changes.items():
        config = unusual_config()
        (config if field == "target_coverage" else config.loss)[field] = value
        if objective(config)[0] != before:
            changed.add(field)
    assert changed == fields


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_mask_is_passed_on(method):
    outputs, labels, mask = available(method)
    loss, _ = method.objective(outputs, labels, mask, default_config())
    changed = {name: array.at[2].add(1.0) for name, array in outputs.items()}  # the masked one
    assert method.objective(changed, labels, mask, default_config())[0] == loss
    changed = {name: array.at[1].set(-array[1]) for name, array in outputs.items()}
    assert method.objective(changed, labels, mask, default_config())[0] != loss
