"""How long a training step takes, as ratios: beside plain ce, other settings, and PyTorch.

    python benchmarks/step.py                       # cnn and VGG16-BN; on a GPU ResNets too
    python benchmarks/step.py --quick               # narrow networks, a minute: does it run?
    python benchmarks/step.py --networks vgg16_bn --batch 128 --rounds 40

A step draws the batch out of uint8 images on the device, normalises, goes forward and back, and
updates by SGD with momentum and weight decay. All cases of a network and batch size take turns, a
step or a few each, in one process, so that what else the machine does meets all of them alike; a
ratio is of neighbours within a round, and the table has the median and the tenth and ninetieth
percentile over rounds. PyTorch, where it is installed, trains the same layers on the same images
with the same dropout rates, threads and precision, the faster of its two layouts; on a GPU compiled
by torch.compile, channels last, bfloat16 by autocast.
"""

import argparse
import datetime
import functools
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.torch_parity import torch_network
from sync_jax.config import default_config
from sync_jax.data.info import DatasetInfo
from sync_jax.data.resident import ResidentSplit
from sync_jax.models.vgg import LAYERS
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.profiling import training_flops
from sync_jax.runtime.sharding import make_mesh
from sync_jax.trainer import Trainer, resolve

EXAMPLES = 10_000
# Name: pixels, channels, stem.
INPUTS = {
    "cnn": (28, 1, "cifar"),
    "vgg16_bn": (32, 3, "cifar"),
    "resnet18": (32, 3, "cifar"),
    "resnet34": (32, 3, "cifar"),
    "resnet50": (224, 3, "imagenet"),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEAN, STD = 0.5, 0.25  # of every channel
Step = Callable[[], Any]  # does one and waits for it


def images_and_labels(name: str, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Random pixels `[n, height, width, channels]` uint8 and labels `[n]` of ten classes."""
    pixels, channels, _ = INPUTS[name]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (examples, pixels, pixels, channels), np.uint8)
    return images, rng.integers(0, 10, examples, np.int32)


def our_trainer(
    name: str,
    batch: int,
    examples: int,
    *,
    dtype: str = "float32",
    width: int = 0,
    method: str = "ce",
    classes: int = 10,
    augmented: bool = False,
) -> Trainer:
    """A trainer for one device; width 0 is the network's own."""
    pixels, channels, stem = INPUTS[name]
    config = default_config()
    config.method, config.train.batch_size = method, batch
    config.model.name, config.model.stem, config.model.dtype = name, stem, dtype
    if width:
        config.model.width = width
    config.data.crop_padding, config.data.flip = (4, True) if augmented else (0, False)
    config.optimizer.learning_rate, config.loss.warmup_epochs = 1e-3, 0.0
    resolve(config)
    info = DatasetInfo(
        name="made up",
        num_classes=classes,
        image_shape=(pixels, pixels, channels),
        class_names=tuple(map(str, range(classes))),
        mean=(MEAN,) * channels,
        std=(STD,) * channels,
        num_train=examples,
        num_test=0,
    )
    return Trainer(config, make_mesh(jax.devices()[:1]), info, train_size=examples)


def our_step(trainer: Trainer, split: ResidentSplit) -> Step:
    """A training step of ours."""
    state, _ = trainer.create_state()

    def run() -> None:
        nonlocal state
        state, metrics = trainer.step(state, split)
        jax.block_until_ready(metrics)

    return run


def layers_of_torch(name: str, channels: int, width: int) -> Any:
    """The same network of PyTorch's layers, dropout included, for ten classes."""
    from torch import nn as tnn

    if name == "cnn":
        width = width or 32
        layers: list[Any] = []
        for inputs, outputs, kernel, stride in (
            (channels, width, 5, 2), (width, 2 * width, 3, 1), (2 * width, 4 * width, 3, 1)
        ):  # fmt: skip
            layers += [tnn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)]
            layers += [tnn.BatchNorm2d(outputs), tnn.ReLU()]
            layers += [tnn.MaxPool2d(2)] if stride == 1 else []
        dense = [tnn.Linear(9 * 4 * width, 256, bias=False), tnn.BatchNorm1d(256), tnn.ReLU()]
        return tnn.Sequential(*layers, tnn.Flatten(), *dense, tnn.Linear(256, 10))
    if name == "vgg16_bn":
        width, inputs = width or 64, channels
        layers = []
        for layer in LAYERS:
            if isinstance(layer, str):
                layers += [tnn.MaxPool2d(2)]
                continue
            factor, rate = layer
            layers += [tnn.Conv2d(inputs, factor * width, 3, padding=1)]
            layers += [tnn.ReLU(), tnn.BatchNorm2d(factor * width)]
            layers += [tnn.Dropout2d(rate)] if rate else []
            inputs = factor * width
        dense = [tnn.Linear(inputs, 512), tnn.ReLU(), tnn.BatchNorm1d(512), tnn.Dropout(0.5)]
        return tnn.Sequential(*layers, tnn.Flatten(), *dense, tnn.Linear(512, 10))
    parity_name = f"{name} imagenet" if INPUTS[name][2] == "imagenet" else name
    return torch_network(parity_name, width or 64)


def torch_step(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    batch: int,
    *,
    width: int,
    gpu: bool,
    channels_last: bool,
) -> Step:
    """A training step of PyTorch, of the same arithmetic."""
    import torch

    device = torch.device("cuda" if gpu else "cpu")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = layers_of_torch(name, images.shape[-1], width).to(device, memory_format=layout)
    network.train()
    forward = torch.compile(network) if gpu else network
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    all_images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    all_labels = torch.from_numpy(labels).long().to(device)

    def run() -> None:
        index = torch.randint(len(all_labels), (batch,), device=device)
        x = (all_images[index].float() / 255 - MEAN) / STD
        x = x.contiguous(memory_format=layout)
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            logits = forward(x)
        loss = torch.nn.functional.cross_entropy(logits.float(), all_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return run


def matmul_step(size: int, dtype: str) -> Step:
    """A square matrix product, the arithmetic that the machine can do."""
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(lambda a: a @ a)
    return lambda: jax.block_until_ready(product(a))


def take_turns(
    cases: dict[str, Step], rounds: int, seconds: float, clock: Callable[[], float]
) -> dict[str, np.ndarray]:
    """Seconds of a step of each case in each round; all in turn, in either direction.

    Args:
        cases: by name; each is run twice first, which compiles it.
        rounds: how many.
        seconds: that a case is to run for in each round, but at least one step.
        clock: of wall-clock or of processor time.
    """
    repeats = {}
    for name, step in cases.items():
        step()
        start = clock()
        step()
        repeats[name] = max(round(seconds / (clock() - start)), 1)
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(rounds):
        for name in list(cases)[:: 1 if i % 2 else -1]:
            start = clock()
            for _ in range(repeats[name]):
                cases[name]()
            taken[name].append((clock() - start) / repeats[name])
    return {name: np.asarray(values) for name, values in taken.items()}


def row(label: str, ratio: np.ndarray | None, note: str = "") -> None:
    """Prints a ratio's median and spread over rounds."""
    if ratio is None:
        print(f"  {label:44} not measured  {note}")
        return
    low, median, high = np.percentile(ratio, (10, 50, 90))
    print(f"  {label:44} {median:7.3f}   {low:7.3f} to {high:7.3f}   {note}", flush=True)


def measure(name: str, batch: int, arguments: argparse.Namespace) -> None:
    """Prints the table of one network and batch size."""
    gpu = jax.default_backend() != "cpu"
    width = 8 if arguments.quick else 0
    dtype = "bfloat16" if gpu else "float32"
    images, labels = images_and_labels(name, EXAMPLES // (10 if INPUTS[name][0] > 32 else 1))
    split = jax.device_put(ResidentSplit(images, labels))
    ours = functools.partial(our_trainer, name, batch, len(labels), dtype=dtype, width=width)
    size = 8192 if gpu else 2048
    trainers = {
        "ce": ours(),
        "sync": ours(method="sync"),
        "augmented": ours(augmented=True),
        "1000 classes": ours(classes=1000),
    }
    if gpu:
        trainers["float32"] = ours(dtype="float32")
    cases = {case: our_step(trainer, split) for case, trainer in trainers.items()}
    cases["matmul"] = matmul_step(size, dtype)
    theirs = functools.partial(torch_step, name, images, labels, batch, width=width, gpu=gpu)
    if torch_is_there(gpu):
        cases["torch channels last"] = theirs(channels_last=True)
        if not gpu:
            cases["torch"] = theirs(channels_last=False)
    taken = take_turns(cases, arguments.rounds, arguments.seconds, CLOCKS[arguments.clock])
    ce = taken["ce"]
    flops, flops_of_1000 = (
        training_flops(trainers[case].settings.network, split.images.shape[1:])
        for case in ("ce", "1000 classes")
    )
    print(
        f"\n{name}, batch {batch}, {dtype}, {split.images.shape[1:]}, {arguments.rounds} rounds, "
        f"{arguments.clock} time on {len(os.sched_getaffinity(0))} cores"
    )
    for case, values in taken.items():
        low, median, high = np.percentile(values, (10, 50, 90)) * 1e3
        rate = "" if case == "matmul" else f"{batch / median * 1e3:10,.0f} images/s"
        print(f"  {case:24} {median:9.2f} ms   {low:9.2f} to {high:9.2f} {rate}")
    row("1  sync / ce", taken["sync"] / ce)
    row("3  augmented / not", taken["augmented"] / ce)
    faster = [values for case, values in taken.items() if case.startswith("torch")]
    best = min(faster, key=np.median) if faster else None
    row("5  our images per second / PyTorch's", None if best is None else best / ce)
    share = flops * batch / ce / (2 * size**3 / taken["matmul"])
    row("6  model FLOP/s / matmul FLOP/s", share, f"{flops / 1e6:,.0f} MFLOP an image")
    row("7  float32 step / bfloat16 step", taken["float32"] / ce if gpu else None)
    expected = f"{flops_of_1000 / flops:.3f} by FLOP"
    row("   1,000 classes / 10", taken["1000 classes"] / ce, expected)


def torch_is_there(gpu: bool) -> bool:
    """Whether PyTorch can be measured beside us."""
    try:
        import torch
    except ImportError:
        return False
    return not gpu or torch.cuda.is_available()


def describe_machine() -> str:
    """What the figures were measured on."""
    device = jax.devices()[0]
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    if "torch" in sys.modules:
        versions += f", torch {sys.modules['torch'].__version__}"
    processor = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(":")[1] for x in lines if x.startswith("model name")), "")
    settings = [f"{k}={os.environ[k]}" for k in ("GLIBC_TUNABLES", "XLA_FLAGS") if k in os.environ]
    return (
        f"{datetime.date.today()}, {device.device_kind}, {os.cpu_count()} cores of{processor}, "
        f"load {os.getloadavg()[0]:.1f}, {versions} {' '.join(settings)}"
    )


def main() -> None:
    """Prints the tables."""
    if "--default-malloc" not in sys.argv:
        keep_freed_memory()  # before anything starts a backend
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    gpu = jax.default_backend() != "cpu"
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=INPUTS,
        default=list(INPUTS) if gpu else ["cnn", "vgg16_bn"],
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 1024] if gpu else [128])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a case in a round")
    parser.add_argument(
        "--default-malloc", action="store_true", help="do not keep freed memory; for CPUs"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on one core that other work shares"
    )
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.batch = 3, [32]
    print(describe_machine())
    for name in arguments.networks:
        for batch in arguments.batch:
            measure(name, batch, arguments)


if __name__ == "__main__":
    main()
