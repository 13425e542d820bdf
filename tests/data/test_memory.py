"""Arrays in memory: images and features through both pipelines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.config import default_config
from sync_jax.data import host
from sync_jax.data.augmentation import augment, normalise
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import (
    augmentation_key,
    epoch_constants,
    put_on_devices,
    training_batch,
)
from sync_jax.data.splits import load_test, load_train_and_calibration
from sync_jax.errors import InputError
from sync_jax.runtime import sharding

NAMES = ("a", "b", "c")
LABELS = np.arange(40) % 3
ALL = Augmentation(1, True, 20.0, 0.3, 0.3)


def images(*shape):
    return np.random.default_rng(0).integers(0, 256, (40, *shape), np.uint8)


def features(dtype=np.float64):
    values = np.random.default_rng(0).normal(5, 3, (40, 7))
    values[:, 2] = 1e4 + 0.1  # which never changes
    return values.astype(dtype)


def test_what_is_known_of_images_and_features():
    x = images(6, 5)
    info = MemoryDataset(x, LABELS, NAMES).info()
    assert (info.image_shape, info.num_classes, info.class_names) == ((6, 5, 1), 3, NAMES)
    assert (info.num_train, info.num_test, info.scale) == (40, 0, 255.0)
    np.testing.assert_allclose((info.mean[0], info.std[0]), ((x / 255).mean(), (x / 255).std()))
    x = features()
    info = MemoryDataset(x, LABELS, NAMES).info()
    assert (info.image_shape, info.scale, info.squares_bytes) == ((7,), 1.0, None)
    np.testing.assert_allclose(info.mean, x.mean(axis=0), rtol=1e-6)
    expected = x.std(axis=0)
    expected[2] = 1.0
    np.testing.assert_allclose(info.std, expected, rtol=1e-5)
    normal = normalise(jnp.asarray(x, jnp.float32), info.mean, info.std, info.scale)
    np.testing.assert_allclose(normal.mean(axis=0), np.zeros(7), atol=1e-5)


def test_loads_copies_and_says_when_there_is_no_test_split():
    x = images(6, 5, 3)
    dataset = MemoryDataset(x, LABELS, NAMES)
    assert dataset.is_prepared()
    dataset.prepare(str)
    section = default_config().data
    section.calibration_size = 9
    for _ in range(2):  # dividing a copy moves its rows, and leaves the caller's alone
        train, calibration = load_train_and_calibration(dataset, section)
        assert (len(train.labels), len(calibration.labels)) == (31, 9)
        for part in (train, calibration):
            np.testing.assert_array_equal(part.images, x[part.index])
            np.testing.assert_array_equal(part.labels, LABELS[part.index])
            assert part.labels.dtype == np.int32
    with pytest.raises(InputError, match="there is no test split"):
        load_test(dataset)
    part = load_test(MemoryDataset(x, LABELS, NAMES, test=(x[:4], LABELS[:4])))
    np.testing.assert_array_equal(part.images, x[:4])


@pytest.mark.parametrize(("dtype", "devices"), [(np.float64, 8), (np.bool_, 1)])
def test_features_by_both_pipelines(dtype, devices):
    """Whatever the augmentation says: features have no pixels."""
    x = features(dtype)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    values, labels = MemoryDataset(x, LABELS, NAMES).load("train")
    assert values.dtype == np.float32
    source = host.Examples(values, labels, epoch_constants(3, 9), 3, 0.3)
    for sharded in {False, devices > 1}:
        split = put_on_devices(values, labels, mesh, sharded=sharded)
        assert split.images.dtype == jnp.float32
        over = mesh if sharded else None
        make = jax.jit(
            functools.partial(training_batch, batch_size=16, augmentation=ALL, mesh=over)
        )
        for step, batch in enumerate(host.batches(source, start=0, stop=7, batch_size=16)):
            resident = make(split, jnp.uint32(3), jnp.int32(step))
            np.testing.assert_array_equal(resident["image"], x[batch["index"]].astype(np.float32))
            for name in ("image", "label", "index"):
                np.testing.assert_array_equal(batch[name], resident[name])


def test_images_that_are_no_squares():
    """Crops keep the shape, on the device and on the host."""
    x, labels = MemoryDataset(images(8, 5), LABELS, NAMES).load("train")
    split = put_on_devices(x, labels, sharding.make_mesh(), sharded=False)
    make = functools.partial(training_batch, batch_size=16, augmentation=ALL, size=8)
    batch = jax.eval_shape(make, split, jnp.uint32(3), jnp.int32(1))
    assert batch["image"].shape == (16, 8, 5, 1)
    whole = Augmentation(0, False, 0.0, 0.999)  # a box of nearly all is nearly the image
    key = augmentation_key(jnp.uint32(3), jnp.int32(1))
    rows = jnp.asarray(np.tile(np.arange(8)[:, None, None], (1, 1, 6, 1)))  # of ratio 4/3
    near = jax.jit(augment, static_argnums=2)(key, rows, whole)
    assert np.abs(np.asarray(near)[0, :, :, 0] - np.arange(8)[:, None]).max() < 1.0
    source = host.Examples(x, labels, epoch_constants(3, 9), 3, 0.3)
    (example,) = host.batches(source, start=1, stop=2, batch_size=16)
    assert example["image"].shape == (16, 8, 5, 1)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(4, 4).astype(np.float32), LABELS, "images must be uint8, from 0 to 255; got float"),
        (images(), LABELS, r"images must be .* got uint8 of shape \(40,\)"),
        (images(4, 4)[:0], LABELS[:0], "images must be .* got uint8 of shape"),
        (np.full((3, 2), "x"), LABELS[:3], "images must be .* real features"),
        (np.full((3, 2), np.nan), LABELS[:3], "images hold a number that is not finite"),
        (np.full((3, 2), 1e300), LABELS[:3], "images hold a number that is not finite"),
        (images(4, 4), LABELS[:-1], r"labels must be 40 integers, .* got int64 of shape \(39,\)"),
        (images(4, 4), LABELS * 1.0, "labels must be 40 integers, .* got float64"),
        (images(4, 4), LABELS + 1, "labels are 1 to 3; with 3 class names they must be 0 to 2"),
    ],
)
def test_arrays_that_do_not_fit(x, y, message):
    with pytest.raises(ValueError, match=message):
        MemoryDataset(x, y, NAMES)


def test_a_test_split_of_another_shape():
    with pytest.raises(ValueError, match=r"test images have shape \(5, 4, 1\), images have \(4"):
        MemoryDataset(images(4, 4), LABELS, NAMES, test=(images(5, 4), LABELS))
    with pytest.raises(ValueError, match="test labels must be 40 integers"):
        MemoryDataset(images(4, 4), LABELS, NAMES, test=(images(4, 4), LABELS[:1]))
