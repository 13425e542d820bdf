"""A small folder of pictures per class."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat & dog")


def pixels(seed: int, height: int = 12, width: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def write_pictures(
    folder: Path, splits: dict[str, int], classes: tuple[str, ...] = CLASSES
) -> dict[str, list[tuple[np.ndarray, int]]]:
    """So many 12 x 12 PNGs of each class in each split; "" for no split folders.

    Returns:
        By split, (pixels, label) in the order of the names.
    """
    seed = 0
    written: dict[str, list[tuple[np.ndarray, int]]] = {}
    for split, count in splits.items():
        written[split] = []
        for label, name in enumerate(classes):
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(count):
                image = pixels(seed)
                seed += 1
                Image.fromarray(image).save(target / f"{i:03}.png")
                written[split].append((image, label))
    return written
