"""A small folder of pictures per class, and datasets of encoded pictures."""

import io
import tarfile
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sync_jax.config import default_config
from sync_jax.data import registry
from sync_jax.data.info import Dataset

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


def section(name: str, folder: Path, **changes: object) -> ConfigDict:
    """The `data` section for a dataset of 12 x 12 pictures, found and prepared in a folder."""
    data = default_config().data
    data.name, data.data_dir = name, str(folder / "data")
    data.source, data.folder = str(folder / "source"), str(folder / "pictures")
    data.image_size, data.calibration_size = 12, 0
    data.update(changes)
    return data


def prepared(data: ConfigDict) -> tuple[Dataset, list[str]]:
    """A new dataset of a section, prepared, and what it said."""
    lines: list[str] = []
    made = registry.dataset(data)
    made.prepare(lines.append)
    return made, lines


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()
