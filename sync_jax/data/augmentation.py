"""Augmentation and normalisation of image batches on the device, inside the jitted step."""

import jax
import jax.numpy as jnp
from jax import Array

from sync_jax.data.recipe import TRIES, Augmentation, random_boxes

_SHARPNESS = 2.0  # factor
_DISTORTION = 0.5  # of perspective: corners move by up to half of this times a side
_POSTERISED = 0xC0  # the two bits that are kept
_LUMA = (0.299, 0.587, 0.114)


def augment(
    key: Array,
    images: Array,
    augmentation: Augmentation,
    *,
    size: int | None = None,
    cropped: bool = False,
) -> Array:
    """Augments each image at random.

    Resizing, shifts and their flips are one product with a matrix of weights for rows and one for
    columns, rather than gathers, which are slow on TPUs. Integers up to 255 are exact even in
    bfloat16, so without resizing the result is exact at every matmul precision.

    Images are `[batch, height, width, channels]` uint8; features `[batch, d]` are left as they are.
    The result is float32 in [0, 255], with sides of `size` pixels, if given, of larger squares.
    `cropped`: the resized crops have been made already, by the host pipeline.
    """
    if images.ndim == 2:
        return images.astype(jnp.float32)
    a = augmentation
    resized = a.min_crop_area < 1
    batch, height, width, _ = images.shape
    if size is not None and size != height:
        if not resized:
            top, left = (height - size) // 2, (width - size) // 2
            images = images[:, top : top + size, left : left + size]
        height = width = size
    limit = jnp.deg2rad(a.rotation)
    angles = jax.random.uniform(jax.random.fold_in(key, 1), (batch,), minval=-limit, maxval=limit)
    if a.rotation and not resized:
        images = rotate(images, angles)
    images = _crop_and_flip(key, images, a, height, width, resizes=resized and not cropped)
    if a.rotation and resized:
        images = rotate(images, angles)
    return _recolour(key, images.astype(jnp.float32), a)


def _crop_and_flip(
    key: Array, images: Array, a: Augmentation, height: int, width: int, *, resizes: bool
) -> Array:
    row_key, column_key, flip_key = jax.random.split(key, 3)
    batch, pad = images.shape[0], a.crop_padding
    flip = jax.random.bernoulli(flip_key, 0.5, (batch, 1)) & a.flip
    if pad:
        down = jax.random.randint(row_key, (batch, 1), -pad, pad + 1)
        right = jax.random.randint(column_key, (batch, 1), -pad, pad + 1)
        # A source outside the image matches no column of the one-hot matrix: that is the padding.
        rows = jax.nn.one_hot(jnp.arange(height) + down, height)
        columns = jnp.where(flip, width - 1 - jnp.arange(width), jnp.arange(width)) + right
        columns = jax.nn.one_hot(columns, width)
    if resizes:
        keys, shape = jax.random.split(jax.random.fold_in(key, 2), 4), (batch, TRIES)
        shapes = shape, shape, (batch,), (batch,)
        draws = list(map(jax.random.uniform, keys, shapes))
        boxes = random_boxes(draws, images.shape[1], images.shape[2], a.min_crop_area)
        resize_rows, resize_columns = box_weights(images, boxes, height, width)
        if pad:
            exact = jax.lax.Precision.HIGHEST
            rows = jnp.matmul(rows, resize_rows, precision=exact)
            columns = jnp.matmul(columns, resize_columns, precision=exact)
        else:
            rows = resize_rows
            columns = jnp.where(flip[..., None], resize_columns[:, ::-1], resize_columns)
    if resizes or pad:
        return apply_weights(images, rows, columns, exact=resizes)
    if a.flip:
        return jnp.where(flip[..., None, None], images[:, :, ::-1], images)
    return images


def _recolour(key: Array, images: Array, a: Augmentation) -> Array:
    if a.jitter:
        images = colour_jitter(jax.random.fold_in(key, 3), images, a.jitter)
    if a.sharpen:
        images = _sometimes(jax.random.fold_in(key, 4), a.sharpen, sharpen(images), images)
    if a.grey:
        images = _sometimes(jax.random.fold_in(key, 5), a.grey, to_grey(images), images)
    if a.perspective:
        corner_key, which_key = jax.random.split(jax.random.fold_in(key, 6))
        moved = perspective(images, random_corners(corner_key, images))
        images = _sometimes(which_key, a.perspective, moved, images)
    if a.posterise:
        images = _sometimes(jax.random.fold_in(key, 7), a.posterise, posterise(images), images)
    return images


