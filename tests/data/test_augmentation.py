import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sync_jax.data.augmentation import augment, colour_jitter, normalise, rotate
from sync_jax.data.recipe import TRIES, Augmentation, random_boxes


def make_images(batch, height=5, width=6, channels=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (batch, height, width, channels), np.uint8)


def reference_outcomes(image, padding, flip):
    """Every (down, right, flipped) a random crop and flip can give, by slicing: a dict."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    outcomes = {}
    for down in range(2 * padding + 1):
        for right in range(2 * padding + 1):
            crop = padded[down : down + height, right : right + width]
            outcomes[down, right, False] = crop
            if flip:
                outcomes[down, right, True] = crop[:, ::-1]
    return outcomes


@functools.partial(jax.jit, static_argnums=2)
def compiled(key, images, augmentation):
    return augment(key, images, augmentation)


def identify(images, results, padding, flip):
    """Which outcome each result is; fails where it is none of its own image's."""
    found = []
    for image, result in zip(images, np.asarray(results), strict=True):
        outcomes = reference_outcomes(image, padding, flip)
        assert len({crop.tobytes() for crop in outcomes.values()}) == len(outcomes)
        matches = [name for name, crop in outcomes.items() if np.array_equal(crop, result)]
        assert len(matches) == 1
        found += matches
    return found


@pytest.mark.parametrize(("padding", "flip", "shape"), [
    (0, True, (5, 6, 2)), (1, False, (6, 5, 1)), (2, True, (5, 6, 2)),
])  # fmt: skip
def test_every_result_is_a_crop_of_its_own_image(padding, flip, shape):
    images = make_images(64, *shape)
    results = compiled(jax.random.key(0), images, Augmentation(padding, flip))
    chex.assert_shape(results, images.shape)
    chex.assert_type(results, jnp.float32)
    assert len(set(identify(images, results, padding, flip))) > 1


def test_a_reference_that_is_off_by_a_pixel_would_be_noticed():
    """Negative control: wrapping around instead of padding with zeros."""
    images = make_images(32)
    results = np.stack([np.roll(image, 1, axis=0) for image in images]).astype(np.float32)
    with pytest.raises(AssertionError):
        identify(images, results, 2, True)


def test_all_outcomes_are_equally_frequent():
    """Offsets and flips are uniform, and independent of each other."""
    padding, flip = 2, True
    batch = 5000
    image = make_images(1)
    results = compiled(
        jax.random.key(0), np.repeat(image, batch, axis=0), Augmentation(padding, flip)
    )
    outcomes = reference_outcomes(image[0], padding, flip)
    codes = {crop.astype(np.float32).tobytes(): i for i, crop in enumerate(outcomes.values())}
    counts = np.bincount([codes[r.tobytes()] for r in np.asarray(results)], minlength=len(codes))
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_neighbours_are_independent():
    """Image i's flip says nothing about image i + 1's, nor about its own in the next batch."""
    images = np.repeat(make_images(1), 2000, axis=0)
    flips = np.stack([
        (np.asarray(compiled(key, images, Augmentation(0, True))) != images).any(axis=(1, 2, 3))
        for key in jax.random.split(jax.random.key(0))
    ])  # fmt: skip
    for first, second in ((flips[0, :-1], flips[0, 1:]), (flips[0], flips[1])):
        table = np.histogram2d(first, second, bins=2)[0]
        assert scipy.stats.chi2_contingency(table).pvalue > 0.01


@pytest.mark.parametrize("precision", ["default", "BF16_BF16_F32"])
def test_exact_at_every_matmul_precision(precision):
    """All 256 values pass unharmed through products of bfloat16."""
    images = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    with jax.default_matmul_precision(precision):
        results = jax.jit(lambda key: augment(key, images, Augmentation(1, True)))(
            jax.random.key(0)
        )
    identify(images, results, 1, True)


def test_normalise_by_hand():
    images = jnp.array([0, 255, 51, 102], jnp.uint8).reshape(2, 1, 1, 2)
    result = normalise(images, mean=(0.2, 0.5), std=(0.1, 0.25), scale=255.0)
    chex.assert_type(result, jnp.float32)
    # (0 - .2) / .1, (1 - .5) / .25, (.2 - .2) / .1, (.4 - .5) / .25
    np.testing.assert_allclose(result.reshape(-1), [-2.0, 2.0, 0.0, -0.4], rtol=1e-6, atol=1e-6)


