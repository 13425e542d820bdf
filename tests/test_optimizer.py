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
    return np.array([schedule(jnp.int32(step)) for step in range(total_steps)])


def test_linear_by_hand():
    values = rates(optimizer_config(schedule="linear"), total_steps=5, steps_per_epoch=1)
    np.testing.assert_allclose(values, [1.0, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)


def test_cosine_by_hand():
    values = rates(optimizer_config(schedule="cosine"), total_steps=4, steps_per_epoch=1)
    half = np.sqrt(0.5)
    np.testing.assert_allclose(values, [1.0, (1 + half) / 2, 0.5, (1 - half) / 2], rtol=1e-6)


def test_step_by_hand():
    config = optimizer_config(schedule="step", decay_epochs=1.5, decay_factor=0.1)
    values = rates(config, total_steps=7, steps_per_epoch=2)
    np.testing.assert_allclose(values, [1, 1, 1, 0.1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_warm_up_by_hand():
    """Half an epoch of 8 steps: from a quarter of the peak to the peak, then the decay."""
    config = optimizer_config(schedule="linear", warmup_epochs=0.5)
    values = rates(config, total_steps=8, steps_per_epoch=8)
    np.testing.assert_allclose(
        values, [0.25, 0.4375, 0.625, 0.8125, 1.0, 0.75, 0.5, 0.25], rtol=1e-6
    )


def test_warm_up_before_cosine_by_hand():
    config = optimizer_config(schedule="cosine", warmup_epochs=1.0, learning_rate=0.4)
    values = rates(config, total_steps=4, steps_per_epoch=2)
    np.testing.assert_allclose(values, [0.2, 0.3, 0.4, 0.2], rtol=1e-6)


def test_step_counts_its_epochs_from_the_start_of_the_warm_up():
    config = optimizer_config(
        schedule="step", warmup_epochs=1.0, decay_epochs=2.0, decay_factor=0.5
    )
    values = rates(config, total_steps=9, steps_per_epoch=2)
    np.testing.assert_allclose(values, [0.5, 0.75, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup_epochs", [0.0, 0.01, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("total_steps", [1, 2, 37])
@pytest.mark.parametrize("steps_per_epoch", [3.7, 10.0])
def test_no_step_is_wasted(schedule, warmup_epochs, total_steps, steps_per_epoch):
    config = optimizer_config(schedule=schedule, warmup_epochs=warmup_epochs)
    values = rates(config, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    assert np.all(values > 0)
    assert np.all(values <= 1 + 1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decays_to_zero_just_after_the_last_step(schedule):
    schedule = learning_rate_schedule(
        optimizer_config(schedule=schedule, warmup_epochs=1.0), total_steps=20, steps_per_epoch=4
    )
    assert 0 < schedule(19) < 0.1
    np.testing.assert_allclose(schedule(20), 0.0, atol=1e-7)


def test_peak_is_reached_and_everything_scales_with_it():
    for schedule in SCHEDULES:
        config = optimizer_config(schedule=schedule, warmup_epochs=1.0, decay_epochs=5.0)
        values = rates(config, total_steps=20, steps_per_epoch=4)
        assert values.argmax() == 4
        np.testing.assert_allclose(values.max(), 1.0, rtol=1e-6)
        config.learning_rate = 0.03
        scaled = rates(config, total_steps=20, steps_per_epoch=4)
        np.testing.assert_allclose(scaled, 0.03 * values, rtol=1e-5)


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


def test_momentum_and_weight_decay_by_hand():
    config = optimizer_config(momentum=0.9, weight_decay=0.1, nesterov=False)
    # d = 3 + 0.1 * 2 = 3.2, v = 3.2: 2 - 0.5 * 3.2 = 0.4
    assert apply(config, [0.5, 0.25], [3.0], 2.0) == pytest.approx(0.4, rel=1e-6)
    # d = -1 + 0.1 * 0.4 = -0.96, v = 0.9 * 3.2 - 0.96 = 1.92: 0.4 - 0.25 * 1.92 = -0.08
    assert apply(config, [0.5, 0.25], [3.0, -1.0], 2.0) == pytest.approx(-0.08, rel=1e-5)


def test_nesterov_by_hand():
    config = optimizer_config(momentum=0.9, weight_decay=0.1, nesterov=True)
    # d = 3.2, v = 3.2, d + 0.9 v = 6.08: 2 - 0.5 * 6.08 = -1.04
    assert apply(config, [0.5, 0.25], [3.0], 2.0) == pytest.approx(-1.04, rel=1e-6)
    # d = -1 - 0.104 = -1.104, v = 2.88 - 1.104 = 1.776, d + 0.9 v = 0.4944: -1.04 - 0.1236
    assert apply(config, [0.5, 0.25], [3.0, -1.0], 2.0) == pytest.approx(-1.1636, rel=1e-5)


def test_without_momentum_and_weight_decay_it_is_gradient_descent():
    config = optimizer_config(momentum=0.0, weight_decay=0.0)
    assert apply(config, [0.5, 0.25], [3.0, -1.0], 2.0) == pytest.approx(0.75, rel=1e-6)


def test_weight_decay_reaches_every_parameter():
    """Biases and BatchNorm's scales too, as the field trains."""
    config = optimizer_config(momentum=0.0, weight_decay=0.5)
    optimizer = make_optimizer(config, lambda step: 1.0)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "norm": {"scale": jnp.ones(2)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    chex.assert_trees_all_close(updates, jax.tree.map(lambda x: -0.5 * x, params))
