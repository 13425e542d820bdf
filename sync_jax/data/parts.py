"""The three disjoint parts of the evaluation protocol: train, calibration and test."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data import catalogue
from sync_jax.data.splits import stratified_split


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples in host memory.

    Attributes:
        images: `[n, height, width, channels]` uint8.
        labels: `[n]` int32.
        index: `[n]` int64, each example's position in the official split that it comes from.
    """

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray


def load_train_and_calibration(config: ConfigDict) -> tuple[Part, Part]:
    """The official training split, divided: what is trained on, and what thresholds are chosen on.

    Args:
        config: `data` section: name, data_dir, calibration_size, split_seed.

    Raises:
        InputError: the dataset is not prepared or damaged.
    """
    images, labels = catalogue.load_split(config.name, "train", data_dir=config.data_dir)
    kept, held_out = stratified_split(
        labels, holdout=config.calibration_size, seed=config.split_seed
    )
    train, calibration = (Part(images[index], labels[index], index) for index in (kept, held_out))
    return train, calibration


def load_test(config: ConfigDict) -> Part:
    """The official test split. Read it once, when nothing is left to decide.

    Args:
        config: `data` section: name, data_dir.

    Raises:
        InputError: the dataset is not prepared or damaged.
    """
    images, labels = catalogue.load_split(config.name, "test", data_dir=config.data_dir)
    return Part(images, labels, np.arange(len(labels)))
