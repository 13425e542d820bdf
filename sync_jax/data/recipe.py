"""The order of the examples and their augmentation, as both pipelines need it; imports no JAX."""

import math
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from sync_jax.runtime.hashing import mix

ROUNDS = 32  # of the shuffle: twice as many as pass every statistical test that we tried
# Random resized crops: aspect ratios from 3/4 to its inverse, so many tries at one that fits.
RATIO, TRIES = 4 / 3, 10


class Augmentation(NamedTuple):
    """The augmentation of a training image, in the order of its fields; see the options of `data`.

    The device does it by `augmentation.augment`; the host pipeline makes the resized crops itself.
    Rotation comes first where nothing is resized (the field's way on SVHN), else after the flip.
    """

    crop_padding: int
    flip: bool
    rotation: float = 0.0
    min_crop_area: float = 1.0
    jitter: float = 0.0
    sharpen: float = 0.0
    grey: float = 0.0
    perspective: float = 0.0
    posterise: float = 0.0

    @classmethod
    def of(cls, section: ConfigDict) -> "Augmentation":
        """Reads the `data` section of a config."""
        padding, flip, *rest = (section[name] for name in cls._fields)
        return cls(padding, flip, *map(float, rest))


def shuffled(place: Any, constants: Any, size: int) -> Any:
    """Maps each place by a pseudo-random permutation of `range(size)`.

    The swap-or-not shuffle (Hoang, Morris & Rogaway, CRYPTO 2012): exactly a permutation for every
    size, and computed for each element alone, so a step costs O(batch) and stores no permutation.

    Values are uint32 in `[0, size)`, of NumPy or JAX, which give the same. `constants` are
    `[..., rounds, 2]`, the permutation of each element.
    """
    xp = place.__array_namespace__()
    modulus = xp.asarray(size, dtype=xp.uint32)
    for i in range(ROUNDS):  # unrolled: one fused kernel instead of a loop of launches
        pivot, salt = constants[..., i, 0] % modulus, constants[..., i, 1]
        # A round pairs x with pivot - x and swaps the pair or not, by one hashed bit of the pair.
        partner = (pivot + (modulus - place)) % modulus
        swap = mix(xp.maximum(place, partner) ^ salt) & np.uint32(1)
        place = xp.where(swap == 1, partner, place)
    return place


def random_crop(
    rng: np.random.Generator, image: Image.Image, min_area: float, height: int, width: int
) -> np.ndarray:
    """Crops a random box, resized bilinear and antialiased: `[height, width, channels]` uint8."""
    left, top, wide, high = random_box(rng, *image.size, min_area)
    image = image.crop((left, top, left + wide, top + high))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, -1)


def random_box(
    rng: np.random.Generator, width: int, height: int, min_area: float
) -> tuple[int, int, int, int]:
    """Draws (left, top, width, height) as torchvision's RandomResizedCrop.

    Where no try fits, the largest middle part of an allowed aspect ratio.
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
