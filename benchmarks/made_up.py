"""Made-up images in the form of our datasets, where there is no network: for speed, not accuracy.

    python -m benchmarks.made_up cifar10 FOLDER     # then --config.data.data_dir=FOLDER

Each class has a coarse pattern, which an image shows shifted, faint, under another class' pattern
and noise; one label in twenty is wrong. Networks learn them, some images better than others.
"""

import sys
from pathlib import Path

import numpy as np

from sync_jax.config import default_config
from sync_jax.data import registry
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.arrays import ArrayDataset


def dataset(name: str, folder: Path) -> ArrayDataset:
    """One of the datasets of small images, in a folder."""
    section = default_config().data
    section.name, section.data_dir = name, str(folder)
    made = registry.dataset(section)
    assert isinstance(made, ArrayDataset)
    return made


def images_and_labels(info: DatasetInfo, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[count, height, width, channels]` uint8 and labels `[count]` of a dataset's form."""
    height, width, channels = info.image_shape
    patterns = np.random.default_rng(0).normal(size=(info.num_classes, 7, 7, channels))
    patterns = np.kron(patterns, np.ones((1, 8, 8, 1))).astype(np.float32)  # larger than an image
    rng = np.random.default_rng(seed)
    labels, others = rng.integers(0, info.num_classes, (2, count))
    places = rng.integers(0, 56 - max(height, width), (2, count, 2))
    strength = (rng.uniform(10, 40, (2, count)) * [[1.0], [0.7]]).astype(np.float32)
    images = np.empty((count, height, width, channels), np.uint8)
    for start in range(0, count, 1000):
        some = range(start, min(start + 1000, count))
        sums = 128 + 30 * rng.standard_normal((len(some), height, width, channels), np.float32)
        for i, image in zip(some, sums, strict=True):
            for which, label in enumerate((labels[i], others[i])):
                top, left = places[which, i]
                shown = patterns[label, top : top + height, left : left + width]
                image += strength[which, i] * shown
        images[some.start : some.stop] = sums.clip(0, 255)
    wrong = rng.random(count) < 0.05
    labels[wrong] = others[wrong]
    return images, labels


def prepare(name: str, folder: Path, *, train: int = 0, test: int = 0) -> None:
    """Prepares a dataset of such images.

    Args:
        name: 'fashion_mnist', 'cifar10' or 'cifar100'.
        folder: to be the config's data.data_dir.
        train: training images; 0: as many as the dataset has. Others than that fit only where
            the dataset's `INFO` says so too.
        test: test images, likewise.
    """
    made = dataset(name, folder)
    folder.mkdir(parents=True, exist_ok=True)
    made.write(
        {
            "train": images_and_labels(made.INFO, train or made.INFO.num_train, 1),
            "test": images_and_labels(made.INFO, test or made.INFO.num_test, 2),
        }
    )


if __name__ == "__main__":
    prepare(sys.argv[1], Path(sys.argv[2]))
