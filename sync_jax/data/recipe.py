"""The order of the examples and their augmentation, as both pipelines need it; imports no JAX."""

import math
from collections.abc import Sequence
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
    draws = [rng.random(shape) for shape in ((1, TRIES), (1, TRIES), 1, 1)]
    boxes = random_boxes(draws, image.height, image.width, min_area)
    top, left, high, wide = boxes[0].astype(int).tolist()
    image = image.crop((left, top, left + wide, top + high))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return pixels.reshape(height, width, -1)


def random_boxes(draws: Sequence[Any], height: int, width: int, min_area: float) -> Any:
    """Draws boxes as torchvision's RandomResizedCrop: `[batch, 4]`, top, left, height and width.

    Where no try fits, the largest middle part of an allowed aspect ratio.

    `draws` are uniform in `[0, 1)`, of NumPy or JAX: areas and ratios `[batch, TRIES]`, tops and
    lefts `[batch]`. The boxes are whole numbers in the draws' dtype.
    """
    areas, ratios, tops, lefts = draws
    xp, limit = areas.__array_namespace__(), math.log(RATIO)
    area = height * width * (min_area + (1.0 - min_area) * areas)
    ratio = xp.exp(2.0 * limit * ratios - limit)
    high, wide = xp.round(xp.sqrt(area / ratio)), xp.round(xp.sqrt(area * ratio))
    fits = (high >= 1) & (high <= height) & (wide >= 1) & (wide <= width)
    first, some = xp.argmax(fits, axis=1)[:, None], xp.any(fits, axis=1)
    most = min(height, round(width * RATIO)), min(width, round(height * RATIO))
    h = xp.where(some, xp.take_along_axis(high, first, axis=1)[:, 0], most[0])
    w = xp.where(some, xp.take_along_axis(wide, first, axis=1)[:, 0], most[1])
    top = xp.floor(xp.where(some, tops * (height - h + 1), (height - h) / 2))
    left = xp.floor(xp.where(some, lefts * (width - w + 1), (width - w) / 2))
    return xp.stack([top, left, h, w], axis=1)
