"""The three disjoint parts of the evaluation protocol: train, calibration and test."""

import dataclasses

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data import registry
from sync_jax.data.splits import stratified_split

_ROWS = 4096  # moved at once


@dataclasses.dataclass(frozen=True)
class Part:
    """Examples.

    Attributes:
        images: what gives `[n, height, width, channels]` uint8 when it is sliced: an array, or
            pictures that are read or decoded then.
        labels: `[n]` int32.
        index: `[n]` int64, each example's position in the official split that it comes from.
    """

    images: registry.Images
    labels: np.ndarray
    index: np.ndarray


def calibration_size(config: ConfigDict, num_train: int) -> int:
    """How many examples of the official training split are held out.

    Args:
        config: `data` section: calibration_size, 0 for a tenth.
        num_train: examples of that split.
    """
    size: int = config.calibration_size
    return size or round(num_train / 10)


def load_train_and_calibration(config: ConfigDict, *, decode: bool = False) -> tuple[Part, Part]:
    """The official training split, divided: what is trained on, and what thresholds are chosen on.

    Args:
        config: `data` section.
        decode: see `registry.load`.

    Raises:
        InputError: the dataset is not prepared or damaged.
    """
    images, labels = registry.load(config, "train", decode=decode)
    kept, held_out = stratified_split(
        labels, holdout=calibration_size(config, len(labels)), seed=config.split_seed
    )
    train, calibration = _divided(images, kept, held_out)
    return Part(train, labels[kept], kept), Part(calibration, labels[held_out], held_out)


def _divided(
    images: registry.Images, kept: np.ndarray, held_out: np.ndarray
) -> tuple[registry.Images, registry.Images]:
    """The rows of each; what is kept of an array stays in it, for two would be twice the memory."""
    if not isinstance(images, np.ndarray):
        return images.subset(kept), images.subset(held_out)
    rest = images[held_out]
    for start in range(0, len(kept), _ROWS):
        rows = kept[start : start + _ROWS]
        # They are sorted, so that none of them was overwritten before.
        images[start : start + len(rows)] = images[rows]
    return images[: len(kept)], rest


def load_test(config: ConfigDict, *, decode: bool = False) -> Part:
    """The official test split. Read it once, when nothing is left to decide.

    Args:
        config: `data` section.
        decode: see `registry.load`.

    Raises:
        InputError: the dataset is not prepared or damaged.
    """
    images, labels = registry.load(config, "test", decode=decode)
    return Part(images, labels, np.arange(len(labels)))
