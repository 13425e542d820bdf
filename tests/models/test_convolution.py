"""Our ways to convolve beside XLA's own: values, gradients, parameters, devices, precision."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax.models import convolution
from sync_jax.models.convolution import Conv, convolve
from sync_jax.runtime.sharding import batch_sharding, make_mesh, replicated

ONE, NONE = ((1, 1), (1, 1)), ((0, 0), (0, 0))
# Height, width, channels, outputs, kernel size, stride, padding.
CASES = {
    "winograd": (5, 6, 65, 66, 3, 1, ONE),
    "few places": (2, 2, 5, 6, 3, 1, ONE),
    "few places, three in a row": (1, 3, 5, 6, 3, 1, ONE),
    "kernel's gradient by winograd": (5, 7, 33, 34, 3, 1, ONE),
    "xla's own": (7, 6, 3, 5, 3, 1, ONE),
    "patches, stride": (9, 8, 4, 5, 5, 2, ((1, 2), (2, 1))),
    "patches, more stride than kernel": (9, 8, 4, 5, 2, 3, NONE),
    "xla's own, a stem": (12, 13, 3, 4, 7, 2, ((3, 3), (3, 3))),
    "1 x 1": (4, 5, 6, 7, 1, 1, NONE),
    "1 x 1, stride": (7, 6, 5, 4, 1, 2, NONE),
    "xla's own, 1 x 1, padded": (3, 3, 5, 4, 1, 1, ONE),
}


def arrays(case, batch=2, dtype="float32"):
    height, width, channels, outputs, size, _, _ = case
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, channels))
    kernel = rng.standard_normal((size, size, channels, outputs)) / size / np.sqrt(channels)
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def value_and_gradients(function, x, kernel, stride, padding):
    y, pullback = jax.vjp(lambda x, k: function(x, k, (stride, stride), padding), x, kernel)
    # Neither symmetric nor constant, so that an exchanged axis would be seen.
    weights = jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return y, *pullback(weights)


compiled = jax.jit(value_and_gradients, static_argnums=(0, 3, 4))


def distance(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    assert found.shape == expected.shape
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values_and_gradients_are_xlas(case):
    with jax.enable_x64(True):
        x, kernel = arrays(case, dtype="float64")
        exact = compiled(convolution._native, x, kernel, *case[5:])
        for ours, theirs in zip(compiled(convolve, x, kernel, *case[5:]), exact, strict=True):
            assert ours.dtype == jnp.float64
            assert distance(ours, theirs) < 1e-14
    if case == CASES["winograd"]:  # whose sums lose the most
        for ours, theirs in zip(compiled(convolve, *arrays(case), *case[5:]), exact, strict=True):
            assert ours.dtype == jnp.float32
            assert distance(ours, theirs) < 1e-6


def test_each_way_is_taken(monkeypatch):
    """The cases above are of the ways that they are named after."""
    ways = {
        **{"winograd": "_winograd", "few": "_place_by_place", "1": "_matmul", "xla's": "_native"},
        **{"patches": "_patches_kernel_gradient", "kernel's": "_winograd_kernel_gradient"},
    }
    taken = set()

    def noted(way):
        real = getattr(convolution, way)

        def function(*arguments, **options):
            taken.add(way)
            return real(*arguments, **options)

        return function

    for way in set(ways.values()):
        monkeypatch.setattr(convolution, way, noted(way))
    for name, case in CASES.items():
        taken.clear()
        function = functools.partial(value_and_gradients, convolve, stride=case[5], padding=case[6])
        jax.eval_shape(function, *arrays(case))
        way = ways[name.split()[0].rstrip(",")]
        assert way in taken, name
        if way == "_native":
            assert taken == {way}, name


def test_elsewhere_and_in_low_precision_it_is_xlas(monkeypatch):
    x, kernel = arrays(CASES["winograd"])
    low = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)

    def primitives(*arguments):
        jaxpr = jax.make_jaxpr(lambda x, k: convolve(x, k, (1, 1), ONE))(*arguments)
        return {equation.primitive.name for equation in jaxpr.eqns}

    assert primitives(*low) == {"conv_general_dilated"}
    assert "conv_general_dilated" not in primitives(x, kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert primitives(x, kernel) == {"conv_general_dilated"}


@pytest.mark.parametrize(("strides", "padding"), [((1, 1), "SAME"), ((2, 2), 3)])
def test_parameters_are_flaxs(strides, padding):
    ours, theirs = (kind(5, (3, 3), strides, padding, name="layer") for kind in (Conv, nn.Conv))
    x = arrays(CASES["patches, stride"])[0]
    variables = theirs.init(jax.random.key(1), x)
    chex.assert_trees_all_equal(ours.init(jax.random.key(1), x), variables)
    variables["params"]["bias"] = jnp.arange(5.0)
    results = [layer.apply(variables, x) for layer in (ours, theirs)]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["winograd", "patches, stride"])
def test_a_batch_stays_split_over_the_devices(name):
    """Each device convolves its own examples; only the kernel's gradient is exchanged."""
    case, mesh = CASES[name], make_mesh()
    x, kernel = arrays(case, batch=16)
    expected = compiled(convolve, x, kernel, *case[5:])
    x = jax.device_put(x, batch_sharding(mesh))
    kernel = jax.device_put(kernel, replicated(mesh))
    function = functools.partial(value_and_gradients, convolve, stride=case[5], padding=case[6])
    split = batch_sharding(mesh)
    sharded = jax.jit(function, out_shardings=(split, split, replicated(mesh)))
    program = sharded.lower(x, kernel).compile()
    text = program.as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
    for found, wanted in zip(program(x, kernel), expected, strict=True):
        assert distance(found, wanted) < 1e-6
