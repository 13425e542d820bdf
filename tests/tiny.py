"""A dataset and a config small enough to train in seconds, through the real code."""

import sys
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import quickstart
from sync_jax.data import registry
from sync_jax.data.placement import Placement
from sync_jax.trainer import Trainer, resolve
from tests.data import idx_files

NUM_TRAIN, NUM_TEST, NUM_CALIBRATION = 230, 70, 40

# What is changed of the quickstart. Tests had better keep to it: those that differ in the method
# alone share what was compiled, and compilation is most of their time.
OVERRIDES = {
    "data.calibration_size": NUM_CALIBRATION,
    "model.width": 4,
    "model.features": 16,
    "optimizer.warmup_epochs": 0.5,
    "train.epochs": 1.5,
    "train.batch_size": 16,
    "log.every_steps": 4,
    "checkpoint.every_epochs": 0.5,
    "evaluation.batch_size": 16,
}


def contents(seed: int = 0) -> dict[str, np.ndarray]:
    """Ten classes, each a bright row at its own height under noise: learnable, not trivial."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for prefix, size in {"train": NUM_TRAIN, "t10k": NUM_TEST}.items():
        labels = (np.arange(size) % 10).astype(np.uint8)
        images = rng.integers(0, 160, (size, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label + 4] += rng.integers(0, 160, 28)
        arrays[f"{prefix}-images-idx3-ubyte"] = np.clip(images, 0, 255).astype(np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = labels
    return arrays


def prepare(folder: Path) -> Path:
    """Prepares the dataset as Fashion-MNIST; returns the data_dir."""
    upstream = idx_files.publish(folder / "files", contents())
    data_dir = folder / "data"
    idx_files.dataset(data_dir, upstream, folder / "files").prepare()
    return data_dir


def config(data_dir: Path, **changes: object) -> ConfigDict:
    """The config; `changes` by path with __ for the dot."""
    result = quickstart.get_config()
    result.data.data_dir = str(data_dir)
    for path, value in (OVERRIDES | {k.replace("__", "."): v for k, v in changes.items()}).items():
        result.update_from_flattened_dict({path: value})
    resolve(result)
    return result


def trainer(
    config: ConfigDict, mesh: jax.sharding.Mesh, placement: Placement | None = None
) -> Trainer:
    """The trainer of a config, for the dataset here."""
    info = registry.dataset(config.data).info()
    return Trainer(config, mesh, info, train_size=NUM_TRAIN - NUM_CALIBRATION, placement=placement)


def command(data_dir: Path, workdir: Path, *arguments: str) -> list[str]:
    """A command line for a process of its own."""
    overrides = [f"--config.{path}={value}" for path, value in OVERRIDES.items()]
    return [
        *(sys.executable, "-m", "sync_jax.main", "--config=configs/quickstart.py"),
        *(f"--workdir={workdir}", f"--config.data.data_dir={data_dir}", *overrides, *arguments),
    ]
