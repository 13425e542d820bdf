"""Our networks beside the same ones of PyTorch's own layers, with the same weights.

    pip install torch                          # the CPU build does
    python benchmarks/torch_parity.py          # prints the table; exit status 1 beyond a tolerance
    python benchmarks/torch_parity.py --golden tests/models/torch_golden.json

Logits are compared in evaluation mode, float32; gradients of the mean cross-entropy in training
mode (BatchNorm by the batch, no dropout), float64. In float32 a rounding error that lifts a unit
over zero switches its gradient on, so either library's gradient is some 1e-3 to 1e-2 from its own
in float64; the last two columns are these distances. All on the CPU. The second form writes what
PyTorch gives for narrow networks: the tests compare with it where there is no PyTorch.
"""

import argparse
import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save_file

from sync_jax.models.heads import SelectiveNetwork
from sync_jax.models.pretrained import load_pretrained
from sync_jax.models.resnet import RESNETS, ResNet
from sync_jax.models.vgg import LAYERS, VGG16

LOGITS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-6
CLASSES, BATCH = 10, 32
# Name: backbone, what differs from its defaults, pixels.
NETWORKS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vgg16_bn": ("vgg16_bn", {}, 32),
    "vgg16_bn norm first": ("vgg16_bn", {"norm_first": True}, 32),
    "resnet18": ("resnet18", {}, 32),
    "resnet34": ("resnet34", {}, 32),
    "resnet50": ("resnet50", {}, 32),
    "resnet18 imagenet": ("resnet18", {"stem": "imagenet"}, 96),
    "resnet34 imagenet": ("resnet34", {"stem": "imagenet"}, 96),
    "resnet50 imagenet": ("resnet50", {"stem": "imagenet"}, 96),
}

# Those that the tests compare with: every kind of block and both stems.
GOLDEN = ("vgg16_bn", "vgg16_bn norm first", "resnet18", "resnet50 imagenet")


def uniform(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [-1/2, 1/2) that a name and a shape determine, on any machine."""
    x = np.arange(int(np.prod(shape)), dtype=np.uint32) + np.uint32(zlib.crc32(name.encode()))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return ((x ^ (x >> np.uint32(16))) / 2.0**32 - 0.5).reshape(shape).astype(np.float32)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A plausible value for an array of torchvision's names and layouts."""
    x = uniform(name, shape)
    if len(shape) > 1:
        return x * np.float32(np.sqrt(24.0 / np.prod(shape[1:])))
    if name.endswith("weight"):
        return 1 + x / 5
    return 1 + x / 2 if name.endswith("running_var") else x / 5


def examples(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `[batch, pixels, pixels, 3]` and labels `[batch]`.

    Coarse patterns under some noise. Noise alone gives all images the same features in the end, and
    BatchNorm then divides by next to nothing, which magnifies rounding.
    """
    coarse = uniform("coarse", (BATCH, 4, 4, 3)).repeat(pixels // 4, 1).repeat(pixels // 4, 2)
    images = 4 * coarse + uniform("noise", (BATCH, pixels, pixels, 3))
    return images, np.arange(BATCH, dtype=np.int32) * 3 % CLASSES


def our_network(name: str, **changes: Any) -> SelectiveNetwork:
    """Without dropout, which no two libraries draw alike."""
    backbone, fields, _ = NETWORKS[name]
    fields = fields | changes
    if backbone in RESNETS:
        stages, bottleneck = RESNETS[backbone]
        return SelectiveNetwork(ResNet(stages, bottleneck, **fields), CLASSES)
    return SelectiveNetwork(VGG16(conv_dropout=False, last_dropout=0.0, **fields), CLASSES)


def ours(
    name: str, weights_of: Any, *, dtype: str = "float32", **changes: Any
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits in evaluation and gradients in training, of our network.

    Args:
        name: a key of `NETWORKS`.
        weights_of: given the initial params and batch_stats, the arrays by torchvision's names.
        dtype: of the parameters and the arithmetic up to the class head; float64 needs
            `jax.enable_x64`.
        changes: see `our_network`.

    Returns:
        `[batch, classes]`, and gradients by our names, joined by dots.
    """
    network = our_network(name, dtype=dtype, **changes)
    images, labels = examples(NETWORKS[name][2])
    images = images.astype(dtype)
    initial = jax.jit(lambda: network.init(jax.random.key(0), images[:1], train=False))()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_file(weights_of(initial["params"], initial["batch_stats"]), path)
        params, batch_stats, message = load_pretrained(
            path, initial["params"], initial["batch_stats"]
        )
    if ";" in message:
        raise ValueError(message)
    params, batch_stats = jax.tree.map(lambda x: x.astype(dtype), (params, batch_stats))

    def loss(params: Any) -> jax.Array:
        outputs, _ = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], labels)
        return jnp.mean(losses)

    variables = {"params": params, "batch_stats": batch_stats}
    logits = jax.jit(lambda v: network.apply(v, images, train=False)["logits"])(variables)
    gradients = jax.jit(jax.grad(loss))(params)
    flat = jax.tree_util.tree_flatten_with_path(gradients)[0]
    return np.asarray(logits), {
        ".".join(key.key for key in path): np.asarray(value) for path, value in flat
    }


