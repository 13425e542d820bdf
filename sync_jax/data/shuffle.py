"""The order of the examples: a pseudo-random permutation computed for each element alone."""

from typing import Any

import numpy as np

from sync_jax.runtime.hashing import mix

ROUNDS = 32  # of the shuffle: twice as many as pass every statistical test that we tried


def shuffled(place: Any, constants: Any, size: int) -> Any:
    """Where a pseudo-random permutation of `range(size)` puts each place.

    The swap-or-not shuffle (Hoang, Morris & Rogaway, CRYPTO 2012): exactly a permutation for every
    size, and computed for each element alone, so a step costs O(batch), not O(dataset), and no
    permutation is stored or exchanged between devices.

    Args:
        place: any shape, uint32, values in `[0, size)`; of NumPy or JAX, which give the same.
        constants: `[..., rounds, 2]`, the shape of `place` or fewer dimensions in front: the
            permutation of each element.
        size: number of elements permuted.

    Returns:
        The shape of `place`, uint32, values in `[0, size)`.
    """
    xp = place.__array_namespace__()
    modulus = xp.asarray(size, dtype=xp.uint32)
    for i in range(ROUNDS):  # unrolled: one fused kernel instead of a loop of launches
        pivot, salt = constants[..., i, 0] % modulus, constants[..., i, 1]
        # A round pairs x with pivot - x and swaps the pair or not, by one hashed bit of the pair.
        partner = (pivot + (modulus - place)) % modulus
        swap = mix(xp.maximum(place, partner) ^ salt) & np.uint32(1)
        place = xp.where(swap == 1, partner, place)
    return place
