import re
import shutil

import chex
import jax
import jax.numpy as jnp
import pytest

from sync_jax import checkpoint
from sync_jax.checkpoint import Checkpoints
from sync_jax.errors import InputError
from sync_jax.steps import TrainState

digests = checkpoint._digests


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
        restored, step = checkpoints.restore(state(0.0))
        assert step == 3
        chex.assert_trees_all_equal(restored, state(3 / 3))
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
        chex.assert_trees_all_equal(checkpoints.restore(state(0.0))[0], state(1.0))


def test_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.restore(state(0.0)) is None


def test_another_network_is_refused_by_name(tmp_path):
    other = state(1.0).replace(params={"kernel": jnp.ones((5, 5))})
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state(1.0), 4)
        checkpoints.wait()
        with pytest.raises(InputError, match=rf"no checkpoint can be restored.*{tmp_path}/4: "):
            checkpoints.restore(other)


def spoil(folder, how):
    """Damages every file of a checkpoint that is large enough to hold numbers, or all of it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if how == "emptied folder":
        shutil.rmtree(folder)
        folder.mkdir()
    for path in files:
        if how == "emptied":
            path.write_bytes(b"")
        elif how == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif how == "numbers flipped" and "/d/" in str(path):
            data = bytearray(path.read_bytes())
            for i in range(len(data)):
                data[i] ^= 1
            path.write_bytes(bytes(data))
        elif how == "a part is missing" and "/d/" in str(path):
            path.unlink()


DAMAGES = ("emptied folder", "emptied", "truncated", "numbers flipped", "a part is missing")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_latest_is_put_aside_by_name_and_can_be_saved_anew(tmp_path, how):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(float(step)), step)
    spoil(tmp_path / "2", how)
    lines = []
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored, step = checkpoints.restore(state(0.0), lines.append)
        assert step == 1
        chex.assert_trees_all_equal(restored, state(1.0))
        checkpoints.save(state(2.0), 2)
    if how != "emptied folder":  # which Orbax does not take for a checkpoint
        (line,) = lines
        assert line.startswith(f"checkpoint {tmp_path}/2 is damaged and put aside as 2.damaged: ")
        assert (tmp_path / "2.damaged").is_dir()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored, step = checkpoints.restore(state(0.0), lines.append)
        assert step == 2
        chex.assert_trees_all_equal(restored, state(2.0))


def test_other_numbers_than_were_saved_are_noticed(tmp_path, monkeypatch):
    """As a bit that flips where nothing else checks: the digest alone tells."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(state(1.0), 1)
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "_digests", lambda saved: digests(state(2.5)))
            checkpoints.save(state(2.0), 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        lines = []
        assert checkpoints.restore(state(0.0), lines.append)[1] == 1
    assert re.search(r"2\.damaged: .*(kernel|bias|memory|step).* is not what was saved", lines[0])


def test_if_none_is_whole_all_are_left_as_they_are(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(float(step)), step)
    for step in ("1", "2"):
        spoil(tmp_path / step, "truncated")
    with (
        Checkpoints(tmp_path, keep=3) as checkpoints,
        pytest.raises(InputError, match=rf"{tmp_path}/2: .*{tmp_path}/1: .*move {tmp_path} away"),
    ):
        checkpoints.restore(state(0.0))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
