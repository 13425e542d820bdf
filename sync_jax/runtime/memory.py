"""Memory that is not asked for twice: what a step frees, and images that XLA takes as they are."""

import ctypes
import importlib.metadata
import importlib.util
import math
import platform

import numpy as np

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Tells glibc to keep what is freed rather than hand it back to the system.

    On a CPU XLA allocates a step's intermediate results anew each time. Blocks of this size come
    from the system, page by page, each cleared at its first touch: a fifth or more of a step on two
    cores (benchmarks/README.md). Afterwards the process keeps the most that it has needed. To be
    called before JAX starts a backend, whose threads otherwise have arenas of their own already.

    Returns:
        Whether it did. Nothing happens elsewhere than on Linux with glibc, nor where JAX has an
        accelerator's plugin: the threads that decode pictures for it are better off with arenas of
        their own.
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
    """Bytes that a CPU's XLA computes with where they are; others it copies.

    Args:
        shape: of the array.

    Returns:
        uint8, not initialised, in C order; begins at a multiple of 64 bytes.
    """
    size, boundary = math.prod(shape), 64
    room = np.empty(size + boundary, np.uint8)
    start = -room.ctypes.data % boundary
    return room[start : start + size].reshape(shape)
