import asyncio
import copy
import gc
import random
import re
import resource
import shutil
import signal
import threading

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from sync_jax.errors import InputError, WriteError
from sync_jax.runtime import checkpoint, sharding
from sync_jax.runtime.checkpoint import Checkpoints, latest_notes
from sync_jax.steps import TrainState

fingerprints = checkpoint.fingerprints

# Of many reads or writes under way Orbax awaits the first that fails; the others' errors, such as
# that the loop they would report to is closed, go nowhere.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step: int) -> TrainState:
    """Numbers that no other step's state has."""

    def tree() -> dict[str, jax.Array]:
        return {"kernel": jnp.full((3, 2), step / 3), "bias": jnp.arange(2.0) * step}

    return TrainState(
        step=jnp.int32(step),
        params=tree(),
        batch_stats={},
        opt_state=(tree(), jnp.int32(7)),
        memory=jnp.full(5, step + 0.1),
    )


def test_restores_the_latest_bit_for_bit_and_keeps_so_many(tmp_path):
    """Also where the state is donated and the notes change while they are written."""
    notes = {"config": {"a": [1, 2.5, "x", None, True]}, "unlogged": [[3, {"loss": 0.1 + 0.2}]]}
    given = copy.deepcopy(notes)
    change = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.restore(state(0)) is None
        for step in (1, 2, 3):
            current = state(step)
            checkpoints.save(current, step, notes=given)
            change(current)
        given["unlogged"].append([4, {"loss": 1.0}])
    (tmp_path / "c" / "²").mkdir()  # a digit to Python, and no step
    with Checkpoints(tmp_path / "c", keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        restored = checkpoints.restore(state(0))
        assert (restored.step, restored.notes) == (3, notes)
        chex.assert_trees_all_equal(restored.state, state(3))
        with pytest.raises(InputError, match=rf"no checkpoint can be restored.*{tmp_path}/c/3: "):
            checkpoints.restore(state(0).replace(memory=jnp.ones((5, 5))))  # another network
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"2", "3", "²"}


def test_saving_goes_on_in_the_background(tmp_path, monkeypatch):
    """Until it is complete there is no such checkpoint."""
    may_end, finalize = threading.Event(), AtomicRenameTemporaryPath.finalize

    async def slow(self):
        while not may_end.is_set():
            await asyncio.sleep(0.01)
        await finalize(self)

    monkeypatch.setattr(AtomicRenameTemporaryPath, "finalize", slow)
    too_late = threading.Timer(60, may_end.set)
    too_late.start()
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state(1), 1)
        assert not may_end.is_set(), "it waited"
        assert not (tmp_path / "1").exists()
        may_end.set()
        checkpoints.wait()
        assert (tmp_path / "1").is_dir()
    too_late.cancel()


def spoil(folder, how):
    """Damages every file of a checkpoint, removes those that hold numbers, or all of it."""
    if how == "emptied folder":
        shutil.rmtree(folder)
        folder.mkdir()
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if how == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif "/d/" in str(path):
            path.unlink()


@pytest.mark.parametrize("how", ["emptied folder", "truncated", "a part is missing"])
def test_the_damaged_are_put_aside_by_name_and_if_none_is_whole_all_are_left(tmp_path, how):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), step)
    spoil(tmp_path / "2", how)
    lines = []
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored, step, _ = checkpoints.restore(state(0), lines.append)
        assert step == 1
        chex.assert_trees_all_equal(restored, state(1))
        checkpoints.save(state(2), 2)
    (line,) = lines
    assert line.startswith(f"checkpoint {tmp_path}/2 is put aside as 2.damaged: ")
    assert (tmp_path / "2.damaged").is_dir()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored, step, _ = checkpoints.restore(state(0), lines.append)
        assert step == 2
        chex.assert_trees_all_equal(restored, state(2))
    for path in tmp_path.iterdir():
        spoil(path, how)
    with (
        Checkpoints(tmp_path, keep=3) as checkpoints,
        pytest.raises(InputError, match=rf"{tmp_path}/2: .*{tmp_path}/1: .*move {tmp_path} away"),
    ):
        checkpoints.restore(state(0))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2", "2.damaged"}


