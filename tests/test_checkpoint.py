import chex
import jax
import jax.numpy as jnp
import pytest

from sync_jax.checkpoint import Checkpoints
from sync_jax.errors import InputError
from sync_jax.steps import TrainState


def state(value: float) -> TrainState:
    def tree() -> dict[str, jax.Array]:
        return {"kernel": jnp.full((3, 2), value), "bias": jnp.arange(2.0) * value}

    return TrainState(
        step=jnp.int32(value),
        params=tree(),
        batch_stats={},
        opt_state=(tree(), jnp.int32(7)),
        memory=jnp.full(5, value),
    )


def test_restores_the_latest_bit_for_bit_and_keeps_so_many(tmp_path):
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 3):
            checkpoints.save(state(step / 3), step)
        checkpoints.wait()
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        chex.assert_trees_all_equal(checkpoints.restore(state(0.0)), state(3 / 3))
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3"}


def test_a_save_in_progress_is_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state(1.0), 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_saved_state_may_be_donated(tmp_path):
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        current = state(1.0)
        checkpoints.save(current, 1)
        change(current)
        checkpoints.wait()
        chex.assert_trees_all_equal(checkpoints.restore(state(0.0)), state(1.0))


def test_nothing_to_restore(tmp_path):
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(InputError, match="holds no checkpoint"),
    ):
        checkpoints.restore(state(0.0))


def test_another_network_is_refused_by_name(tmp_path):
    other = state(1.0).replace(params={"kernel": jnp.ones((5, 5))})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1.0), 4)
        checkpoints.wait()
        with pytest.raises(InputError, match=rf"{tmp_path}/4 cannot be restored"):
            checkpoints.restore(other)
