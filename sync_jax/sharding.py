"""One mesh over all devices: the batch is split over it, everything else is copied to each."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sync_jax.errors import InputError

BATCH_AXIS = "batch"
T = TypeVar("T")


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices`, all of them by default."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (BATCH_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state and of the resident data: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def shard_batch(batch: dict[str, Array], mesh: Mesh) -> dict[str, Array]:
    """Splits a batch over the mesh; for use inside `jax.jit`."""
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))


def one_at_a_time(function: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """Makes a compiled function wait for its result, where two under way could block each other.

    That is so on several simulated devices of one CPU: their collectives hold threads of one small
    pool, two computations can each hold those that the other waits for, and XLA then ends the
    process after 40 seconds. Elsewhere the function is returned as it is.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return function
    return lambda *arguments: jax.block_until_ready(function(*arguments))


def check_divisible(field: str, batch_size: int, mesh: Mesh) -> None:
    """Refuses a batch that cannot be split evenly.

    Raises:
        InputError: `batch_size` is no multiple of the number of devices.
    """
    devices = mesh.size
    if batch_size % devices:
        below, above = batch_size // devices * devices, -(-batch_size // devices) * devices
        choices = f"{below} or {above}" if below else str(above)
        raise InputError(
            f"{field}={batch_size} cannot be split over {devices} devices: "
            f"{batch_size} / {devices} = {batch_size / devices:.2f}; use {choices}"
        )
