"""Every config trains: its own network and augmentation on made-up images."""

import runpy
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

from sync_jax.data import registry
from sync_jax.data.splits import Part
from sync_jax.runtime import sharding
from sync_jax.trainer import Trainer, choose_network, resolve
from tests.data.pictures import write_pictures

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
# These do their steps, and quickstart's network does in other tests; of the others, which take as
# long to compile, shapes and types are followed through a step.
TRAINED = ("cifar10_fast", "image_folder")


def begun(config):
    """A run, its first state and its batches."""
    config.train.batch_size = 8
    config.optimizer.warmup_epochs = 0.0
    config.model.width = 2
    resolve(config)
    choose_network(config)
    mesh, info = sharding.make_mesh(jax.devices()[:1]), registry.dataset(config.data).info()
    run = Trainer(config, mesh, info, train_size=24)
    images = np.random.default_rng(0).integers(0, 256, (24, *info.stored_shape), np.uint8)
    labels = (np.arange(24) % run.info.num_classes).astype(np.int32)
    return run, run.feed(Part(images, labels, np.arange(24)), 0)


def config_of(path, tmp_path):
    config = runpy.run_path(str(path))["get_config"]()
    config.data.data_dir = str(tmp_path / "data")
    if config.data.name == "image_folder":
        config.data.folder = str(tmp_path / "p")
        write_pictures(tmp_path / "p", {"train": 15, "test": 3})
        registry.dataset(config.data).prepare(str)
    if config.data.image_size == 224:  # the same network and augmentation, a tenth of the time
        config.data.image_size, config.data.short_side = 56, 64
    return config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_fits(path, tmp_path):
    run, feed = begun(config_of(path, tmp_path))
    data = next(feed)
    state, metrics = jax.eval_shape(lambda state: run.step(state, data), run.state_like)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, run.state_like)
    assert metrics.values.shape == (len(metrics.names),)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_two_steps(name, tmp_path):
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    run, feed = begun(config_of(path, tmp_path))
    state, _ = run.create_state()
    before = jax.device_get(state.params)
    for _ in range(2):
        state, metrics = run.step(state, next(feed))
    assert all(np.isfinite(x) for x in metrics.fetch().values())
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert np.all(np.isfinite(new))
        assert not np.array_equal(old, new)
