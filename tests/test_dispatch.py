"""Several steps in one dispatch are the same steps: states, metrics, bad steps, stops."""

import os
import signal

import chex
import jax
import pytest

from sync_jax import train
from sync_jax import trainer as run_lib
from sync_jax.errors import InputError, TerminatedError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.progress import Progress, read_metrics
from sync_jax.trainer import Run
from tests import faulty, tiny

MAKE_MESH = sharding.make_mesh


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def config_of(data_dir, together, **changes):
    # Saves every 6 steps, evaluates every 12, logs every 5: none of them a multiple of 4.
    changes = {"log__every_steps": 5, "method": "self_adaptive"} | changes
    return tiny.config(data_dir, train__steps_per_dispatch=together, **changes)


def left(config, workdir):
    """State and metrics of a finished run."""
    run = Run(config, sharding.make_mesh(), train_size=tiny.NUM_TRAIN - tiny.NUM_CALIBRATION)
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(run.state_like)
        assert checkpoints.latest_step() == run.total_steps == 18
    lines = [{k: v for k, v in e.items() if k != "seconds"} for e in read_metrics(workdir)]
    return restored.state, lines


@pytest.mark.parametrize("start", [0, 6, 10, 11, 13])
def test_dispatches_by_hand(start, data_dir):
    run = Run(config_of(data_dir, 4), sharding.make_mesh(), train_size=190)
    assert (run.steps_of(0.5), run.steps_of(1.0), run.total_steps) == (6, 12, 18)
    whole = [(1, 4), (5, 5), (6, 6), (7, 10), (11, 11), (12, 12), (13, 16), (17, 17), (18, 18)]
    if start == 13:  # of a run that had other dispatches: one by one, until it is on the grid
        whole[6:7] = [(13, 13), (14, 14), (15, 15), (16, 16)]
    found = [(steps[0], steps[-1]) for steps in run.dispatches(start)]
    assert found == [steps for steps in whole if steps[0] > start]


@pytest.mark.slow
def test_one_and_four_steps_at_once_end_with_the_same_bits(data_dir, tmp_path, monkeypatch, capsys):
    step, sizes = Run.step, []

    def noted(self, *arguments, **options):
        sizes.append(len(options["skips"]))
        return step(self, *arguments, **options)

    monkeypatch.setattr(Run, "step", noted)
    monkeypatch.setattr(run_lib, "train_step", run_lib.train_step)
    faulty.spoil(3, 14)  # inside a dispatch of four, to be skipped
    found = {}
    for together in (1, 4):
        config = config_of(data_dir, together, train__on_nonfinite="skip")
        sizes.clear()
        train.train_and_evaluate(config, tmp_path / f"{together}")
        found[together] = left(config, tmp_path / f"{together}")
        assert set(sizes) == {1, together}
        assert sum(sizes) == 18
    assert capsys.readouterr().out.count("step 14: ") == 2
    chex.assert_trees_all_equal(found[1][0], found[4][0])
    assert found[1][1] == found[4][1]
    names = [(e["part"], e["step"]) for e in found[1][1]]
    assert names == [
        ("train", 5), ("train", 10), ("calibration", 12), ("train", 15), ("train", 18),
        ("calibration", 18),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_stop_inside_a_dispatch_is_after_it_and_costs_no_bit(data_dir, tmp_path, monkeypatch):
    config = config_of(data_dir, 4, checkpoint__every_epochs=100.0)
    train.train_and_evaluate(config, tmp_path / "whole")
    step = Progress.step

    def terminated(self, done):
        step(self, done)
        if done == 16:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", terminated)
        with pytest.raises(TerminatedError, match="stopped by SIGTERM, saved at step 16"):
            train.train_and_evaluate(config, tmp_path / "broken")
    # And goes on one by one: how many at once may change.
    config = config_of(data_dir, 1, checkpoint__every_epochs=100.0)
    train.train_and_evaluate(config, tmp_path / "broken")
    whole, broken = (left(config, tmp_path / name) for name in ("whole", "broken"))
    chex.assert_trees_all_equal(whole[0], broken[0])
    assert whole[1] == broken[1]


def test_images_on_the_host_come_one_batch_at_a_time(data_dir, tmp_path):
    config = config_of(data_dir, 4, data__placement="host")
    with pytest.raises(InputError, match=r"steps_per_dispatch=4 wants the images on the device"):
        train.train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_cpu_does_one_at_a_time_by_itself(data_dir):
    run = Run(config_of(data_dir, 0), sharding.make_mesh(), train_size=190)
    assert run.steps_per_dispatch == 1
    assert [len(steps) for steps in run.dispatches(0)] == [1] * 18
