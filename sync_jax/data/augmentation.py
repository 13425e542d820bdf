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
    """

    crop_padding: int
    flip: bool
    rotation: float = 0.0


def augment(key: Array, images: Array, augmentation: Augmentation) -> Array:
    """Random rotation, random crop with zero padding, then a random flip.

    The last two are products with 0/1 selection matrices, one for rows and one for columns, rather
    than gathers, which are slow on TPUs. Integers up to 255 are exact even in bfloat16, so the
    result is exact at every matmul precision.

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
    # A source outside the image matches no column of the one-hot matrix: that is the zero padding.
    select_rows = jax.nn.one_hot(rows, height)
    select_columns = jax.nn.one_hot(columns, width)
    return jnp.einsum("bij,bjkc,blk->bilc", select_rows, images.astype(jnp.float32), select_columns)


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
