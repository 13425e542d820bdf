"""Every config trains: two steps of its own network and augmentation on made-up images."""

import runpy
from pathlib import Path

import jax
import numpy as np
import pytest

from sync_jax import sharding
from sync_jax.config import validate
from sync_jax.data import catalogue
from sync_jax.data.resident import ResidentSplit
from sync_jax.train import Run
from tests.data.pictures import write_pictures

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_two_steps(path, tmp_path):
    config = runpy.run_path(str(path))["get_config"]()
    if config.data.name == "image_folder":
        config.data.folder, config.data.data_dir = str(tmp_path / "p"), str(tmp_path / "data")
        write_pictures(tmp_path / "p", {"train": 15, "test": 3})
        catalogue.make_ready(config.data, log=str)
    config.train.batch_size = 8
    config.optimizer.warmup_epochs = 0.0
    validate(config)
    run = Run(config, sharding.make_mesh(jax.devices()[:1]), train_size=24)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, *run.info.image_shape), np.uint8)
    labels = (np.arange(24) % run.info.num_classes).astype(np.int32)
    split = ResidentSplit(jax.numpy.asarray(images), jax.numpy.asarray(labels))
    state = run.create_state()
    before = jax.device_get(state.params)
    for _ in range(2):
        state, metrics = run.step(state, split)
    assert all(np.isfinite(x) for x in jax.device_get(metrics).values())
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True):
        assert np.all(np.isfinite(new))
        assert not np.array_equal(old, new)
