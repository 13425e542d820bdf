"""What is chosen, what is said of it, and that sharded images give the same batches."""

import dataclasses
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.config import default_config
from sync_jax.data import loading, placement, registry, splits
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import put_on_devices, take, training_batch
from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.memory import aligned_empty
from tests import tiny
from tests.data.pictures import pixels


def choose(monkeypatch, free, *, devices=1, disk=0, there=False, **changes):
    config = default_config()
    config.data.name = "imagenet100"
    config.data.image_size, config.data.short_side = 224, 256
    config.data.calibration_size = 6689  # 120,000 are left
    config.data.data_dir = "/nowhere"
    config.data.update(changes)
    monkeypatch.setattr(placement, "free_memory", lambda mesh: free)
    monkeypatch.setattr(placement, "_free_disk", lambda folder: disk)
    mesh = sharding.make_mesh(jax.devices()[:devices])
    info = registry.dataset(config.data).info()
    if there:
        info = dataclasses.replace(info, squares_bytes=0)
    return placement.choose(config.data, info, mesh)


def test_auto_takes_the_device_where_half_of_it_will_do(monkeypatch):
    needed = 120_000 * 256 * 256 * 3  # by hand: 23.59 GB
    fits, too_small = (choose(monkeypatch, 2 * needed + x) for x in (0, -1))
    assert (fits.on_device, fits.sharded) == (True, False)
    assert fits.reason == (
        "images in device memory: 23.59 GB of training images, 47.19 GB free on 1 device "
        "(data.placement='auto', at most half)"
    )
    # 126,689 + 5,000 squares take 25.89 GB on the disk; where they are, or fit, it comes next.
    assert too_small.where == "host"
    assert too_small.reason == (
        "images on the host, decoded for each batch: 23.59 GB of training images, 47.19 GB free on "
        "1 device (data.placement='auto', at most half; squares on the disk take 25.89 GB more, "
        "0.00 GB free)"
    )
    total = 131_689 * 256 * 256 * 3 + 2 * 128
    for disk, there, where in (
        (total, False, "disk"),
        (total - 1, False, "host"),
        (0, True, "disk"),
    ):
        found = choose(monkeypatch, needed, disk=disk, there=there)
        assert (found.where, found.sharded) == (where, False)
    arrays = choose(monkeypatch, 1e6, disk=1e15, name="fashion_mnist")
    assert arrays.where == "host"
    assert arrays.reason.startswith(
        "images in the host's memory, copied for each batch: 0.04 GB of"
    )


def test_what_is_said_is_done(monkeypatch):
    host, disk = (choose(monkeypatch, 1e12, placement=x) for x in ("host", "disk"))
    assert (host.where, host.decoded) == ("host", True)
    assert (disk.where, disk.decoded) == ("disk", False)
    assert disk.reason.startswith("images on the disk, read for each batch: 23.59 GB of")
    assert choose(monkeypatch, 3e10, placement="device").on_device
    with pytest.raises(InputError, match=r"placement='device': 23.59 GB .* 20.00 GB free"):
        choose(monkeypatch, 2e10, placement="device")
    # Smaller squares take less; small images are copied rather than sharded.
    assert choose(monkeypatch, 4.8e10, stored_size=224).on_device
    assert choose(monkeypatch, 6e11, devices=8).sharded
    small = choose(monkeypatch, 6e11, devices=8, name="fashion_mnist", calibration_size=6000)
    assert (small.on_device, small.sharded) == (True, False)


@pytest.mark.parametrize(
    ("notes", "where"),
    [({"placement": "disk"}, "disk"), ({"on_device": False}, "device"), (None, "device")],
)
def test_a_run_that_goes_on_stays_where_it_was(tmp_path, monkeypatch, notes, where):
    """Where its checkpoint says; an earlier version's says something else."""
    config = default_config()
    config.data.data_dir = str(tiny.prepare(tmp_path))
    monkeypatch.setattr(loading, "latest_notes", lambda folder: notes)
    assert (
        loading.decide(config, registry.dataset(config.data), sharding.make_mesh(), tmp_path).where
        == where
    )


