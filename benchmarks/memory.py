"""Peak memory: as the dataset grows tenfold, and of a run; and step time as classes grow.

    python -m benchmarks.memory                     # a few minutes
    python -m benchmarks.memory --network vgg16_bn --batch 128

Every case is a process of its own that builds a run on made-up images, takes some steps and tells
its peak resident memory (getrusage) and, where the device says, the most that it held. More classes
or examples are the only differences between the cases of a table. Step times take turns in one
process, see `benchmarks.step`.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np

from benchmarks.step import CLOCKS, INPUTS, describe_machine, our_step, our_trainer, take_turns
from sync_jax.data.resident import ResidentSplit
from sync_jax.data.splits import Part
from sync_jax.runtime.memory import aligned_empty, keep_freed_memory
from sync_jax.runtime.profiling import peak_device_bytes, peak_host_bytes, training_flops

_MARK = "memory: "


def child(network: str, batch: int, width: int, examples: int) -> None:
    """Takes some steps on so many images and prints what it needed."""
    keep_freed_memory()
    trainer = our_trainer(network, batch, examples, width=width, method="sync", augmented=True)
    images = aligned_empty((examples, *trainer.info.image_shape))
    images[:] = 127  # each page written, as reading a dataset does
    part = Part(images, np.zeros(examples, np.int32), np.arange(examples))
    state, _ = trainer.create_state()
    for data in itertools.islice(trainer.feed(part, 0), 5):
        state, _ = trainer.step(state, data)
    jax.block_until_ready(state)
    found = {"host": peak_host_bytes(), "device": peak_device_bytes(), "data": images.nbytes}
    print(_MARK + json.dumps(found), flush=True)
    os._exit(0)


def measure(network: str, batch: int, width: int, examples: int) -> dict[str, Any]:
    """What such a process needed, in bytes."""
    command = [
        *(sys.executable, "-m", "benchmarks.memory", "--child", f"--network={network}"),
        *(f"--batch={batch}", f"--width={width}", f"--examples={examples}"),
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    line = next(x for x in done.stdout.splitlines() if x.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))


def megabytes(count: float | None) -> str:
    """A column of the table."""
    return "  not told" if count is None else f"{count / 1e6:10,.0f}"


def growth(network: str, batch: int, width: int, examples: int) -> None:
    """Prints the table of datasets."""
    print(f"{network}, batch {batch}: peak memory in MB, by training images, after five steps")
    print(f"{'images':>12} {'their bytes':>12} {'host':>10} {'device':>10}")
    results = []
    for count in (examples, 10 * examples):
        found = measure(network, batch, width, count)
        results.append(found)
        print(
            f"{count:12,} {megabytes(found['data']):>12} {megabytes(found['host'])} "
            f"{megabytes(found['device'])}",
            flush=True,
        )
    small, large = results
    data = large["data"] - small["data"]
    grown = large["host"] - small["host"]
    print(f"  4  growth of the host / of the data: {grown / data:.2f}   (wanted: at most 1)")


def classes(network: str, batch: int, width: int, rounds: int, clock: str) -> None:
    """Prints step time by the number of classes, beside the last layer's arithmetic."""
    pixels, channels, _ = INPUTS[network]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2000, pixels, pixels, channels), np.uint8)
    split = jax.device_put(ResidentSplit(images, rng.integers(0, 10, 2000, np.int32)))
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    counts = (10, 100, 1000)
    trainers = {
        n: our_trainer(network, batch, 2000, dtype=dtype, width=width, method="sync", classes=n)
        for n in counts
    }
    cases = {str(n): our_step(trainer, split) for n, trainer in trainers.items()}
    taken = take_turns(cases, rounds, 0.2, CLOCKS[clock])
    flops = {
        n: training_flops(trainer.settings.network, trainer.info.image_shape)
        for n, trainer in trainers.items()
    }
    print(f"{network}, batch {batch}, sync: step time / that of 10 classes, {clock} time")
    for n in counts:
        low, median, high = np.percentile(taken[str(n)] / taken["10"], (10, 50, 90))
        print(
            f"{n:12,} classes  {median:7.3f}   {low:7.3f} to {high:7.3f}   "
            f"{flops[n] / flops[10]:.3f} by FLOP"
        )


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--network", choices=INPUTS, default="cnn")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=0, help="of the network; 0: its own")
    parser.add_argument("--examples", type=int, default=60_000, help="and ten times as many")
    parser.add_argument(
        "--tables", nargs="+", choices=("growth", "classes"), default=["growth", "classes"]
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    network, batch, width = arguments.network, arguments.batch, arguments.width
    if arguments.child:
        child(network, batch, width, arguments.examples)
        return
    keep_freed_memory()
    # The children first: this process would hold the device.
    if "growth" in arguments.tables:
        growth(network, batch, width, arguments.examples)
    print(describe_machine())
    if "classes" in arguments.tables:
        classes(network, batch, width, arguments.rounds, arguments.clock)


if __name__ == "__main__":
    main()
