"""Convolutions in the form that a CPU is fast at; elsewhere XLA's own.

XLA's convolution reaches half of what a CPU can do going forward, a tenth to a half of it in the
kernel's gradient, and a hundredth where maps have 2 x 2 places. Its matrix products are good, so
here convolutions are made of those. Which way is chosen while tracing, by platform and shapes; the
results differ by rounding only.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Pads = Sequence[tuple[int, int]]
_FEW_PLACES = 4  # a sum over pairs of an input's and an output's place is fast
# With fewer channels Winograd's additions cost more than the multiplications that they save; in the
# kernel's gradient, where XLA is slower, with fewer than half as many.
_WINOGRAD_CHANNELS = 64
# With a stride and fewer channels XLA's convolution is fast, its gradients too.
_FEW_CHANNELS = 4


def convolve(x: Array, kernel: Array, strides: Sequence[int], padding: str | Pads) -> Array:
    """Convolves in whichever way is fast; padding is 'SAME', or zeros before and after, by axis."""
    size, strides = kernel.shape[:2], tuple(strides)
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], size, strides, padding)
    padding = tuple(padding)
    native = functools.partial(_native, strides=strides, padding=padding)
    # Lower precision is emulated on a CPU, and Winograd's sums would lose more of it.
    if jax.default_backend() != "cpu" or x.dtype not in (jnp.float32, jnp.float64):
        return native(x, kernel)
    if size == (1, 1) and padding == ((0, 0), (0, 0)):
        return _matmul(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    if (size, strides, padding) == ((3, 3), (1, 1), ((1, 1), (1, 1))):
        if x.shape[1] * x.shape[2] <= _FEW_PLACES:
            # XLA's own gradient of the kernel is fast on maps as small as these.
            gradients = _gradient(_place_by_place, 0), _gradient(native, 1)
            return _with_gradients(_place_by_place, *gradients)(x, kernel)
        if min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS:
            gradients = _winograd_input_gradient, _winograd_kernel_gradient
            return _with_gradients(_winograd, *gradients)(x, kernel)
        if min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS // 2:
            gradients = _gradient(native, 0), _winograd_kernel_gradient
            return _with_gradients(native, *gradients)(x, kernel)
    if strides != (1, 1) and kernel.shape[2] >= _FEW_CHANNELS:
        of_kernel = functools.partial(_patches_kernel_gradient, strides=strides, padding=padding)
        return _with_gradients(native, _gradient(native, 0), of_kernel)(x, kernel)
    return native(x, kernel)


# A convolution with the parameters of flax's, under the same names; without dilation and groups.
Conv = functools.partial(
    nn.Conv, conv_general_dilated=lambda *arguments, **defaults: convolve(*arguments)
)

Convolution = Callable[[Array, Array], Array]  # of an input and a kernel
Gradient = Callable[[Array, Array, Array], Array]  # of input, kernel and the output's gradient


def _with_gradients(forward: Convolution, of_input: Gradient, of_kernel: Gradient) -> Convolution:
    """Replaces the gradients of a convolution."""
    function = jax.custom_vjp(forward)

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        return of_input(*saved, gradient), of_kernel(*saved, gradient)

    function.defvjp(lambda x, kernel: (forward(x, kernel), (x, kernel)), backward)
    return function


def _gradient(forward: Convolution, argument: int) -> Gradient:
    """JAX's own gradient of the input (0) or the kernel (1)."""
    return lambda x, kernel, gradient: jax.vjp(forward, x, kernel)[1](gradient)[argument]


