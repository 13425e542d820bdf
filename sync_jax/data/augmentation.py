"""Augmentation and normalisation of image batches on the device, inside the jitted step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Augmentation(NamedTuple):
    """What happens to a training image.

    Attributes:
        crop_padding: zero pixels added on every side before a random crop of the original size.
        flip: mirror left to right with probability 1/2.
        rotation: degrees; turn about the centre by an angle uniform up to this, either way.
        min_crop_area: a random crop of a share of the area uniform from this to 1, resized to the
            whole; 1 for none.
        jitter: brightness, contrast and saturation are multiplied by factors uniform from
            1 - jitter to 1 + jitter.
    """

    crop_padding: int
    flip: bool
    rotation: float = 0.0
    min_crop_area: float = 1.0
    jitter: float = 0.0


def augment(key: Array, images: Array, augmentation: Augmentation) -> Array:
    """Rotation, crop and resize, crop with zero padding, flip, and colours, all random.

    Shifts and flips are products with 0/1 selection matrices, one for rows and one for columns,
    rather than gathers, which are slow on TPUs. Integers up to 255 are exact even in bfloat16, so
    without resizing the result is exact at every matmul precision.

    Args:
        key: PRNG key of the batch.
        images: `[batch, height, width, channels]` uint8.
        augmentation: what to do.

    Returns:
        `[batch, height, width, channels]` float32, values in [0, 255].
    """
    batch, height, width, _ = images.shape
    row_key, column_key, flip_key = jax.random.split(key, 3)
    pad = augmentation.crop_padding
    down = jax.random.randint(row_key, (batch, 1), -pad, pad + 1)
    right = jax.random.randint(column_key, (batch, 1), -pad, pad + 1)
    flip = jax.random.bernoulli(flip_key, 0.5, (batch, 1)) & augmentation.flip
    rows = jnp.arange(height) + down
    columns = jnp.where(flip, width - 1 - jnp.arange(width), jnp.arange(width)) + right
    if augmentation.rotation:
        limit = jnp.deg2rad(augmentation.rotation)
        angles = jax.random.uniform(
            jax.random.fold_in(key, 1), (batch,), minval=-limit, maxval=limit
        )
        images = rotate(images, angles)
    if augmentation.min_crop_area < 1:
        area_key = jax.random.fold_in(key, 2)
        images = crop_and_resize(images, random_boxes(area_key, images, augmentation.min_crop_area))
    # A source outside the image matches no column of the one-hot matrix: that is the zero padding.
    select_rows = jax.nn.one_hot(rows, height)
    select_columns = jax.nn.one_hot(columns, width)
    # Resized pixels are no integers, and bfloat16 would round them.
    exact = jax.lax.Precision.HIGHEST if augmentation.min_crop_area < 1 else None
    images = jnp.einsum(
        "bij,bjkc,blk->bilc",
        select_rows,
        images.astype(jnp.float32),
        select_columns,
        precision=exact,
    )
    if augmentation.jitter:
        images = colour_jitter(jax.random.fold_in(key, 3), images, augmentation.jitter)
    return images


def random_boxes(key: Array, images: Array, min_area: float) -> Array:
    """Boxes as torchvision's RandomResizedCrop draws them.

    Share of the area uniform, aspect ratio log-uniform from 3/4 to 4/3, ten tries at a box that
    fits into the image, else all of it.

    Args:
        key: PRNG key of the batch.
        images: `[batch, height, width, channels]`.
        min_area: in (0, 1].

    Returns:
        `[batch, 4]` float32 of whole numbers: top, left, height, width.
    """
    batch, height, width, _ = images.shape
    area_key, ratio_key, top_key, left_key = jax.random.split(key, 4)
    shape, limit = (batch, 10), jnp.log(4 / 3)
    area = height * width * jax.random.uniform(area_key, shape, minval=min_area, maxval=1.0)
    ratio = jnp.exp(jax.random.uniform(ratio_key, shape, minval=-limit, maxval=limit))
    high, wide = jnp.round(jnp.sqrt(area / ratio)), jnp.round(jnp.sqrt(area * ratio))
    fits = (high >= 1) & (high <= height) & (wide >= 1) & (wide <= width)
    first = jnp.argmax(fits, axis=1)[:, None]
    some = jnp.any(fits, axis=1)
    h = jnp.where(some, jnp.take_along_axis(high, first, axis=1)[:, 0], height)
    w = jnp.where(some, jnp.take_along_axis(wide, first, axis=1)[:, 0], width)
    top = jnp.floor(jax.random.uniform(top_key, (batch,)) * (height - h + 1))
    left = jnp.floor(jax.random.uniform(left_key, (batch,)) * (width - w + 1))
    return jnp.stack([top, left, h, w], axis=1)


def crop_and_resize(images: Array, boxes: Array) -> Array:
    """Boxes of images resized to the images' own size, bilinear and antialiased as Pillow does.

    Args:
        images: `[batch, height, width, channels]`.
        boxes: `[batch, 4]`: top, left, height, width.

    Returns:
        As `images`, float32.
    """
    rows = _resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[1])
    columns = _resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[2])
    return jnp.einsum(
        "bij,bjkc,blk->bilc",
        rows,
        images.astype(jnp.float32),
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )


def _resize_matrix(start: Array, length: Array, size: int) -> Array:
    """Weights `[batch, size, size]` that make `size` pixels of `length` from `start` on."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    centre = start + (jnp.arange(size)[None, :, None] + 0.5) * scale - 0.5
    source = jnp.arange(size)[None, None, :]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(source - centre) / jnp.maximum(scale, 1.0))
    weights = jnp.where((source >= start) & (source < start + length), weights, 0.0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def colour_jitter(key: Array, images: Array, strength: float) -> Array:
    """Brightness, then contrast, then saturation, as torchvision's, which shuffles the order.

    Args:
        key: PRNG key of the batch.
        images: `[batch, height, width, channels]` float32 in [0, 255]; saturation is of three
            channels only.
        strength: in [0, 1].

    Returns:
        As `images`.
    """
    shape = (3, images.shape[0], 1, 1, 1)
    factors = jax.random.uniform(key, shape, minval=1 - strength, maxval=1 + strength)

    def blend(images: Array, other: Array, factor: Array) -> Array:
        return jnp.clip(factor * images + (1 - factor) * other, 0.0, 255.0)

    def grey(images: Array) -> Array:
        if images.shape[-1] != 3:
            return jnp.mean(images, axis=-1, keepdims=True)
        return jnp.sum(images * jnp.asarray([0.299, 0.587, 0.114]), axis=-1, keepdims=True)

    images = blend(images, jnp.zeros_like(images), factors[0])
    images = blend(images, jnp.mean(grey(images), axis=(1, 2, 3), keepdims=True), factors[1])
    return blend(images, grey(images), factors[2]) if images.shape[-1] == 3 else images


def rotate(images: Array, angles: Array) -> Array:
    """Turns images about their centres, by the nearest pixel, with zeros outside.

    Args:
        images: `[batch, height, width, channels]`.
        angles: `[batch]` radians, counterclockwise.

    Returns:
        As `images`.
    """
    batch, height, width, channels = images.shape
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2
    cos, sin = jnp.cos(angles)[:, None, None], jnp.sin(angles)[:, None, None]
    # Where a pixel comes from; rows count downwards.
    row = jnp.round(cos * y + sin * x + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(cos * x - sin * y + (width - 1) / 2).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = jnp.clip(row, 0, height - 1) * width + jnp.clip(column, 0, width - 1)
    flat = images.reshape(batch, height * width, channels)
    turned = jnp.take_along_axis(flat, source.reshape(batch, -1, 1), axis=1)
    return jnp.where(inside[..., None], turned.reshape(images.shape), 0)


def normalise(images: Array, mean: tuple[float, ...], std: tuple[float, ...]) -> Array:
    """Pixels in [0, 255] to zero mean and unit variance per channel.

    Args:
        images: `[batch, height, width, channels]`, any real dtype.
        mean: per channel, of pixels / 255.
        std: likewise.

    Returns:
        The same shape, float32.
    """
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