def test_other_numbers_than_were_saved_are_noticed(tmp_path, monkeypatch):
    """As a bit that flips where nothing else checks: the digest alone tells."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(state(1), 1)
        with monkeypatch.context() as patch:
            other = fingerprints(state(2).replace(memory=jnp.ones(5)))
            patch.setattr(checkpoint, "fingerprints", lambda saved: other)
            checkpoints.save(state(2), 2)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        lines = []
        assert checkpoints.restore(state(0), lines.append).step == 1
    assert re.search(r"2\.damaged: .*(kernel|bias|memory|step).* is not what was saved", lines[0])


def test_a_checkpoint_under_another_name_or_beyond_the_end_is_put_aside(tmp_path):
    """Its score and its notes count for nothing either; where all are so, all are left."""
    scores = {1: 0.1, 2: 0.9, 3: 0.5, 6: 0.4}
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(state(step), step, notes={"of": step}, score=score)
    for name in ("4", "200", "007"):
        shutil.copytree(tmp_path / "2", tmp_path / name)
    (tmp_path / "2").rename(tmp_path / "0")
    assert latest_notes(tmp_path) == {"of": 6}
    lines = []
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        restored = checkpoints.restore(state(0), lines.append, last=5)
    assert (restored.step, restored.notes) == (3, {"of": 3})
    chex.assert_trees_all_equal(restored.state, state(3))
    reasons = dict.fromkeys((200, 6), "the training ends at step 5")
    reasons[4] = "it holds the state after step 2"
    assert lines == [
        f"checkpoint {tmp_path}/{step} is put aside as {step}.damaged: {reason}"
        for step, reason in reasons.items()
    ]
    with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
        checkpoints.save(state(4), 4, score=0.2)
    numbers = {path.name for path in tmp_path.iterdir() if path.name.isdigit()}
    assert numbers == {"3", "4", "007"}
    (tmp_path / "3").rename(tmp_path / "5")
    (tmp_path / "4").rename(tmp_path / "3")
    before = set(tmp_path.iterdir())
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(InputError, match=rf"/5: it holds .* 3; {tmp_path}/3: it holds .* 4\); to"),
    ):
        checkpoints.restore(state(0), last=5)
    assert set(tmp_path.iterdir()) == before


DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "bool")


@hypothesis.given(st.sampled_from(DTYPES), st.integers(0, 2**31), st.integers(0, 2**31))
def test_any_flipped_bit_changes_the_fingerprint(dtype, place, bit):
    rng = np.random.default_rng(0)
    array = jnp.asarray(rng.integers(-100, 100, (5, 7)), dtype)
    before = np.asarray(checkpoint._fingerprint(array))
    data = np.array(array)
    if dtype == "bool":
        data.flat[place % 35] ^= True
    else:
        size = data.dtype.itemsize
        data.view(f"u{size}").flat[place % 35] ^= 1 << (bit % (8 * size))
    after = np.asarray(checkpoint._fingerprint(jnp.asarray(data)))
    assert before[0] != after[0]
    assert before[1] != after[1]


def test_the_fingerprint_depends_on_places_and_on_no_sharding():
    mesh = sharding.make_mesh()
    array = jnp.arange(64.0).reshape(16, 4)
    expected = checkpoint._fingerprint(array)
    for place in (sharding.replicated(mesh), sharding.batch_sharding(mesh)):
        chex.assert_trees_all_equal(checkpoint._fingerprint(jax.device_put(array, place)), expected)
    swapped = array.at[0, 0].set(1.0).at[0, 1].set(0.0)
    assert not np.array_equal(checkpoint._fingerprint(swapped), expected)


def test_a_bit_flipped_anywhere_never_gives_other_numbers(tmp_path):
    """In any file of a checkpoint: it is put aside, or what is restored is what was saved."""
    with Checkpoints(tmp_path / "whole", keep=3) as checkpoints:
        for step in (1, 2):
            checkpoints.save(state(step), step, notes={"loss": 0.5 + step})
    rng = random.Random(0)
    outcomes = []
    for path in sorted(p for p in (tmp_path / "whole" / "2").rglob("*") if p.is_file()):
        folder = tmp_path / "copy"
        shutil.copytree(tmp_path / "whole", folder)
        damaged = folder / path.relative_to(tmp_path / "whole")
        data = bytearray(damaged.read_bytes() or b" ")
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        damaged.write_bytes(bytes(data))
        with Checkpoints(folder, keep=3) as checkpoints:
            restored = checkpoints.restore(state(0), lambda line: None)
        chex.assert_trees_all_equal(restored.state, state(restored.step))
        assert restored.notes == {"loss": 0.5 + restored.step}
        outcomes.append(restored.step)
        shutil.rmtree(folder)
    assert outcomes.count(1) >= 3  # most files matter


def test_the_latest_and_the_best_are_kept(tmp_path):
    scores = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.8, 5: None, 6: 0.1, 7: 0.2}
    with Checkpoints(tmp_path, keep=2, keep_best=2) as checkpoints:
        for step, score in scores.items():
            checkpoints.save(state(step), step, score=score)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4", "6", "7"}
    # A run that goes on remembers the scores of those before.
    with Checkpoints(tmp_path, keep=2, keep_best=2) as checkpoints:
        for step, score in {8: 0.85, 9: 0.0, 10: 0.0}.items():
            checkpoints.save(state(step), step, score=score)
    assert {path.name for path in tmp_path.iterdir()} == {"2", "8", "9", "10"}


def test_a_write_that_fails_is_one_line_and_the_earlier_checkpoint_stays(tmp_path):
    """The system refuses files of more than so many bytes, as a full disk does."""
    big = state(1).replace(memory=jnp.asarray(np.random.default_rng(0).normal(size=200_000)))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(big, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        checkpoints = Checkpoints(tmp_path, keep=3)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        with pytest.raises(WriteError, match=rf"^{tmp_path} cannot be written: ") as caught:  # noqa: PT012
            checkpoints.save(big.replace(step=jnp.int32(2)), 2)
            checkpoints.wait()
        assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored = checkpoints.restore(big)
        assert restored.step == 1
        chex.assert_trees_all_equal(restored.state, big)
    gc.collect()
