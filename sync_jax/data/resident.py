"""The device-resident pipeline: uint8 images in device memory, batch = f(seed, step).

Everything here runs inside the jitted training step. No state is kept between steps, so a run
resumed at step s sees the batch that an uninterrupted run would have seen.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sync_jax.data.augmentation import Augmentation, augment

ROUNDS = 32  # of the shuffle: twice as many as pass every statistical test that we tried


class ResidentSplit(NamedTuple):
    """A split in device memory.

    Attributes:
        images: `[n, height, width, channels]` uint8.
        labels: `[n]` int32.
    """

    images: Array
    labels: Array


def training_batch(
    split: ResidentSplit, seed: Array, step: Array, *, batch_size: int, augmentation: Augmentation
) -> dict[str, Array]:
    """The training batch of a step.

    Examples come without replacement: positions `step * batch_size ...` of an endless row of
    shuffled epochs, so a batch may hold the end of one epoch and the beginning of the next, and no
    example is left out.

    Args:
        split: the training examples.
        seed: `[]` integer; shuffles and augments.
        step: `[]` integer, counted from 0. `step * batch_size` must stay below 2^32.
        batch_size: at most the number of examples.
        augmentation: applied to every image.

    Returns:
        image `[batch, height, width, channels]` float32 in [0, 255], label `[batch]` int32, index
        `[batch]` int32, the example's position in the split, and mask `[batch]` float32, all ones.
    """
    shuffle_key, augment_key = jax.random.split(jax.random.key(seed))
    index = epoch_index(shuffle_key, step, batch_size, split.labels.shape[0])
    # The gathered images stay uint8 until augmentation, which moves a quarter of the bytes.
    image = augment(jax.random.fold_in(augment_key, step), split.images[index], augmentation)
    return {
        "image": image,
        "label": split.labels[index],
        "index": index,
        "mask": jnp.ones(batch_size, jnp.float32),
    }


def epoch_index(key: Array, step: Array, batch_size: int, size: int) -> Array:
    """Which examples a step sees: `[batch_size]` int32; an epoch permutes `range(size)`."""
    start = jnp.uint32(step) * jnp.uint32(batch_size)
    position = start + jnp.arange(batch_size, dtype=jnp.uint32)
    epoch, place = position // jnp.uint32(size), position % jnp.uint32(size)
    first = start // jnp.uint32(size)
    # batch_size <= size, so a batch touches at most two epochs.
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(2, dtype=jnp.uint32))
    constants = jax.vmap(shuffle_constants)(keys)
    return shuffled(place, constants[epoch - first], size).astype(jnp.int32)


def shuffle_constants(key: Array) -> Array:
    """What defines one permutation: `[rounds, 2]` uint32."""
    return jax.random.bits(key, (ROUNDS, 2), jnp.uint32)


def shuffled(place: Array, constants: Array, size: int) -> Array:
    """Where a pseudo-random permutation of `range(size)` puts each place.

    The swap-or-not shuffle (Hoang, Morris & Rogaway, CRYPTO 2012): exactly a permutation for every
    size, and computed for each element alone, so a step costs O(batch), not O(dataset), and no
    permutation is stored or exchanged between devices.

    Args:
        place: any shape, uint32, values in `[0, size)`.
        constants: `[..., rounds, 2]`, the shape of `place` or fewer dimensions in front: the
            permutation of each element.
        size: number of elements permuted.

    Returns:
        The shape of `place`, uint32, values in `[0, size)`.
    """
    modulus = jnp.uint32(size)
    for i in range(ROUNDS):  # unrolled: one fused kernel instead of a loop of launches
        pivot, salt = constants[..., i, 0] % modulus, constants[..., i, 1]
        # A round pairs x with pivot - x and swaps the pair or not, by one hashed bit of the pair.
        partner = (pivot + (modulus - place)) % modulus
        swap = _mix(jnp.maximum(place, partner) ^ salt) & 1
        place = jnp.where(swap == 1, partner, place)
    return place


def _mix(x: Array) -> Array:
    """A 32-bit integer hash: the finaliser of MurmurHash3 (Appleby)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