def _sometimes(key: Array, probability: float, changed: Array, images: Array) -> Array:
    chosen = jax.random.bernoulli(key, probability, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, changed, images)


def apply_weights(images: Array, rows: Array, columns: Array, *, exact: bool) -> Array:
    """Applies weights `[batch, out, in]` for rows and columns to images."""
    # Resized pixels are no integers, and bfloat16 would round them.
    precision = jax.lax.Precision.HIGHEST if exact else None
    images = images.astype(jnp.float32)
    return jnp.einsum("bij,bjkc,blk->bilc", rows, images, columns, precision=precision)


def box_weights(images: Array, boxes: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Weights that resize boxes: `[batch, rows, height]` and `[batch, columns, width]`."""
    return (
        _resize_matrix(boxes[:, 0], boxes[:, 2], images.shape[1], rows),
        _resize_matrix(boxes[:, 1], boxes[:, 3], images.shape[2], columns),
    )


def _resize_matrix(start: Array, length: Array, from_size: int, to_size: int) -> Array:
    """Weights `[batch, to, from]` that make `to` pixels of `length` from `start` on."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / to_size
    centre = start + (jnp.arange(to_size)[None, :, None] + 0.5) * scale - 0.5
    source = jnp.arange(from_size)[None, None, :]
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(source - centre) / jnp.maximum(scale, 1.0))
    weights = jnp.where((source >= start) & (source < start + length), weights, 0.0)
    return weights / jnp.sum(weights, axis=2, keepdims=True)


def colour_jitter(key: Array, images: Array, strength: float) -> Array:
    """Jitters brightness, then contrast, then saturation; torchvision's shuffles the order."""
    shape = (3, images.shape[0], 1, 1, 1)
    return adjust(images, jax.random.uniform(key, shape, minval=1 - strength, maxval=1 + strength))


def adjust(images: Array, factors: Array) -> Array:
    """Multiplies brightness, contrast and, of colours, saturation by `[3, batch, 1, 1, 1]`."""
    images = _blend(images, jnp.zeros_like(images), factors[0])
    mean = jnp.mean(_luma(images), axis=(1, 2, 3), keepdims=True)
    images = _blend(images, mean, factors[1])
    return _blend(images, _luma(images), factors[2]) if images.shape[-1] == 3 else images


def _blend(images: Array, other: Array, factor: Array | float) -> Array:
    return jnp.clip(factor * images + (1 - factor) * other, 0.0, 255.0)


def _luma(images: Array) -> Array:
    if images.shape[-1] != 3:
        return jnp.mean(images, axis=-1, keepdims=True)
    return jnp.sum(images * jnp.asarray(_LUMA), axis=-1, keepdims=True)


def to_grey(images: Array) -> Array:
    """Images without their colours, in as many channels."""
    return jnp.broadcast_to(_luma(images), images.shape)


def sharpen(images: Array) -> Array:
    """Doubles the difference from a smoothed image; the border stays as it is."""
    inner = images[:, 1:-1, 1:-1]
    height, width = images.shape[1:3]
    around = sum(
        images[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3)
    )
    smooth = (around + 4 * inner) / 13
    return images.at[:, 1:-1, 1:-1].set(_blend(inner, smooth, _SHARPNESS))


def posterise(images: Array) -> Array:
    """Keeps the two highest bits of each value."""
    return (images.astype(jnp.uint8) & _POSTERISED).astype(images.dtype)