def _native(x: Array, kernel: Array, strides: Sequence[int], padding: Pads) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _matmul(x: Array, matrix: Array) -> Array:
    """`[..., channels]` times `[channels, outputs]`, as one product of two matrices."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _matmul_gradient(x: Array, gradient: Array) -> Array:
    """The gradient of the matrix: `[channels, outputs]`."""
    return x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])


def _place_by_place(x: Array, kernel: Array) -> Array:
    """3 x 3, padded by 1: each place of the output sums over all places of the input near it."""
    height, width = x.shape[1:3]
    places = [(i, j) for i in range(height) for j in range(width)]
    outputs = [
        functools.reduce(
            jnp.add,
            [
                x[:, i, j] @ kernel[i - k + 1, j - m + 1]
                for i, j in places
                if abs(i - k) < 2 and abs(j - m) < 2
            ],
        )
        for k, m in places
    ]
    return jnp.stack(outputs, axis=1).reshape(x.shape[0], height, width, -1)


def _patches_kernel_gradient(
    x: Array, kernel: Array, gradient: Array, *, strides: Sequence[int], padding: Pads
) -> Array:
    """One product of a matrix with the output's gradient: what each place of the output sees."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = gradient.shape[1:3]
    parts = [
        x[
            :,
            i : i + (height - 1) * strides[0] + 1 : strides[0],
            j : j + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return _matmul_gradient(jnp.concatenate(parts, axis=-1), gradient).reshape(kernel.shape)


# --- Winograd -------------------------------------------------------------------------------------

# Winograd's minimal filtering for 2 x 2 outputs of a 3 x 3 kernel (Lavin & Gray, 2016): 16
# multiplications instead of 36, at the price of a few additions. A tile is 4 x 4 places of the
# input, every second row and column. In one direction, for inputs d, kernel g, outputs y:
#
#     y = A' ((G g) * (B' d))         B' d = d0 - d2, d1 + d2, d2 - d1, d1 - d3
#                                     G g  = g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2
#                                     A' m = m0 + m1 + m2, m1 - m2 - m3
#
# and the same in the other. The kernel's gradient is G' of the products of B' d and A y; the
# input's is the convolution of the output's with the kernel turned by 180 degrees, for which G g
# has its first and last exchanged.

Grid = list[list[Array]]  # by row and column of a tile


def _both_ways(transform: Callable[[list[Array]], list[Array]], grid: Grid) -> Grid:
    """Transforms the rows of a tile, then its columns."""
    by_column = [transform(list(column)) for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*by_column, strict=True)]


def _of_input(d: list[Array]) -> list[Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _of_kernel(g: list[Array]) -> list[Array]:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _to_output(m: list[Array]) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _of_output(y: list[Array]) -> list[Array]:
    return [y[0], y[0] + y[1], y[0] - y[1], -y[1]]


def _to_kernel(u: list[Array]) -> list[Array]:
    both, difference = (u[1] + u[2]) / 2, (u[1] - u[2]) / 2
    return [u[0] + both, difference, both + u[3]]


def _quarters(x: Array) -> Grid:
    """Even and odd rows and columns, of which there must be even numbers."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return [[x[:, :, i, :, j] for j in (0, 1)] for i in (0, 1)]


def _input_tiles(x: Array) -> Grid:
    """`[4][4]` of `[batch, tiles, tiles, channels]`, B' d."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1 + height % 2), (1, 1 + width % 2), (0, 0)))
    quarters = _quarters(x)
    places = [(0, slice(0, -1)), (1, slice(0, -1)), (0, slice(1, None)), (1, slice(1, None))]
    tiles = [[quarters[i][j][:, rows, columns] for j, columns in places] for i, rows in places]
    return _both_ways(_of_input, tiles)


def _kernel_tiles(kernel: Array) -> Grid:
    """`[4][4]` of `[channels, outputs]`, G g."""
    return _both_ways(_of_kernel, [[kernel[i, j] for j in range(3)] for i in range(3)])


def _filter(x: Array, kernels: Grid) -> Array:
    """`[batch, height, width, outputs]`: A' of the products of B' d with the kernel's tiles."""
    inputs = _input_tiles(x)
    products = [[_matmul(inputs[i][j], kernels[i][j]) for j in range(4)] for i in range(4)]
    columns = [jnp.stack(row, axis=3) for row in _both_ways(_to_output, products)]
    y = jnp.stack(columns, axis=2)
    batch, rows, _, across, _, outputs = y.shape
    return y.reshape(batch, 2 * rows, 2 * across, outputs)[:, : x.shape[1], : x.shape[2]]


def _winograd(x: Array, kernel: Array) -> Array:
    """3 x 3, stride 1, padded by 1."""
    return _filter(x, _kernel_tiles(kernel))


def _winograd_input_gradient(x: Array, kernel: Array, gradient: Array) -> Array:
    del x
    turned, kernels = (3, 1, 2, 0), _kernel_tiles(kernel)
    return _filter(gradient, [[kernels[i][j].T for j in turned] for i in turned])


def _winograd_kernel_gradient(x: Array, kernel: Array, gradient: Array) -> Array:
    del kernel
    height, width = x.shape[1:3]
    even = jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    outputs, inputs = _both_ways(_of_output, _quarters(even)), _input_tiles(x)
    products = [[_matmul_gradient(inputs[i][j], outputs[i][j]) for j in range(4)] for i in range(4)]
    return jnp.stack([jnp.stack(row) for row in _both_ways(_to_kernel, products)])