def torch_network(name: str, width: int = 64, features: int = 512) -> Any:
    """The same network of PyTorch's layers, its arrays under torchvision's names."""
    import torch
    from torch import nn

    backbone, fields, _ = NETWORKS[name]

    class TorchBlock(nn.Module):
        def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool):
            super().__init__()
            shapes = (
                [(1, 1, 1), (1, 3, stride), (4, 1, 1)]
                if bottleneck
                else [(1, 3, stride), (1, 3, 1)]
            )
            size = inputs
            for i, (factor, kernel, step) in enumerate(shapes, 1):
                convolution = nn.Conv2d(
                    size, factor * channels, kernel, step, kernel // 2, bias=False
                )
                size = factor * channels
                setattr(self, f"conv{i}", convolution)
                setattr(self, f"bn{i}", nn.BatchNorm2d(size))
            self.layers = len(shapes)
            self.downsample = None
            if stride > 1 or inputs != size:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, size, 1, stride, bias=False), nn.BatchNorm2d(size)
                )

        def forward(self, x: Any) -> Any:
            y = x
            for i in range(1, self.layers + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = torch.relu(y) if i < self.layers else y
            return torch.relu(y + (x if self.downsample is None else self.downsample(x)))

    class TorchResNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stages, bottleneck = RESNETS[backbone]
            self.wide_stem = fields.get("stem") == "imagenet"
            kernel, stride = (7, 2) if self.wide_stem else (3, 1)
            self.conv1 = nn.Conv2d(3, width, kernel, stride, kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            size = width
            for stage, blocks in enumerate(stages):
                layer = []
                for block in range(blocks):
                    channels = width * 2**stage
                    step = 2 if stage and not block else 1
                    layer.append(TorchBlock(size, channels, step, bottleneck))
                    size = channels * (4 if bottleneck else 1)
                setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
            self.fc = nn.Linear(size, CLASSES)

        def forward(self, x: Any) -> Any:
            x = torch.relu(self.bn1(self.conv1(x)))
            if self.wide_stem:
                x = nn.functional.max_pool2d(x, 3, 2, 1)
            for stage in range(1, 5):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean(dim=(2, 3)))

    class TorchVGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Module()
            size, index = 3, 0
            self.plan: list[int | None] = []
            for layer in LAYERS:
                if isinstance(layer, str):
                    self.plan.append(None)
                    index += 1
                    continue
                channels = layer[0] * width
                self.features.add_module(str(index), nn.Conv2d(size, channels, 3, padding=1))
                self.features.add_module(str(index + 1), nn.BatchNorm2d(channels))
                self.plan.append(index)
                size, index = channels, index + 3
            self.dense = nn.Linear(size, features)
            self.dense_norm = nn.BatchNorm1d(features)
            self.fc = nn.Linear(features, CLASSES)

        def forward(self, x: Any) -> Any:
            def norm_relu(norm: Any, x: Any) -> Any:
                return torch.relu(norm(x)) if fields.get("norm_first") else norm(torch.relu(x))

            for index in self.plan:
                if index is None:
                    x = nn.functional.max_pool2d(x, 2)
                else:
                    x = getattr(self.features, str(index))(x)
                    x = norm_relu(getattr(self.features, str(index + 1)), x)
            return self.fc(norm_relu(self.dense_norm, self.dense(x.flatten(1))))

    return TorchResNet() if backbone in RESNETS else TorchVGG()


def theirs(
    name: str, *, dtype: str = "float32", **changes: Any
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Logits, gradients by torchvision's names, and the weights that gave them."""
    import torch

    network = torch_network(name, **changes)
    weights = {
        key: weight(key, tuple(value.shape))
        for key, value in network.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    network.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()}, strict=False)
    network = network.to(getattr(torch, dtype))
    images, labels = examples(NETWORKS[name][2])
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(dtype))
    with torch.no_grad():
        logits = network.eval()(x).numpy()
    loss = torch.nn.functional.cross_entropy(network.train()(x), torch.from_numpy(labels).long())
    loss.backward()
    gradients = {key: value.grad.numpy() for key, value in network.named_parameters()}
    return logits, gradients, weights


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two arrays over the length of the second."""
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def main() -> int:
    """Prints the table or writes the golden values."""
    from sync_jax.models.pretrained import from_torch, torch_name

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", type=Path)
    golden_path = parser.parse_args().golden
    if golden_path:
        golden = {}
        for name in GOLDEN:
            logits, gradients, _ = theirs(name, dtype="float64", **narrow(name))
            golden[name] = {
                "logits": logits.tolist(),
                "gradients": {
                    k: [float(x) for x in fingerprint(k, g)] for k, g in gradients.items()
                },
            }
        golden_path.write_text(json.dumps(golden) + "\n")
        return 0
    failed = False
    print(f"{'':20} {'ours - PyTorch, relative':^24}   {'gradient, float32 - float64':^28}")
    print(f"{'network':20} {'logits':>10} {'gradient':>13}   {'ours':>13} {'PyTorch':>14}")
    for name in NETWORKS:
        logits, gradients32, weights = theirs(name)
        _, gradients64, _ = theirs(name, dtype="float64")
        our_logits, ours32 = ours(name, lambda *_, w=weights: w)
        with jax.enable_x64(True):
            _, ours64 = ours(name, lambda *_, w=weights: w, dtype="float64")
        theirs32, theirs64 = (
            {k: from_torch(g[torch_name(k.split("."))]) for k in ours64}
            for g in (gradients32, gradients64)
        )
        row = [
            relative(our_logits, logits),
            *(
                relative(*(np.concatenate([g[k].ravel() for k in ours64]) for g in pair))
                for pair in ((ours64, theirs64), (ours32, ours64), (theirs32, theirs64))
            ),
        ]
        print(f"{name:20} {row[0]:10.1e} {row[1]:13.1e}   {row[2]:13.1e} {row[3]:14.1e}")
        failed |= row[0] > LOGITS_TOLERANCE or row[1] > GRADIENT_TOLERANCE
    return int(failed)


def narrow(name: str) -> dict[str, int]:
    """Fields of the networks that the golden values are of."""
    return {"width": 4} | ({} if NETWORKS[name][0] in RESNETS else {"features": 16})


def fingerprint(name: str, gradient: np.ndarray) -> tuple[float, float]:
    """The length of an array and its product with a pseudo-random one; layout as torchvision's."""
    return float(np.linalg.norm(gradient)), float(np.sum(gradient * uniform(name, gradient.shape)))


if __name__ == "__main__":
    sys.exit(main())
