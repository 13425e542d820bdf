"""Random resized crops of single pictures on the host; imports no JAX.

The one part of an augmentation that needs a picture as it is, of any size: the rest is done on the
device, of all pictures of a batch together, by `augmentation.augment`.
"""

import math

import numpy as np
from PIL import Image

from sync_jax.data.recipe import RATIO, TRIES


def random_crop(
    rng: np.random.Generator, image: Image.Image, min_area: float, height: int, width: int
) -> np.ndarray:
    """A part of a picture, resized bilinear and antialiased.

    Args:
        rng: of this picture and step alone.
        image: RGB or grey, of any size.
        min_area: share of the picture, see `random_box`.
        height: pixels of the result.
        width: likewise.

    Returns:
        `[height, width, channels]` uint8.
    """
    left, top, wide, high = random_box(rng, *image.size, min_area)
    image = image.crop((left, top, left + wide, top + high))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, -1)


def random_box(
    rng: np.random.Generator, width: int, height: int, min_area: float
) -> tuple[int, int, int, int]:
    """(left, top, width, height) as torchvision's RandomResizedCrop draws them.

    Where no try fits, the largest middle part of an aspect ratio that is allowed.
    """
    limit = math.log(RATIO)
    for _ in range(TRIES):
        area = width * height * rng.uniform(min_area, 1.0)
        ratio = math.exp(rng.uniform(-limit, limit))
        wide, high = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 1 <= wide <= width and 1 <= high <= height:
            left, top = rng.integers(0, (width - wide + 1, height - high + 1)).tolist()
            return left, top, wide, high
    wide, high = min(width, round(height * RATIO)), min(height, round(width * RATIO))
    return (width - wide) // 2, (height - high) // 2, wide, high
