"""Convolutions in the form that a CPU is fast at; elsewhere XLA's own.

XLA's convolution reaches half of what a CPU can do going forward, a tenth to a half of it in the
kernel's gradient, and a hundredth where maps have 2 x 2 places. Its matrix products are good, so
here convolutions are made of those. Which way is chosen while tracing, by platform and shapes; the
results differ by rounding only.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

Padding = tuple[tuple[int, int], tuple[int, int]]
# A map of few places is a sum over pairs of an input's and an output's place.
_FEW_PLACES = 4
# With fewer channels Winograd's additions cost more than the multiplications that they save; in the
# kernel's gradient, where XLA is slower, with fewer than half as many.
_WINOGRAD_CHANNELS = 64
# With a stride and fewer channels XLA's convolution is fast, its gradients too.
_FEW_CHANNELS = 4


class Conv(nn.Module):
    """A convolution with the parameters of flax's, under the same names.

    Attributes:
        features: channels of the result.
        kernel_size: rows and columns.
        strides: of rows and columns.
        padding: on every side, or 'SAME'.
        use_bias: whether there is one.
        kernel_init: of the kernel.
        dtype: of the arithmetic; parameters are float32.
    """

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: str | int = "SAME"
    use_bias: bool = True
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[batch, height, width, channels]` to `[batch, height, width, features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        if isinstance(self.padding, str):
            rows, columns = jax.lax.padtype_to_pads(
                x.shape[1:3], self.kernel_size, self.strides, self.padding
            )
        else:
            rows = columns = (self.padding, self.padding)
        y = convolve(x.astype(self.dtype), kernel, self.strides, (rows, columns))
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return y


def convolve(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    """A convolution, computed in whichever way is fast.

    Args:
        x: `[batch, height, width, channels]`.
        kernel: `[rows, columns, channels, outputs]`.
        strides: of rows and columns.
        padding: zeros before and after, of rows and columns.

    Returns:
        `[batch, height, width, outputs]`.
    """
    # Lower precision is emulated on a CPU, and Winograd's sums would lose more of it.
    if jax.default_backend() != "cpu" or x.dtype not in (jnp.float32, jnp.float64):
        return _native(x, kernel, strides, padding)
    size = kernel.shape[:2]
    if size == (1, 1) and padding == ((0, 0), (0, 0)):
        return _matmul(x[:, :: strides[0], :: strides[1]], kernel[0, 0])
    if (size, strides, padding) == ((3, 3), (1, 1), ((1, 1), (1, 1))):
        if x.shape[1] * x.shape[2] <= _FEW_PLACES:
            return _place_by_place(x, kernel)
        if min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS:
            return _winograd(x, kernel)
        if min(kernel.shape[2:]) >= _WINOGRAD_CHANNELS // 2:
            return _native_forward(x, kernel, strides, padding, _winograd_kernel_gradient)
    if strides != (1, 1) and kernel.shape[2] >= _FEW_CHANNELS:
        of_kernel = functools.partial(_patches_kernel_gradient, strides=strides, padding=padding)
        return _native_forward(x, kernel, strides, padding, of_kernel)
    return _native(x, kernel, strides, padding)


def _matmul(x: Array, matrix: Array) -> Array:
    """`[..., channels]` times `[channels, outputs]`, as one product of two matrices."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def _matmul_gradient(x: Array, gradient: Array) -> Array:
    """Of the matrix: `[channels, outputs]`."""
    return x.reshape(-1, x.shape[-1]).T @ gradient.reshape(-1, gradient.shape[-1])


# --- Few places -----------------------------------------------------------------------------------


@jax.custom_vjp
def _place_by_place(x: Array, kernel: Array) -> Array:
    """3 x 3, padded by 1: each place of the output sums over all places of the input near it."""
    return _sum_over_places(x, kernel)


def _sum_over_places(x: Array, kernel: Array) -> Array:
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


def _place_by_place_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _sum_over_places(x, kernel), (x, kernel)


def _place_by_place_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    _, pullback = jax.vjp(lambda x: _sum_over_places(x, kernel), x)
    # Of the kernel XLA's own is fast on maps as small as these.
    pads = ((1, 1), (1, 1))
    _, pullback_of_kernel = jax.vjp(lambda kernel: _native(x, kernel, (1, 1), pads), kernel)
    return pullback(gradient)[0], pullback_of_kernel(gradient)[0]