def test_free_memory_is_the_devices_own(monkeypatch):
    def device(limit, used):
        statistics = {"bytes_limit": limit, "bytes_in_use": used}
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: statistics)

    own = [device(70, 20), device(70, 10)]
    mesh = types.SimpleNamespace(size=2, local_devices=own)
    assert placement.free_memory(mesh) == 110
    # Another process's two, which do not tell, are taken to be as these.
    mesh = types.SimpleNamespace(size=4, local_devices=own)
    assert placement.free_memory(mesh) == 220
    available = placement.free_memory(sharding.make_mesh())  # a CPU's eight share the host's
    assert 1e8 < available < 1e13


def test_a_cpu_computes_with_the_images_where_they_are():
    """So that they are in its memory once; an array that begins elsewhere is copied."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    images = aligned_empty((19, 5, 5, 3))
    images[:] = [pixels(i, 5, 5) for i in range(19)]
    labels = np.arange(19, dtype=np.int32)
    split = put_on_devices(images, labels, mesh, sharded=False)
    assert split.images.unsafe_buffer_pointer() == images.ctypes.data
    np.testing.assert_array_equal(split.images, images)
    np.testing.assert_array_equal(split.labels, labels)
    other = put_on_devices(images[1:], labels[1:], mesh, sharded=False)
    assert other.images.unsafe_buffer_pointer() != images[1:].ctypes.data
    np.testing.assert_array_equal(other.images, images[1:])


def test_the_images_of_both_parts_are_their_own_and_what_is_kept_stays_in_place(
    tmp_path, monkeypatch
):
    section = default_config().data
    section.data_dir, section.calibration_size = str(tiny.prepare(tmp_path)), 40
    dataset = registry.dataset(section)
    images, labels = dataset.load("train")
    whole = images.copy()
    monkeypatch.setattr(dataset, "load", lambda *_, **__: (images, labels))
    monkeypatch.setattr(splits, "_ROWS", 7)
    train, calibration = splits.load_train_and_calibration(dataset, section)
    for part in (train, calibration):
        np.testing.assert_array_equal(part.images, whole[part.index])
        np.testing.assert_array_equal(part.labels, labels[part.index])
    assert sorted([*train.index, *calibration.index]) == list(range(tiny.NUM_TRAIN))
    assert train.images.ctypes.data == images.ctypes.data
    assert images.ctypes.data % 64 == 0  # as a CPU's device wants it


def test_sharded_rows_are_taken_exactly(monkeypatch):
    monkeypatch.setattr("sync_jax.data.resident._CHUNK", 200)  # two images
    images = np.stack([pixels(i, 5, 5) for i in range(19)])
    labels = np.arange(19, dtype=np.int32)
    index = np.asarray([18, 0, 3, 3, 7, 18, 11, 2])
    for devices in (1, 8):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        split = put_on_devices(images, labels, mesh, sharded=True)
        np.testing.assert_array_equal(split.images[:19], images)
        assert not np.any(split.images[19:])
        assert {x.data.shape[0] for x in split.images.addressable_shards} == {-(-19 // devices)}
        taken = jax.jit(lambda images, index, mesh=mesh: take(images, index, mesh))(
            split.images, index
        )
        np.testing.assert_array_equal(taken, images[index])
        assert taken.dtype == np.uint8


def test_devices_change_no_batch(monkeypatch):
    """Copied to all, and sharded: the same as on one."""
    images = np.stack([pixels(i, 8, 8) for i in range(45)])
    labels = np.arange(45, dtype=np.int32) % 7
    monkeypatch.setattr("sync_jax.data.resident._CHUNK", 1000)  # five images
    made = []
    for devices, sharded in ((1, False), (8, False), (8, True)):
        mesh = sharding.make_mesh(jax.devices()[:devices])
        make = functools.partial(
            training_batch,
            batch_size=16,
            augmentation=Augmentation(2, True),
            size=6,
            mesh=mesh if sharded else None,
        )
        make = jax.jit(lambda *x, make=make, mesh=mesh: sharding.shard_batch(make(*x), mesh))
        split = put_on_devices(images, labels, mesh, sharded=sharded)
        made.append([jax.device_get(make(split, jnp.uint32(5), jnp.int32(i))) for i in (0, 2, 7)])
    assert made[0][0]["image"].shape == (16, 6, 6, 3)
    for other in made[1:]:
        chex.assert_trees_all_equal(other, made[0])
