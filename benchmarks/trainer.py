"""The whole training loop beside its bare compiled step, images per second.

    python -m benchmarks.trainer --clock cpu            # the quickstart's network; minutes
    python -m benchmarks.trainer --config configs/cifar10.py --dtype bfloat16     # on a GPU

An epoch (or --steps) of the loop of `train.fit`, with its log lines, TensorBoard events, checks of
what is finite, a checkpoint and the wait for it, against as many calls of the same compiled step,
nothing fetched and one wait at the end. Both take turns in one process, on made-up images of the
config's size that are on the device already. The evaluation of the calibration split, which is no
overhead but arithmetic, is left out of the ratio and shown beside it. The table has medians and the
tenth and ninetieth percentile over rounds.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import os
import runpy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from benchmarks import made_up
from benchmarks.step import CLOCKS, describe_machine, row
from sync_jax import train
from sync_jax.data import registry
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.profiling import Stopwatch
from sync_jax.trainer import resolve

Clock = Callable[[], float]


def bare(job: train.Job, clock: Clock) -> float:
    """Seconds of all steps, dispatched one after the other."""
    trainer = job.trainer
    state, _ = jax.block_until_ready(trainer.create_state())
    feed = trainer.feed(job.train_part, 0)
    began = clock()
    for _ in range(trainer.total_steps):
        state, _ = trainer.step(state, next(feed))
    jax.block_until_ready(state)
    return clock() - began


def whole(job: train.Job, clock: Clock) -> tuple[float, float]:
    """Seconds of the loop, and of the evaluation in it."""
    with (
        tempfile.TemporaryDirectory() as workdir,
        Checkpoints(Path(workdir) / "checkpoints", keep=3) as checkpoints,
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),  # a terminal's speed is not ours
    ):
        job = dataclasses.replace(job, workdir=Path(workdir), checkpoints=checkpoints)
        state, _ = jax.block_until_ready(job.trainer.create_state())
        began = clock()
        fitted = jax.block_until_ready(train.fit(job, train.Start(state, 0, [])))
        return clock() - began, fitted.seconds["evaluating"]


def rounds_of(job: train.Job, rounds: int, clock: Clock) -> Iterator[tuple[float, float, float]]:
    """Seconds bare, whole, and of the evaluation; in turn, in either order."""
    train.Stopwatch = functools.partial(Stopwatch, clock)  # type: ignore[misc]
    split = next(job.trainer.feed(job.train_part, 0))
    job.trainer.feed = lambda part, start: itertools.repeat(split)  # type: ignore[method-assign]
    for i in range(rounds + 1):
        first = bare(job, clock) if i % 2 else None
        both = whole(job, clock)
        if i:  # the first compiles
            yield first or bare(job, clock), *both


def main() -> None:
    """Prints the table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--width", type=int, default=0, help="of the network; 0: the config's")
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--steps", type=int, default=0, help="0: one epoch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    config = runpy.run_path(arguments.config)["get_config"]()
    config.model.dtype, config.data.placement = arguments.dtype, "device"
    if arguments.width:
        config.model.width = arguments.width
    batch = config.train.batch_size = arguments.batch or config.train.batch_size
    info = registry.dataset(config.data).info()
    assert info is not None
    train_size = info.num_train - config.data.calibration_size
    config.train.epochs = arguments.steps * batch / train_size if arguments.steps else 1.0
    config.optimizer.warmup_epochs = 0.0
    resolve(config)
    dataset = MemoryDataset(*made_up.images_and_labels(info, info.num_train, 1), info.class_names)
    clock = CLOCKS[arguments.clock]
    print(describe_machine())
    with (
        tempfile.TemporaryDirectory() as workdir,
        train.prepared(config, dataset, Path(workdir), Processes()) as job,
    ):
        steps = job.trainer.total_steps
        print(
            f"{Path(arguments.config).stem}: {config.model.name}, {steps} steps of {batch}, "
            f"{config.model.dtype}, {arguments.rounds} rounds, {arguments.clock} time on "
            f"{len(os.sched_getaffinity(0))} cores"
        )
        taken = np.asarray(list(rounds_of(job, arguments.rounds, clock)))
    alone, loop, evaluating = taken.T
    for name, seconds in {
        "bare step": alone,
        "whole, without evaluation": loop - evaluating,
        "whole": loop,
    }.items():
        low, median, high = np.percentile(batch * steps / seconds, (10, 50, 90))
        print(f"  {name:28} {median:10,.0f} images/s   {low:10,.0f} to {high:,.0f}")
    row("2  whole trainer / bare step, images per second", alone / (loop - evaluating))
    row("   with the evaluation of the calibration split", alone / loop)


if __name__ == "__main__":
    main()
