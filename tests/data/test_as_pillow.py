"""Augmentation on the device, beside the same by Pillow, as torchvision does it on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance

from sync_jax.data import augmentation
from sync_jax.data.recipe import TRIES, Augmentation, random_boxes


def smooth(seed, size=48):
    """An image of which neighbouring pixels are close: what interpolation is for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [
        127.5 + 60 * np.sin(7 * (a * x + b * y) + c) + 50 * np.cos(5 * (b * x - a * y))
        for a, b, c in rng.uniform(-1, 1, (3, 3))
    ]
    return np.clip(np.stack(waves, axis=-1), 0, 255).round().astype(np.uint8)


IMAGES = np.stack([smooth(i) for i in range(4)])


def compare(on_device, theirs, *, levels, share=1.0):
    """At least a share of the values within so many levels."""
    theirs = np.stack([np.asarray(x) for x in theirs]).astype(np.float32)
    difference = np.abs(np.asarray(on_device) - theirs)
    assert np.mean(difference <= levels) >= share, (difference.max(), np.mean(difference <= levels))


def by_pillow(function, *arguments):
    return [
        function(Image.fromarray(image), *(a[i] for a in arguments))
        for i, image in enumerate(IMAGES)
    ]


def pillow_adjust(image, brightness, contrast, saturation):
    image = ImageEnhance.Brightness(image).enhance(brightness)
    image = ImageEnhance.Contrast(image).enhance(contrast)
    return ImageEnhance.Color(image).enhance(saturation)


def pillow_perspective(image, corners):
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


def test_colours_agree():
    images = jnp.asarray(IMAGES, jnp.float32)
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (3, 4)).astype(np.float32)
    adjusted = augmentation.adjust(images, jnp.asarray(factors).reshape(3, 4, 1, 1, 1))
    found = by_pillow(pillow_adjust, *factors.tolist())
    # Pillow rounds thrice, and its mean too: ((1 x 1.4 + 1 + 0.2) x 1.4 + 1) levels at most.
    compare(adjusted, found, levels=4.64)
    compare(
        augmentation.sharpen(images),
        by_pillow(lambda image: ImageEnhance.Sharpness(image).enhance(2.0)),
        levels=1.01,
    )
    grey = [Image.fromarray(x).convert("L").convert("RGB") for x in IMAGES]
    compare(augmentation.to_grey(images), grey, levels=1.01)
    posterised = [np.asarray(x) & np.uint8(0xC0) for x in IMAGES]
    compare(augmentation.posterise(images), posterised, levels=0)
    assert len(np.unique(posterised)) == 4


def test_rotations_agree():
    angles = np.asarray([-33.0, -10.0, 12.5, 35.0])
    turned = augmentation.rotate(jnp.asarray(IMAGES), jnp.deg2rad(jnp.asarray(angles, jnp.float32)))
    # A pixel whose source lies between two may be either's; at the border that is black or not.
    compare(turned, by_pillow(Image.Image.rotate, angles.tolist()), levels=12, share=0.97)
    wrong = by_pillow(Image.Image.rotate, (-angles).tolist())
    with pytest.raises(AssertionError):
        compare(turned, wrong, levels=12, share=0.97)


def test_perspectives_agree():
    drawn = augmentation.random_corners(jax.random.key(1), jnp.asarray(IMAGES))
    corners = np.asarray(drawn).tolist()
    moved = augmentation.perspective(jnp.asarray(IMAGES), drawn)
    compare(moved, by_pillow(pillow_perspective, corners), levels=3, share=0.97)
    still = [(0, 0), (47, 0), (47, 47), (0, 47)]
    assert 6 < np.abs(np.asarray(drawn) - still).max() <= 12  # a quarter of a side
    np.testing.assert_allclose(
        augmentation.perspective(jnp.asarray(IMAGES), jnp.asarray([still] * 4, jnp.float32)),
        IMAGES,
        atol=0.01,
    )
    # By hand: the corner of the picture is at the place that it was moved to.
    for image, result, places in zip(IMAGES, moved, corners, strict=True):
        for (x, y), (u, v) in zip(places, still, strict=True):
            np.testing.assert_allclose(result[int(y), int(x)], image[v, u], atol=1.5)


def test_crops_agree():
    rng = np.random.default_rng(2)
    draws = [rng.random((len(IMAGES), *more)) for more in ((TRIES,), (TRIES,), (), ())]
    boxes = random_boxes(draws, 48, 48, 0.2)
    images = jnp.asarray(IMAGES)
    weights = augmentation.box_weights(images, jnp.asarray(boxes, jnp.float32), 32, 32)
    resized = augmentation.apply_weights(images, *weights, exact=True)
    found = [
        Image.fromarray(x).crop((a, b, a + w, b + h)).resize((32, 32), Image.Resampling.BILINEAR)
        for x, (b, a, h, w) in zip(IMAGES, boxes.tolist(), strict=True)
    ]
    compare(resized, found, levels=1.01)


def test_rates_are_those_asked_for():
    """Of each operation alone: how often an image changes."""
    images = np.repeat(IMAGES[:1, :16, :16], 600, axis=0)
    for field, probability in (
        ("flip", 0.5),
        ("sharpen", 0.3),
        ("grey", 0.3),
        ("perspective", 0.3),
        ("posterise", 0.3),
    ):
        changes = {field: True if field == "flip" else probability}
        recipe = Augmentation(0, False)._replace(**changes)
        augment = jax.jit(augmentation.augment, static_argnums=2)
        results = np.asarray(augment(jax.random.key(1), images, recipe))
        changed = np.mean(np.any(results != images, axis=(1, 2, 3)))
        assert abs(changed - probability) < 0.07, field