def test_quarter_turns_are_exact():
    images = make_images(4, 7, 7)
    turned = jax.jit(rotate)(images, jnp.pi / 2 * jnp.arange(4.0))
    for turns in range(4):
        np.testing.assert_array_equal(turned[turns], np.rot90(images[turns], turns))


def test_angles_are_uniform():
    """A line from the centre to the right: its end tells the angle."""
    size, count = 65, 2000
    images = np.zeros((count, size, size, 1), np.uint8)
    images[:, 32, 33:] = 255
    turned = np.asarray(compiled(jax.random.key(3), images, Augmentation(0, False, 20.0)))[..., 0]
    offsets = np.arange(size) - 32.0
    angles = np.degrees(np.arctan2(-turned.sum(axis=2) @ offsets, turned.sum(axis=1) @ offsets))
    assert scipy.stats.kstest(angles, "uniform", args=(-20, 40)).pvalue > 0.01


def test_boxes_fit_and_are_distributed_as_said():
    rng = np.random.default_rng(1)
    draws = [rng.random((20_000, *more)) for more in ((TRIES,), (TRIES,), (), ())]
    boxes = random_boxes(draws, 40, 40, 0.25)
    top, left, height, width = boxes.T
    np.testing.assert_array_equal(boxes, np.round(boxes))
    assert np.all((top >= 0) & (left >= 0) & (height >= 1) & (width >= 1))
    assert np.all((top + height <= 40) & (left + width <= 40))
    share = height * width / 1600
    assert 0.24 < share.min() < 0.27
    # Independent: boxes by rejection, one at a time, as torchvision writes it.
    rng = np.random.default_rng(0)
    expected = []
    while len(expected) < 20_000:
        area, log_ratio = rng.uniform(0.25, 1) * 1600, rng.uniform(np.log(3 / 4), np.log(4 / 3))
        w, h = round((area * np.exp(log_ratio)) ** 0.5), round((area / np.exp(log_ratio)) ** 0.5)
        if w <= 40 and h <= 40:
            expected.append((h, w))
    expected_h, expected_w = np.asarray(expected).T
    assert scipy.stats.ks_2samp(share, expected_h * expected_w / 1600).statistic < 0.03
    assert scipy.stats.ks_2samp(width / height, expected_w / expected_h).statistic < 0.03
    # The place is uniform among those where the box fits.
    for size, start in ((height, top), (width, left)):
        starts = start[size == 30]
        assert len(starts) > 500
        assert scipy.stats.chisquare(np.bincount(starts.astype(int), minlength=11)).pvalue > 0.01


def test_what_was_cropped_is_not_cropped_again():
    """The rest is done as it would have been: shifts and flips, then rotation, then jitter."""
    images = make_images(6, 16, 16, 3)
    key, recipe = jax.random.key(0), Augmentation(2, True, 10.0, 0.3, 0.4)

    @jax.jit
    def done_and_expected(key):
        done = augment(key, images, recipe, cropped=True)
        steps = augment(key, images, recipe._replace(rotation=0.0, jitter=0.0), cropped=True)
        limit = jnp.deg2rad(10.0)
        angles = jax.random.uniform(jax.random.fold_in(key, 1), (6,), minval=-limit, maxval=limit)
        turned = rotate(steps, angles)
        return done, colour_jitter(jax.random.fold_in(key, 3), turned, 0.4), steps

    done, expected, steps = done_and_expected(key)
    np.testing.assert_array_equal(done, expected)
    identify(images, steps, 2, True)


def test_jitter_multiplies_and_blends():
    images = jnp.full((500, 2, 2, 3), 100.0)
    jitter = jax.jit(colour_jitter)
    results = np.asarray(jitter(jax.random.key(0), images, 0.4))
    # Of an even grey, contrast and saturation change nothing: brightness alone.
    np.testing.assert_allclose(results, results[:, :1, :1, :1] * np.ones((1, 2, 2, 3)), rtol=1e-5)
    factors = results[:, 0, 0, 0] / 100
    assert scipy.stats.kstest(factors, "uniform", args=(0.6, 0.8)).pvalue > 0.01
    noise = jax.random.uniform(jax.random.key(1), (50, 4, 4, 3), maxval=255.0)
    np.testing.assert_allclose(jitter(jax.random.key(0), noise, 0.0), noise, atol=1e-4)
    strong = np.asarray(jitter(jax.random.key(0), noise, 1.0))
    assert strong.min() >= 0
    assert strong.max() <= 255
