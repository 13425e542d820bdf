"""Finished runs on small pictures of many sizes, as PNG and JPEG."""

import numpy as np
import pytest
from PIL import Image

from sync_jax import train
from sync_jax.config import default_config
from sync_jax.trainer import resolve
from tests.data import pictures

CLASSES = ("ant", "bee", "cat & dog")


def write_pictures(folder, count=14):
    """Blurred patches whose colour tells the class; sides from 14 to 40, every second a JPEG."""
    rng = np.random.default_rng(0)
    for split, each in {"train": count, "val": 8, "test": 7}.items():
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                small = rng.integers(0, 160, (3, 4, 3))
                small[..., label] += 60
                image = Image.fromarray(small.astype(np.uint8))
                image = image.resize((14 + 2 * i, 20 + i), Image.Resampling.BICUBIC)
                image.save(folder / split / name / f"{i:02}.{('png', 'jpg')[i % 2]}")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a finished run, beside its pictures; by the resident pipeline."""
    return finished_run(tmp_path_factory.mktemp("deploy"), "device")


@pytest.fixture(scope="session")
def host_run(tmp_path_factory):
    """The same by the host pipeline."""
    return finished_run(tmp_path_factory.mktemp("deploy-host"), "host")


def finished_run(folder, placement):
    write_pictures(folder / "pictures")
    config = default_config()
    config.data = pictures.section(
        "image_folder", folder, image_size=12, stored_size=14, short_side=16, crop_padding=0
    )
    config.data.placement = placement
    config.model.width, config.model.features = 4, 8
    config.train.batch_size, config.train.epochs = 16, 4.0
    config.evaluation.batch_size = 8
    config.evaluation.target_risks = (0.3,)
    config.process.watchdog_seconds = 0.0
    config.optimizer.warmup_epochs = 0.5
    resolve(config)
    train.train_and_evaluate(config, folder / "run")
    return folder / "run"
