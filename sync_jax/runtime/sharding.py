"""One mesh over all devices: the batch is split over it, everything else is copied to each.

A process's devices are neighbours in the mesh, so that its share of a batch is one stretch of it.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sync_jax.errors import InputError
from sync_jax.runtime.console import one_line

BATCH_AXIS = "batch"
_SMALL = 1024  # elements: an array below that is not worth an exchange
T = TypeVar("T")


def check_devices() -> None:
    """Makes sure that JAX finds devices, and as many for each process; InputError otherwise."""
    try:
        owners = [device.process_index for device in jax.devices()]
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        told = f" (JAX_PLATFORMS={platforms})" if platforms else ""
        reason = one_line(error).removesuffix(".")
        raise InputError(
            f"JAX finds no device{told}: {reason}; JAX_PLATFORMS=cpu always works"
        ) from error
    counts = [owners.count(process) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        least, most = counts.index(min(counts)), counts.index(max(counts))
        raise InputError(
            f"process {least} has {min(counts)} devices and process {most} {max(counts)}; a batch "
            "is split evenly, so give each process as many"
        )


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over `devices`, by default all of all processes."""
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (BATCH_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state and of the resident data: a copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXIS))


def share(batch_size: int, mesh: Mesh) -> slice:
    """The rows of a batch that are on this process's devices."""
    mine = [i for i, device in enumerate(mesh.devices.flat) if device in mesh.local_devices]
    each = batch_size // mesh.size
    return slice(mine[0] * each, (mine[-1] + 1) * each)


def from_shares(tree: Any, mesh: Mesh) -> Any:
    """Makes arrays of whole batches from a tree of each process's rows; of one, leaves them."""
    if not mesh.is_multi_process:
        return tree
    place = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(place, x), tree)


def split_over(mesh: Mesh, shapes: Any) -> Any:
    """Shardings that divide the longest axis of every large array that can be divided evenly.

    For an optimizer's state, the first stage of ZeRO (Rajbhandari et al., 2020).
    """

    def split(x: Any) -> NamedSharding:
        axes = [axis for axis in range(len(x.shape)) if x.shape[axis] % mesh.size == 0]
        if not axes or x.size < _SMALL:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, BATCH_AXIS))

    return jax.tree.map(split, shapes)


def shard_batch(batch: dict[str, Array], mesh: Mesh) -> dict[str, Array]:
    """Splits a batch over the mesh; for use inside `jax.jit`."""
    return jax.lax.with_sharding_constraint(batch, batch_sharding(mesh))


def one_at_a_time(function: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """Makes a compiled function wait for its result on several simulated devices of one CPU.

    Their collectives hold threads of one small pool: two computations can each hold those that the
    other waits for, and XLA then ends the process after 40 seconds.
    """
    if mesh.size == 1 or mesh.devices.flat[0].platform != "cpu":
        return function
    return lambda *arguments: jax.block_until_ready(function(*arguments))


def connect(mesh: Mesh) -> None:
    """Connects the devices of all processes, where all arrive at once.

    The first computation would do so, but waits only 30 seconds for a process that compiles longer.
    """
    if mesh.is_multi_process:
        ones = from_shares(np.ones(len(mesh.local_devices), np.float32), mesh)
        total = jax.jit(jax.numpy.sum, out_shardings=replicated(mesh))
        jax.block_until_ready(total(ones))


def check_divisible(field: str, batch_size: int, mesh: Mesh, *, microbatches: int = 1) -> None:
    """Raises InputError, with the arithmetic, for a batch that cannot be split evenly."""
    parts = mesh.size * microbatches
    if batch_size % parts == 0:
        return
    below = batch_size // parts * parts
    choices = f"{below} or {below + parts}" if below else str(parts)
    over, divisor = f"{mesh.size} devices", str(mesh.size)
    if microbatches > 1:
        over += f" with {microbatches} microbatches each"
        divisor = f"({mesh.size} * {microbatches})"
    raise InputError(
        f"{field}={batch_size} cannot be split over {over}: "
        f"{batch_size} / {divisor} = {batch_size / parts:.2f}; use {choices}"
    )
