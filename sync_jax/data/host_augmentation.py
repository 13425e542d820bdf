"""Augmentation of single pictures on the host, with Pillow; imports no JAX.

The same distributions as on the device (`augmentation.augment`), and the same result for the same
numbers, to a level or two of 255: Pillow rounds to whole levels after each operation. Crops are of
the picture as it is, rather than of a smaller square of it.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from sync_jax.data.recipe import (
    DISTORTION,
    POSTERISED,
    RATIO,
    SHARPNESS,
    TRIES,
    Augmentation,
)

Corners = list[tuple[float, float]]


def augment(
    rng: np.random.Generator, image: Image.Image, augmentation: Augmentation, size: int
) -> np.ndarray:
    """One training picture.

    Args:
        rng: of this picture and step alone.
        image: RGB or grey; of the size of the result unless crops are resized.
        augmentation: what to do.
        size: pixels of a side of the result.

    Returns:
        `[size, size, channels]` uint8.
    """
    a = augmentation
    angle = rng.uniform(-a.rotation, a.rotation)
    if a.min_crop_area < 1:
        left, top, width, height = random_box(rng, *image.size, a.min_crop_area)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    elif a.rotation:
        image = rotate(image, angle)
    if a.crop_padding:
        right, down = rng.integers(-a.crop_padding, a.crop_padding + 1, 2).tolist()
        # A crop that reaches out of the picture is black there.
        image = image.crop((right, down, right + image.width, down + image.height))
    if rng.random() < 0.5 and a.flip:
        image = ImageOps.mirror(image)
    if a.min_crop_area < 1 and a.rotation:
        image = rotate(image, angle)
    if a.jitter:
        image = adjust(image, *rng.uniform(1 - a.jitter, 1 + a.jitter, 3).tolist())
    if rng.random() < a.sharpen:
        image = sharpen(image)
    if rng.random() < a.grey:
        image = image.convert("L").convert(image.mode)
    if rng.random() < a.perspective:
        image = perspective(image, random_corners(rng, *image.size))
    pixels = np.asarray(image)
    if rng.random() < a.posterise:
        pixels = pixels & np.uint8(POSTERISED)
    return pixels.reshape(size, size, -1)


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


def random_corners(rng: np.random.Generator, width: int, height: int) -> Corners:
    """Where perspective puts the corners, clockwise from the top left, as torchvision does."""
    x = rng.integers(0, int(DISTORTION * (width // 2)) + 1, 4).tolist()
    y = rng.integers(0, int(DISTORTION * (height // 2)) + 1, 4).tolist()
    return [
        (x[0], y[0]),
        (width - 1 - x[1], y[1]),
        (width - 1 - x[2], height - 1 - y[2]),
        (x[3], height - 1 - y[3]),
    ]


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Counterclockwise about the centre, by the nearest pixel, black outside."""
    return image.rotate(degrees, Image.Resampling.NEAREST)


def adjust(
    image: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
    """Multiplies brightness, then contrast, then saturation."""
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return ImageEnhance.Color(image).enhance(saturation) if image.mode == "RGB" else image


def sharpen(image: Image.Image) -> Image.Image:
    """Doubles the difference from a smoothed picture; the border stays."""
    return ImageEnhance.Sharpness(image).enhance(SHARPNESS)


def perspective(image: Image.Image, corners: Corners) -> Image.Image:
    """Moves the corners, clockwise from the top left, to places; bilinear, black outside."""
    width, height = image.size
    x1, y1 = width - 1, height - 1
    rows, values = [], []
    for (x, y), (u, v) in zip(corners, [(0, 0), (x1, 0), (x1, y1), (0, y1)], strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    a, b, c, d, e, f, g, h = np.linalg.solve(np.asarray(rows, float), values).tolist()
    # Pillow's coordinates are of pixels' corners, half a pixel from their centres.
    shift = np.asarray([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    matrix = shift @ np.asarray([[a, b, c], [d, e, f], [g, h, 1]]) @ np.linalg.inv(shift)
    coefficients = (matrix / matrix[2, 2]).reshape(-1)[:8].tolist()
    return image.transform(
        image.size, Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BILINEAR
    )
