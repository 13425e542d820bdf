"""The device-resident pipeline: uint8 images in device memory, batch = f(seed, step).

Everything here runs inside the jitted training step. No state is kept between steps, so a run
resumed at step s sees the batch that an uninterrupted run would have seen.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from sync_jax.data.augmentation import augment
from sync_jax.data.info import Images
from sync_jax.data.recipe import ROUNDS, Augmentation, shuffled
from sync_jax.runtime.sharding import BATCH_AXIS, batch_sharding, replicated

_CHUNK = 1 << 28  # bytes copied to a device at once


class ResidentSplit(NamedTuple):
    """A split in device memory: labels `[n]`, images `[n, ...]` or more rows where sharded."""

    images: Array
    labels: Array


def training_batch(
    split: ResidentSplit,
    seed: Array,
    step: Array,
    *,
    batch_size: int,
    augmentation: Augmentation,
    size: int | None = None,
    mesh: Mesh | None = None,
    view: int = 0,
) -> dict[str, Array]:
    """Makes the training batch of a step.

    Examples come without replacement: positions `step * batch_size ...` of an endless row of
    shuffled epochs, so a batch may hold the end of one epoch and the beginning of the next.

    The seed shuffles and augments; steps count from 0, and `step * batch_size` must stay below
    2^32. `mesh` is that over which the images are sharded. Of the result, image is float32 in
    [0, 255], index the examples' positions in the split, and mask all ones.
    """
    shuffle_key, _ = jax.random.split(jax.random.key(seed))
    index = epoch_index(shuffle_key, step, batch_size, split.labels.shape[0])
    # The gathered images stay uint8 until augmentation, which moves a quarter of the bytes.
    image = split.images[index] if mesh is None else take(split.images, index, mesh)
    image = augment(augmentation_key(seed, step, view), image, augmentation, size=size)
    return {
        "image": image,
        "label": split.labels[index],
        "index": index,
        "mask": jnp.ones(batch_size, jnp.float32),
    }


def augmentation_key(seed: Array, step: Array, view: int = 0) -> Array:
    """PRNG key of a step's augmentation, in either pipeline; further views have their own."""
    _, key = jax.random.split(jax.random.key(seed))
    key = jax.random.fold_in(key, step)
    # `augment` folds small numbers into the key of the first view.
    return jax.random.fold_in(key, 1000 + view) if view else key


def epoch_index(key: Array, step: Array, batch_size: int, size: int) -> Array:
    """Positions of the examples of a step: `[batch_size]` int32."""
    start = jnp.uint32(step) * jnp.uint32(batch_size)
    position = start + jnp.arange(batch_size, dtype=jnp.uint32)
    epoch, place = position // jnp.uint32(size), position % jnp.uint32(size)
    first = start // jnp.uint32(size)
    # batch_size <= size, so a batch touches at most two epochs.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(2, dtype=jnp.uint32))
    constants = jax.vmap(shuffle_constants)(keys)
    return shuffled(place, constants[epoch - first], size).astype(jnp.int32)


def examples_of_step(seed: int, step: int, *, batch_size: int, size: int) -> np.ndarray:
    """The same of a step counted from 1, as an array of NumPy."""
    key, _ = jax.random.split(jax.random.key(np.uint32(seed)))
    return np.asarray(epoch_index(key, jnp.uint32(step - 1), batch_size, size))


def shuffle_constants(key: Array) -> Array:
    """Random numbers that define one permutation: `[rounds, 2]` uint32."""
    return jax.random.bits(key, (ROUNDS, 2), jnp.uint32)


def epoch_constants(seed: int, epochs: int) -> np.ndarray:
    """The same of the first epochs, for the host: `[epochs, rounds, 2]` uint32."""
    shuffle_key, _ = jax.random.split(jax.random.key(seed))
    numbers = jnp.arange(epochs, dtype=jnp.uint32)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(shuffle_key, numbers)
    return np.asarray(jax.vmap(shuffle_constants)(keys))


def put_on_devices(
    images: Images, labels: np.ndarray, mesh: Mesh, *, sharded: bool
) -> ResidentSplit:
    """Copies a split to the devices, some hundred megabytes at a time.

    A CPU is its own device: an array of `memory.aligned_empty` is not copied there, and must not be
    changed afterwards. If sharded, each device holds a part, the last filled up with zeros.
    """
    copied = replicated(mesh)
    alone = mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
    if alone and isinstance(images, np.ndarray):
        return ResidentSplit(*jax.device_put((images, labels), copied))
    parts = mesh.size if sharded else 1
    rows = -(-len(labels) // parts)
    shape, dtype = (rows * parts, *images.shape[1:]), images.dtype
    chunk = max(_CHUNK // max(math.prod(images.shape[1:]) * dtype.itemsize, 1), 1)
    sharding = batch_sharding(mesh) if sharded else copied
    write = jax.jit(
        lambda all_rows, some, start: jax.lax.dynamic_update_slice_in_dim(all_rows, some, start, 0),
        donate_argnums=0,
    )
    arrays = []
    for device, place in sharding.addressable_devices_indices_map(shape).items():
        first = (place or (slice(0),))[0].start or 0
        last = min(first + rows, len(labels))
        array = jax.device_put(jnp.zeros((rows, *shape[1:]), dtype), device)
        for start in range(first, last, chunk):
            some = np.ascontiguousarray(images[start : min(start + chunk, last)])
            array = write(array, jax.device_put(some, device), start - first)
        arrays.append(array)
    held = jax.make_array_from_single_device_arrays(shape, sharding, arrays)
    return ResidentSplit(held, jax.device_put(labels, copied))


def take(images: Array, index: Array, mesh: Mesh) -> Array:
    """Takes rows of an array whose first axis is split over the mesh; the result is split likewise.

    Each device looks up, for the whole batch, the rows that it holds; what the others lack comes to
    them by one exchange of the size of the batch. Both sizes are multiples of the devices' number.
    """
    rows = images.shape[0] // mesh.size

    def local(held: Array, index: Array) -> Array:
        place = index - jax.lax.axis_index(BATCH_AXIS) * rows
        here = (place >= 0) & (place < rows)
        found = held[jnp.where(here, place, 0)]
        found = jnp.where(here.reshape(-1, *[1] * (held.ndim - 1)), found, 0)
        # Of each row all summands but one are zero.
        return jax.lax.psum_scatter(found, BATCH_AXIS, scatter_dimension=0, tiled=True)

    split, whole = PartitionSpec(BATCH_AXIS), PartitionSpec()
    return jax.shard_map(local, mesh=mesh, in_specs=(split, whole), out_specs=split)(images, index)
