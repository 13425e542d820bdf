from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

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


def test_the_mesh_divides_batches_and_copies_the_rest(mesh):
    assert mesh.shape == {"batch": 8}
    assert list(mesh.devices) == jax.devices()
    array = np.arange(32.0).reshape(16, 2)
    copied = jax.device_put(array, sharding.replicated(mesh))
    divided = jax.jit(lambda x: sharding.shard_batch({"x": x}, mesh)["x"])(copied)
    assert divided.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    for i, device in enumerate(jax.devices()):
        whole, part = (
            next(np.asarray(s.data) for s in x.addressable_shards if s.device == device)
            for x in (copied, divided)
        )
        np.testing.assert_array_equal(whole, array)
        np.testing.assert_array_equal(part, array[2 * i : 2 * i + 2])


def test_one_at_a_time_waits_where_devices_are_simulated(mesh, monkeypatch):
    """On simulated devices two computations under way can block each other for ever."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or x)
    double = jax.jit(lambda x: 2 * x)
    assert sharding.one_at_a_time(double, mesh)(21) == 42
    assert waited == [42]
    assert sharding.one_at_a_time(double, sharding.make_mesh(jax.devices()[:1])) is double


@pytest.mark.parametrize(("devices", "batch_size", "parts", "message"), [
    (8, 128, 1, None), (3, 9, 1, None), (8, 32, 4, None),
    (8, 100, 1, "8 devices: 100 / 8 = 12.50; use 96 or 104"),
    (3, 128, 1, "3 devices: 128 / 3 = 42.67; use 126 or 129"),
    (8, 5, 1, "8 devices: 5 / 8 = 0.62; use 8"),
    (8, 40, 4, "8 devices with 4 microbatches each: 40 / (8 * 4) = 1.25; use 32 or 64"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused_with_the_sum(devices, batch_size, parts, message):
    mesh = sharding.make_mesh(jax.devices()[:devices])
    if message is None:
        sharding.check_divisible("config.f", batch_size, mesh, microbatches=parts)
        return
    with pytest.raises(InputError) as error:
        sharding.check_divisible("config.f", batch_size, mesh, microbatches=parts)
    assert str(error.value) == f"config.f={batch_size} cannot be split over {message}"


def test_large_arrays_are_divided_along_their_longest_axis_that_can_be(mesh):
    shapes = [(3, 3, 16, 64), (800, 9), (1001, 3), (64,), ()]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    specs = [place.spec for place in sharding.split_over(mesh, arrays)]
    last, first = PartitionSpec(None, None, None, "batch"), PartitionSpec("batch")
    assert specs == [last, first, *[PartitionSpec()] * 3]
