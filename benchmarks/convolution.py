"""One layer at a time: XLA's convolution and ours, forward and both gradients.

    taskset -c 0 python -m benchmarks.convolution

Milliseconds of processor time, the least of five, and GFLOP/s as if each multiplication of the
definition were done. On a GPU both are XLA's.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.step import describe_machine
from sync_jax.models import convolution
from sync_jax.runtime.memory import keep_freed_memory

# Batch, pixels, channels, outputs, kernel size, stride: the cnn's, VGG16's and some of ResNets.
LAYERS = (
    (128, 28, 1, 32, 5, 2), (128, 14, 32, 64, 3, 1), (128, 7, 64, 128, 3, 1), (32, 32, 3, 64, 3, 1),
    (32, 32, 64, 64, 3, 1), (32, 16, 64, 128, 3, 1), (32, 16, 128, 128, 3, 1),
    (32, 8, 256, 256, 3, 1), (32, 4, 512, 512, 3, 1), (32, 2, 512, 512, 3, 1),
    (32, 32, 64, 128, 3, 2), (32, 32, 64, 128, 1, 2), (32, 8, 256, 1024, 1, 1),
)  # fmt: skip


def milliseconds(function: Callable[..., Any], *arguments: Any) -> float:
    """The least processor time of five calls, after one that compiles and one that warms up."""
    times = []
    for _ in range(7):
        start = time.process_time()
        jax.block_until_ready(function(*arguments))
        times.append(time.process_time() - start)
    return min(times[2:]) * 1e3


def main() -> None:
    """Prints the table."""
    keep_freed_memory()
    print(describe_machine())
    print(
        f"{'batch, map, channels, kernel':34}{'':8}{'forward':>16}{'of input':>18}{'of kernel':>18}"
    )
    for batch, pixels, channels, outputs, size, stride in LAYERS:
        pads = ((size // 2, size // 2),) * 2
        x = jax.random.normal(jax.random.key(0), (batch, pixels, pixels, channels))
        kernel = jax.random.normal(jax.random.key(1), (size, size, channels, outputs))
        for name, way in (("XLA's", convolution._native), ("ours", convolution.convolve)):
            convolve = functools.partial(way, strides=(stride, stride), padding=pads)

            def of_input(x: Any, kernel: Any, y: Any, convolve: Any = convolve) -> Any:
                return jax.vjp(lambda x: convolve(x, kernel), x)[1](y)

            def of_kernel(x: Any, kernel: Any, y: Any, convolve: Any = convolve) -> Any:
                return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](y)

            y = jnp.ones_like(convolve(x, kernel))
            gflop = 2 * y.size * size * size * channels / 1e9
            line = f"{f'{batch} x {pixels}², {channels} to {outputs}, {size}/{stride}':34}{name:8}"
            for function, arguments in (
                (convolve, (x, kernel)),
                (of_input, (x, kernel, y)),
                (of_kernel, (x, kernel, y)),
            ):
                taken = milliseconds(jax.jit(function), *arguments)
                line += f"{taken:8.1f} ({gflop / taken * 1e3:4.0f})   "
            print(line, flush=True)


if __name__ == "__main__":
    main()
