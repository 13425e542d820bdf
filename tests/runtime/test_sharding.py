from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.errors import InputError
from sync_jax.runtime import sharding


@pytest.fixture
def mesh():
    return sharding.make_mesh()


def test_processes_of_unequal_numbers_of_devices_are_refused(monkeypatch):
    devices = [SimpleNamespace(process_index=process) for process in (0, 0, 0, 0, 1, 1)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(InputError, match="process 1 has 2 devices and process 0 4; a batch is"):
        sharding.check_devices()
    monkeypatch.setattr(jax, "devices", lambda: devices[2:])
    sharding.check_devices()


def test_mesh_holds_every_device_once(mesh):
    assert mesh.shape == {"batch": 8}
    assert list(mesh.devices) == jax.devices()


def test_mesh_over_some_devices():
    mesh = sharding.make_mesh(jax.devices()[2:5])
    assert list(mesh.devices) == jax.devices()[2:5]


def test_replicated_puts_the_whole_array_on_each_device(mesh):
    array = jax.device_put(np.arange(6.0), sharding.replicated(mesh))
    assert len(array.addressable_shards) == 8
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.arange(6.0))


def test_batch_sharding_gives_each_device_its_part(mesh):
    array = jax.device_put(np.arange(32.0).reshape(16, 2), sharding.batch_sharding(mesh))
    for i, device in enumerate(jax.devices()):
        (shard,) = [s for s in array.addressable_shards if s.device == device]
        np.testing.assert_array_equal(shard.data, np.arange(4.0 * i, 4.0 * i + 4).reshape(2, 2))


def test_shard_batch_splits_every_array_inside_jit(mesh):
    @jax.jit
    def make(start):
        batch = {"image": jnp.zeros((16, 3, 3, 1)) + start, "label": jnp.arange(16)}
        return sharding.shard_batch(batch, mesh)

    batch = make(1.0)
    expected = sharding.batch_sharding(mesh)
    for array in batch.values():
        assert array.sharding.is_equivalent_to(expected, array.ndim)
        assert {shard.data.shape[0] for shard in array.addressable_shards} == {2}
    chex.assert_trees_all_equal(batch, {"image": jnp.ones((16, 3, 3, 1)), "label": jnp.arange(16)})


def test_one_at_a_time_waits_where_devices_are_simulated(mesh, monkeypatch):
    """On simulated devices two computations under way can block each other for ever."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    double = jax.jit(lambda x: 2 * x)
    assert sharding.one_at_a_time(double, mesh)(21) == 42
    assert waited == [42]
    assert sharding.one_at_a_time(double, sharding.make_mesh(jax.devices()[:1])) is double


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 1), (1, 7), (2, 8), (8, 8), (8, 128)])
def test_what_can_be_split_is_accepted(devices, batch_size):
    sharding.check_divisible("f", batch_size, sharding.make_mesh(jax.devices()[:devices]))


@pytest.mark.parametrize(("devices", "batch_size", "message"), [
    (8, 100, "config.f=100 cannot be split over 8 devices: 100 / 8 = 12.50; use 96 or 104"),
    (8, 9, "config.f=9 cannot be split over 8 devices: 9 / 8 = 1.12; use 8 or 16"),
    (3, 128, "config.f=128 cannot be split over 3 devices: 128 / 3 = 42.67; use 126 or 129"),
    (8, 5, "config.f=5 cannot be split over 8 devices: 5 / 8 = 0.62; use 8"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused_with_the_sum(devices, batch_size, message):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    with pytest.raises(InputError) as error:
        sharding.check_divisible("config.f", batch_size, mesh)
    assert str(error.value) == message


def test_microbatches_divide_each_devices_share(mesh):
    sharding.check_divisible("config.f", 32, mesh, microbatches=4)
    message = (
        "config.f=40 cannot be split over 8 devices with 4 microbatches each: 40 / (8 * 4) = 1.25; "
        "use 32 or 64"
    )
    with pytest.raises(InputError) as error:
        sharding.check_divisible("config.f", 40, mesh, microbatches=4)
    assert str(error.value) == message


def test_large_arrays_are_divided_along_their_longest_axis_that_can_be(mesh):
    shapes = {
        "kernel": jax.ShapeDtypeStruct((3, 3, 16, 64), jnp.float32),
        "rows": jax.ShapeDtypeStruct((800, 9), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1001, 3), jnp.float32),
        "small": jax.ShapeDtypeStruct((64,), jnp.float32),
        "count": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = {name: place.spec for name, place in sharding.split_over(mesh, shapes).items()}
    whole = jax.sharding.PartitionSpec()
    assert specs == {
        "kernel": jax.sharding.PartitionSpec(None, None, None, "batch"),
        "rows": jax.sharding.PartitionSpec("batch"),
        "odd": whole,
        "small": whole,
        "count": whole,
    }


def test_the_share_of_one_process_is_the_whole_batch(mesh):
    assert sharding.share(24, mesh) == slice(0, 24)
    batch = {"image": np.zeros((4, 2))}
    assert sharding.from_shares(batch, mesh) is batch
