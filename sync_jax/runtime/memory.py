"""malloc tuning, and aligned buffers that XLA uses without copying."""

import ctypes
import importlib.metadata
import importlib.util
import math
import platform

import numpy as np

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory, before JAX starts a backend; True if it does.

    On a CPU XLA allocates a step's intermediate results anew each time, and the system clears every
    page: a fifth or more of a step on two cores (benchmarks/README.md). With an accelerator the
    threads that decode images are faster with arenas of their own.
    """
    if importlib.metadata.entry_points(group="jax_plugins") or importlib.util.find_spec("libtpu"):
        return False
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena, for those of other threads cannot grow beyond 64 MB and then ask the system.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))  # -1: never
    return all(mallopt(name, value) == 1 for name, value in settings)


def aligned_empty(shape: tuple[int, ...]) -> np.ndarray:
    """Uninitialised uint8, which XLA uses on a CPU without a copy: aligned to 64 bytes."""
    size, boundary = math.prod(shape), 64
    room = np.empty(size + boundary, np.uint8)
    start = -room.ctypes.data % boundary
    return room[start : start + size].reshape(shape)
