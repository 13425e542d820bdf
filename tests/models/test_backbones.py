"""VGG16 and the ResNets: sizes, precision, dropout, and PyTorch's numbers for the same weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import torch_parity
from sync_jax.config import default_config
from sync_jax.models import make_backbone, make_network
from sync_jax.models.heads import SelectiveNetwork
from sync_jax.models.pretrained import from_torch, torch_name
from sync_jax.models.resnet import ResNet
from sync_jax.models.vgg import VGG16

GOLDEN = json.loads((Path(__file__).parent / "torch_golden.json").read_text())


def shapes_of(network, pixels, channels=3):
    images = jax.ShapeDtypeStruct((2, pixels, pixels, channels), jnp.float32)
    return jax.eval_shape(
        lambda x: network.init_with_output(jax.random.key(0), x, train=False), images
    )


@pytest.mark.parametrize(("name", "stem", "classes", "expected"), [
    # torchvision's.
    ("resnet18", "imagenet", 1000, 11_689_512),
    ("resnet34", "imagenet", 1000, 21_797_672),
    ("resnet50", "imagenet", 1000, 25_557_032),
    # The CIFAR form that is reported everywhere with 11.17 million.
    ("resnet18", "cifar", 10, 11_173_962),
    # 14,728,266 with a single dense layer of 10 outputs, and the 512-unit layer before it.
    ("vgg16_bn", "cifar", 10, 14_728_266 + 512 * 512 + 512 + 2 * 512),
])  # fmt: skip
def test_published_parameter_counts(name, stem, classes, expected):
    config = default_config().model
    config.name = name
    if name != "vgg16_bn":
        config.stem = stem
    network = make_network(config, heads=(), num_classes=classes, target_coverage=0.8)
    outputs, variables = shapes_of(network, 224 if stem == "imagenet" else 32)
    assert outputs["logits"].shape == (2, classes)
    assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected


@pytest.mark.parametrize("pixels", [1, 33])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50"])
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


@pytest.mark.parametrize("name", ["cnn", "resnet18"])
def test_bfloat16_computes_low_and_keeps_high(name):
    config = default_config().model
    config.name, config.width, config.dtype = name, 8, "bfloat16"
    backbone = make_backbone(config)
    network = SelectiveNetwork(backbone, 3, heads=("selection",), target_coverage=0.8)
    outputs = shapes_of(network, 32)
    assert {x.dtype for x in jax.tree.leaves(outputs)} == {jnp.dtype("float32")}
    config.dtype = "float32"
    in_float32 = make_backbone(config)
    assert shapes_of(backbone, 32)[0].dtype == jnp.bfloat16

    @jax.jit
    def features(images):
        variables = backbone.init(jax.random.key(0), images, train=False)
        return [net.apply(variables, images, train=False) for net in (backbone, in_float32)]

    low, exact = features(torch_parity.examples(32)[0][:8])
    low = np.asarray(low, np.float32)
    assert not np.array_equal(low, exact)
    assert torch_parity.relative(low, np.asarray(exact)) < 0.05  # eight bits of mantissa


@pytest.mark.parametrize("channels", [True, False])
def test_vgg_drops_whole_channels_or_elements(channels):
    """Seen in the first dropout: a channel is all zero or nowhere zero, or mixed."""
    network = VGG16(width=8, features=4, channel_dropout=channels)

    @jax.jit
    def first_dropout(images):
        _, state = network.init_with_output(
            {"params": jax.random.key(0), "dropout": jax.random.key(1)},
            images,
            train=True,
            capture_intermediates=lambda module, _: type(module).__name__ == "Dropout",
        )
        return state["intermediates"]["Dropout_0"]["__call__"][0]

    first = first_dropout(torch_parity.examples(32)[0][:4])
    zero = np.mean(np.asarray(first) == 0, axis=(1, 2))
    if channels:
        assert set(np.unique(zero)) == {0.0, 1.0}
    else:
        assert np.all((zero > 0.2) & (zero < 0.4))
    assert 0.1 < zero.mean() < 0.5  # the rate is 0.3


def torch_shape(leaf):
    if leaf.ndim == 4:
        return tuple(leaf.shape[i] for i in (3, 2, 0, 1))
    return leaf.shape[::-1]


def name_of(path):
    return torch_name([key.key for key in path])


def torch_weights(params, batch_stats):
    weights = {}
    for tree in (params, batch_stats):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            name = name_of(path)
            weights[name] = torch_parity.weight(name, torch_shape(leaf))
    return weights


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18"])
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


@pytest.mark.parametrize("name", ["vgg16_bn norm first", "resnet50 imagenet"])
def test_logits_are_pytorchs(name):
    """Compares the other forms' logits alone: gradients take several times as long to compile."""
    network = torch_parity.our_network(name, dtype="float64", **torch_parity.narrow(name))
    images = torch_parity.examples(torch_parity.NETWORKS[name][2])[0]
    with jax.enable_x64(True):
        _, variables = shapes_of(network, 32)
        weights = torch_weights(variables["params"], variables["batch_stats"])
        variables = jax.tree_util.tree_map_with_path(
            lambda path, _: np.float64(from_torch(weights[name_of(path[1:])])), variables
        )
        logits = jax.jit(lambda *x: network.apply(*x, train=False)["logits"])(variables, images)
    assert torch_parity.relative(np.asarray(logits), np.asarray(GOLDEN[name]["logits"])) < 1e-5


def test_the_comparison_would_notice_a_wrong_order():
    """A negative control: the other order of BatchNorm and ReLU is not within the tolerance."""
    orders = [GOLDEN[name]["logits"] for name in ("vgg16_bn", "vgg16_bn norm first")]
    assert torch_parity.relative(*map(np.asarray, orders)) > 0.01
