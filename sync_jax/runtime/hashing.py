"""A hash of 32-bit integers, for pseudo-random decisions and fingerprints."""

from typing import Any

import numpy as np


def mix(x: Any) -> Any:
    """The finaliser of MurmurHash3 (Appleby), a bijection of uint32, in NumPy or JAX alike."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))