_place_by_place.defvjp(_place_by_place_forward, _place_by_place_backward)


# --- XLA's own, but for the kernel's gradient -----------------------------------------------------

# Of a layer's input, kernel and output's gradient.
KernelGradient = Callable[[Array, Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _native_forward(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Padding,
    kernel_gradient: KernelGradient,
) -> Array:
    """XLA's convolution and its gradient of the input, with another of the kernel."""
    del kernel_gradient
    return _native(x, kernel, strides, padding)


def _native_forward_forward(
    x: Array,
    kernel: Array,
    strides: tuple[int, int],
    padding: Padding,
    kernel_gradient: KernelGradient,
) -> tuple[Array, tuple[Array, Array]]:
    return _native_forward(x, kernel, strides, padding, kernel_gradient), (x, kernel)


def _native_forward_backward(
    strides: tuple[int, int],
    padding: Padding,
    kernel_gradient: KernelGradient,
    saved: tuple[Array, Array],
    gradient: Array,
) -> tuple[Array, Array]:
    x, kernel = saved
    _, pullback = jax.vjp(lambda x: _native(x, kernel, strides, padding), x)
    return pullback(gradient)[0], kernel_gradient(x, kernel, gradient)


_native_forward.defvjp(_native_forward_forward, _native_forward_backward)


def _native(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _patches_kernel_gradient(
    x: Array, kernel: Array, gradient: Array, *, strides: tuple[int, int], padding: Padding
) -> Array:
    """One product of a matrix of patches with the output's gradient."""
    patches = _patches(x, kernel, strides, padding)
    return _matmul_gradient(patches, gradient).reshape(kernel.shape)


def _patches(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    """What each place of the output sees, `[batch, height, width, rows * columns * channels]`."""
    rows, columns = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height = (x.shape[1] - rows) // strides[0] + 1
    width = (x.shape[2] - columns) // strides[1] + 1
    parts = [
        x[
            :,
            i : i + (height - 1) * strides[0] + 1 : strides[0],
            j : j + (width - 1) * strides[1] + 1 : strides[1],
        ]
        for i in range(rows)
        for j in range(columns)
    ]
    return jnp.concatenate(parts, axis=-1)


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
    """A transform of the rows of a tile, then of its columns."""
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


def _output(products: Grid, height: int, width: int) -> Array:
    """`[batch, height, width, outputs]` of A' m."""
    columns = [jnp.stack(row, axis=3) for row in _both_ways(_to_output, products)]
    y = jnp.stack(columns, axis=2)
    batch, rows, _, across, _, outputs = y.shape
    return y.reshape(batch, 2 * rows, 2 * across, outputs)[:, :height, :width]


@jax.custom_vjp
def _winograd(x: Array, kernel: Array) -> Array:
    """3 x 3, stride 1, padded by 1."""
    inputs, kernels = _input_tiles(x), _kernel_tiles(kernel)
    products = [[_matmul(inputs[i][j], kernels[i][j]) for j in range(4)] for i in range(4)]
    return _output(products, *x.shape[1:3])


def _winograd_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _winograd(x, kernel), (x, kernel)


def _winograd_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = saved
    height, width = x.shape[1:3]
    turned = (3, 1, 2, 0)
    inputs, kernels = _input_tiles(gradient), _kernel_tiles(kernel)
    products = [
        [_matmul(inputs[i][j], kernels[turned[i]][turned[j]].T) for j in range(4)] for i in range(4)
    ]
    of_x = _output(products, height, width)
    return of_x, _winograd_kernel_gradient(x, kernel, gradient)


def _winograd_kernel_gradient(x: Array, kernel: Array, gradient: Array) -> Array:
    del kernel
    height, width = x.shape[1:3]
    even = jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    outputs = _both_ways(_of_output, _quarters(even))
    inputs = _input_tiles(x)
    of_kernel = _both_ways(
        _to_kernel,
        [[_matmul_gradient(inputs[i][j], outputs[i][j]) for j in range(4)] for i in range(4)],
    )
    return jnp.stack([jnp.stack(row) for row in of_kernel])


_winograd.defvjp(_winograd_forward, _winograd_backward)