def random_corners(key: Array, images: Array) -> Array:
    """Draws where perspective puts the corners, as torchvision does.

    Returns:
        `[batch, 4, 2]` float32 of whole numbers: (x, y), clockwise from the top left.
    """
    batch, height, width, _ = images.shape
    most = jnp.asarray([int(_DISTORTION * (length // 2)) for length in (width, height)])
    moved = jax.random.randint(key, (batch, 4, 2), 0, most + 1)
    last, far = jnp.asarray([width - 1, height - 1]), jnp.asarray([[0, 0], [1, 0], [1, 1], [0, 1]])
    return jnp.where(far == 1, last - moved, moved).astype(jnp.float32)


def perspective(images: Array, corners: Array) -> Array:
    """Moves the corners of images to places as of `random_corners`; bilinear, zeros outside."""
    height, width = images.shape[1:3]
    # From the unit square to the corners (Heckbert, 1989), then inverted by the adjugate.
    x, y = corners[..., 0], corners[..., 1]
    sum_x, sum_y = x[:, 0] - x[:, 1] + x[:, 2] - x[:, 3], y[:, 0] - y[:, 1] + y[:, 2] - y[:, 3]
    dx1, dx2 = x[:, 1] - x[:, 2], x[:, 3] - x[:, 2]
    dy1, dy2 = y[:, 1] - y[:, 2], y[:, 3] - y[:, 2]
    determinant = dx1 * dy2 - dx2 * dy1
    g = (sum_x * dy2 - dx2 * sum_y) / determinant
    h = (dx1 * sum_y - sum_x * dy1) / determinant
    a, b, c = x[:, 1] - x[:, 0] + g * x[:, 1], x[:, 3] - x[:, 0] + h * x[:, 3], x[:, 0]
    d, e, f = y[:, 1] - y[:, 0] + g * y[:, 1], y[:, 3] - y[:, 0] + h * y[:, 3], y[:, 0]
    u, v = jnp.arange(width)[None, None, :], jnp.arange(height)[None, :, None]

    def form(p: Array, q: Array, r: Array) -> Array:
        return p[:, None, None] * u + q[:, None, None] * v + r[:, None, None]

    scale = form(d * h - e * g, b * g - a * h, a * e - b * d)
    column = form(e - f * h, c * h - b, b * f - c * e) / scale * (width - 1)
    row = form(f * g - d, a - c * g, c * d - a * f) / scale * (height - 1)
    return _bilinear(images.astype(jnp.float32), row, column)


def _bilinear(images: Array, row: Array, column: Array) -> Array:
    """Values between pixels, `[batch, height, width]` places each; zero outside of the image."""
    height, width = images.shape[1:3]
    # Half a pixel beyond the last centre the picture ends; the pixel at the border goes that far.
    inside = (row >= -0.5) & (row < height - 0.5) & (column >= -0.5) & (column < width - 0.5)
    top, left = jnp.floor(row), jnp.floor(column)
    result = jnp.zeros_like(images)
    for i in (0, 1):
        for j in (0, 1):
            r = jnp.clip(top + i, 0, height - 1).astype(jnp.int32)
            k = jnp.clip(left + j, 0, width - 1).astype(jnp.int32)
            weight = (1 - jnp.abs(row - top - i)) * (1 - jnp.abs(column - left - j))
            result += weight[..., None] * _pixels(images, r, k)
    return jnp.where(inside[..., None], result, 0.0)


def _pixels(images: Array, row: Array, column: Array) -> Array:
    """The pixels at `[batch, height, width]` places."""
    batch, height, width, channels = images.shape
    flat = images.reshape(batch, height * width, channels)
    place = (row * width + column).reshape(batch, -1, 1)
    return jnp.take_along_axis(flat, place, axis=1).reshape(images.shape)


def rotate(images: Array, angles: Array) -> Array:
    """Turns images counterclockwise by `[batch]` radians: the nearest pixel, zeros outside."""
    height, width = images.shape[1:3]
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - (height - 1) / 2
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - (width - 1) / 2
    cos, sin = jnp.cos(angles)[:, None, None], jnp.sin(angles)[:, None, None]
    # Where a pixel comes from; rows count downwards.
    row = jnp.round(cos * y + sin * x + (height - 1) / 2).astype(jnp.int32)
    column = jnp.round(cos * x - sin * y + (width - 1) / 2).astype(jnp.int32)
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    turned = _pixels(images, jnp.clip(row, 0, height - 1), jnp.clip(column, 0, width - 1))
    return jnp.where(inside[..., None], turned, 0)


def normalise(
    images: Array, mean: tuple[float, ...], std: tuple[float, ...], scale: float
) -> Array:
    """Normalises values / scale by a mean and deviation per channel or feature; float32."""
    scaled = images.astype(jnp.float32) / scale
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)
