"""VGG16 and the ResNets: sizes, precision, dropout, and PyTorch's numbers for the same weights."""

import functools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import torch_parity
from sync_jax.config import default_config
from sync_jax.models import make_backbone, make_network
from sync_jax.models.heads import SelectiveNetwork
from sync_jax.models.pretrained import torch_name
from sync_jax.models.resnet import RESNETS, ResNet
from sync_jax.models.vgg import VGG16

GOLDEN = json.loads((Path(__file__).parent / "torch_golden.json").read_text())


def shapes_of(network, pixels, channels=3):
    images = jax.ShapeDtypeStruct((2, pixels, pixels, channels), jnp.float32)
    return jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, train=False), images
    )


@pytest.mark.parametrize(
    ("name", "stem", "classes", "expected"),
    [
        # torchvision's.
        ("resnet18", "imagenet", 1000, 11_689_512),
        ("resnet34", "imagenet", 1000, 21_797_672),
        ("resnet50", "imagenet", 1000, 25_557_032),
        # The CIFAR form that is reported everywhere with 11.17 million.
        ("resnet18", "cifar", 10, 11_173_962),
        # 14,728,266 with a single dense layer of 10 outputs, and the 512-unit layer before it.
        ("vgg16_bn", "cifar", 10, 14_728_266 + 512 * 512 + 512 + 2 * 512),
    ],
)
def test_published_parameter_counts(name, stem, classes, expected):
    config = default_config().model
    config.name = name
    if name != "vgg16_bn":
        config.stem = stem
    network = make_network(config, heads=(), num_classes=classes, target_coverage=0.8)
    outputs, variables = shapes_of(network, 224 if stem == "imagenet" else 32)
    assert outputs["logits"].shape == (2, classes)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected


def initialised(network, images):
    # Arguments and no constants, which XLA would compute with while it compiles.
    init = jax.jit(functools.partial(network.init, train=False))
    return init(jax.random.key(0), images)


@pytest.mark.parametrize("pixels", [1, 2, 28, 33])
@pytest.mark.parametrize("name", ["vgg16_bn", *RESNETS])
def test_any_size_and_channels(name, pixels):
    config = default_config().model
    config.name, config.width = name, 2
    features, _ = shapes_of(make_backbone(config), pixels, channels=1)
    assert features.shape == (2, {"vgg16_bn": 512, "resnet50": 64}.get(name, 16))


def test_stems_differ_in_resolution():
    """A quarter of the resolution: sixteen times fewer places in the first stage."""
    kernels = {}
    for stem in ("cifar", "imagenet"):
        _, variables = shapes_of(ResNet((1,), width=2, stem=stem), 32)
        kernels[stem] = variables["params"]["conv1"]["kernel"].shape
    assert kernels == {"cifar": (3, 3, 3, 2), "imagenet": (7, 7, 3, 2)}


@pytest.mark.parametrize("name", ["cnn", "vgg16_bn", "resnet18"])
def test_bfloat16_computes_low_and_keeps_high(name):
    config = default_config().model
    config.name, config.width, config.dtype = name, 8, "bfloat16"
    backbone = make_backbone(config)
    network = SelectiveNetwork(backbone, 3, heads=("selection",), target_coverage=0.8)
    images = jnp.asarray(torch_parity.examples(32)[0][:8])
    init = jax.jit(functools.partial(network.init_with_output, train=False))
    outputs, variables = init(jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves((outputs, variables))} == {jnp.dtype("float32")}
    inner = {"params": variables["params"]["backbone"]} | {
        "batch_stats": variables["batch_stats"]["backbone"]
    }
    features = jax.jit(functools.partial(backbone.apply, train=False))(inner, images)
    assert features.dtype == jnp.bfloat16
    config.dtype = "float32"
    exact = jax.jit(functools.partial(make_backbone(config).apply, train=False))(inner, images)
    assert not np.array_equal(np.asarray(features, np.float32), exact)
    error = torch_parity.relative(np.asarray(features, np.float32), np.asarray(exact))
    assert error < 0.05  # eight bits of mantissa


@pytest.mark.parametrize("channels", [True, False])
def test_vgg_drops_whole_channels_or_elements(channels):
    """Seen through the intermediate dropouts: a channel is all zero or nowhere zero, or mixed."""
    network = VGG16(width=8, features=4, channel_dropout=channels)
    images = jnp.asarray(torch_parity.examples(32)[0][:4])
    variables = initialised(network, images)
    _, state = jax.jit(
        lambda variables, images: network.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(1)},
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: type(module).__name__ == "Dropout",
        )
    )(variables, images)
    first = state["intermediates"]["Dropout_0"]["__call__"][0]
    zero = np.mean(np.asarray(first) == 0, axis=(1, 2))
    if channels:
        assert set(np.unique(zero)) == {0.0, 1.0}
    else:
        assert np.all((zero > 0.2) & (zero < 0.4))
    assert 0.1 < zero.mean() < 0.5  # the rate is 0.3


def test_vgg_without_dropout_is_deterministic_and_the_order_of_norm_matters():
    images = jnp.asarray(torch_parity.examples(32)[0][:4])
    results = []
    for norm_first in (False, True):
        network = VGG16(
            width=4, features=4, norm_first=norm_first, conv_dropout=False, last_dropout=0.0
        )
        apply = functools.partial(network.apply, train=True, mutable=["batch_stats"])
        results.append(jax.jit(apply)(initialised(network, images), images)[0])
    assert np.all(results[1] >= 0)  # ReLU last
    assert np.any(results[0] < 0)  # BatchNorm last


def torch_shape(leaf):
    if leaf.ndim == 4:
        return tuple(leaf.shape[i] for i in (3, 2, 0, 1))
    return leaf.shape[::-1]


def torch_weights(params, batch_stats):
    weights = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = torch_name([key.key for key in path])
            weights[name] = torch_parity.weight(name, torch_shape(leaf))
    return weights


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_and_gradients_are_pytorchs(name):
    """Golden values by `benchmarks/torch_parity.py --golden`."""
    with jax.enable_x64(True):
        logits, gradients = torch_parity.ours(
            name, torch_weights, dtype="float64", **torch_parity.narrow(name)
        )
    expected = GOLDEN[name]
    assert torch_parity.relative(logits, np.asarray(expected["logits"])) < 1e-5
    assert len(gradients) == len(expected["gradients"])
    for path, gradient in gradients.items():
        torch_path = torch_name(path.split("."))
        layout = gradient.transpose(3, 2, 0, 1) if gradient.ndim == 4 else gradient.T
        length, product = expected["gradients"][torch_path]
        # A bias before BatchNorm has no gradient but rounding.
        tolerance = 1e-3 * length + 1e-7
        found = torch_parity.fingerprint(torch_path, layout)
        np.testing.assert_allclose(found, (length, product), rtol=0, atol=tolerance, err_msg=path)


def test_the_comparison_would_notice_a_wrong_order():
    """A negative control: the other order of BatchNorm and ReLU is not within the tolerance."""
    chex.assert_equal(
        set(GOLDEN["vgg16_bn"]["gradients"]), set(GOLDEN["vgg16_bn norm first"]["gradients"])
    )
    logits, _ = torch_parity.ours(
        "vgg16_bn", torch_weights, norm_first=True, **torch_parity.narrow("vgg16_bn")
    )
    assert torch_parity.relative(logits, np.asarray(GOLDEN["vgg16_bn"]["logits"])) > 0.01
