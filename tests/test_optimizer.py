import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sync_jax.config import default_config
from sync_jax.optimizer import learning_rate_schedule, make_optimizer

SCHEDULES = ("linear", "cosine", "step")


def optimizer_config(**changes) -> ConfigDict:
    config = default_config().optimizer
    config.learning_rate = 1.0
    config.warmup_epochs = 0.0
    config.update(changes)
    return config


def rates(config, *, total_steps, steps_per_epoch):
    schedule = learning_rate_schedule(
        config, total_steps=total_steps, steps_per_epoch=steps_per_epoch
    )
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.arange(total_steps)))


HALF = np.sqrt(0.5)


@pytest.mark.parametrize(("changes", "steps_per_epoch", "expected"), [
    ({"schedule": "linear"}, 1, [1.0, 0.8, 0.6, 0.4, 0.2]),
    ({"schedule": "cosine"}, 1, [1.0, (1 + HALF) / 2, 0.5, (1 - HALF) / 2]),
    ({"schedule": "step", "decay_epochs": 1.5, "decay_factor": 0.1}, 2,
     [1, 1, 1, 0.1, 0.1, 0.1, 0.01]),
    # Half an epoch of warm-up, from a quarter of the peak to the peak; then the decay.
    ({"schedule": "linear", "warmup_epochs": 0.5}, 8,
     [0.25, 0.4375, 0.625, 0.8125, 1.0, 0.75, 0.5, 0.25]),
    ({"schedule": "cosine", "warmup_epochs": 1.0, "learning_rate": 0.4}, 2, [0.2, 0.3, 0.4, 0.2]),
    # The epochs of "step" count from the start of the warm-up.
    ({"schedule": "step", "warmup_epochs": 1.0, "decay_epochs": 2.0, "decay_factor": 0.5}, 2,
     [0.5, 0.75, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25]),
])  # fmt: skip
def test_schedules_by_hand(changes, steps_per_epoch, expected):
    config = optimizer_config(**changes)
    values = rates(config, total_steps=len(expected), steps_per_epoch=steps_per_epoch)
    np.testing.assert_allclose(values, expected, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.3, 50.0])
@pytest.mark.parametrize("total_steps", [1, 37])
def test_no_step_is_wasted(schedule, warmup_epochs, total_steps):
    config = optimizer_config(schedule=schedule, warmup_epochs=warmup_epochs)
    values = rates(config, total_steps=total_steps, steps_per_epoch=3.7)
    assert np.all(values > 0)
    assert np.all(values <= 1 + 1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decays_to_zero_just_after_the_last_step(schedule):
    schedule = learning_rate_schedule(
        optimizer_config(schedule=schedule, warmup_epochs=1.0), total_steps=20, steps_per_epoch=4
    )
    assert 0 < schedule(19) < 0.1
    np.testing.assert_allclose(schedule(20), 0.0, atol=1e-7)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="unknown schedule 'constant'"):
        rates(optimizer_config(schedule="constant"), total_steps=2, steps_per_epoch=1)


# --- The update -----------------------------------------------------------------------------------


def apply(config, learning_rates, gradients, parameter):
    optimizer = make_optimizer(config, lambda step: jnp.asarray(learning_rates)[step])
    params = {"w": jnp.asarray(parameter, jnp.float32)}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)({"w": jnp.float32(gradient)}, state, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        params = {"w": params["w"] + updates["w"]}
    return float(params["w"])


@pytest.mark.parametrize(("options", "after_one", "after_two"), [
    # d = 3 + 0.1 * 2 = 3.2, v = 3.2: 2 - 0.5 * 3.2 = 0.4
    # d = -1 + 0.1 * 0.4 = -0.96, v = 0.9 * 3.2 - 0.96 = 1.92: 0.4 - 0.25 * 1.92 = -0.08
    ({"momentum": 0.9, "weight_decay": 0.1, "nesterov": False}, 0.4, -0.08),
    # d = 3.2, v = 3.2, d + 0.9 v = 6.08: 2 - 0.5 * 6.08 = -1.04
    # d = -1 - 0.104 = -1.104, v = 2.88 - 1.104 = 1.776, d + 0.9 v = 0.4944: -1.04 - 0.1236
    ({"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}, -1.04, -1.1636),
    ({"momentum": 0.0, "weight_decay": 0.0}, 0.5, 0.75),
])  # fmt: skip
def test_updates_by_hand(options, after_one, after_two):
    config = optimizer_config(**options)
    assert apply(config, [0.5, 0.25], [3.0], 2.0) == pytest.approx(after_one, rel=1e-5)
    assert apply(config, [0.5, 0.25], [3.0, -1.0], 2.0) == pytest.approx(after_two, rel=1e-5)


def test_weight_decay_reaches_every_parameter():
    """Biases and BatchNorm's scales too, as the field trains."""
    config = optimizer_config(momentum=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, lambda step: 1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -0.5 * x, params))
