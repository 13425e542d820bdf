"""Memory that a training step frees, kept for the next one."""

import ctypes
import importlib.metadata
import importlib.util
import platform

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
