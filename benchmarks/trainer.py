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
import itertools
import os
import runpy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import made_up
from benchmarks.step import CLOCKS, describe_machine, row
from sync_jax import train
from sync_jax.config import validate
from sync_jax.data import registry
from sync_jax.data.placement import Placement
from sync_jax.data.splits import Part, calibration_size
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.runtime.processes import Processes
from sync_jax.trainer import Run


def parts_of(run: Run) -> tuple[Part, Part]:
    """A training and a calibration part of made-up images."""
    data = run.config.data
    held_out = calibration_size(data, run.info.num_train)
    images, labels = made_up.images_and_labels(data.name, run.train_size + held_out, 1)
    labels, index = labels.astype(np.int32), np.arange(len(labels))
    first, rest = slice(run.train_size), slice(run.train_size, None)
    return tuple(Part(images[x], labels[x], index[x]) for x in (first, rest))  # type: ignore[return-value]


class Trainer:
    """A run on made-up images, and what it takes to go through it."""

    def __init__(self, config: Any, train_size: int, clock: Callable[[], float]):
        """Puts the images on the device; nothing is compiled yet."""
        self.run = Run(config, sharding.make_mesh(), train_size=train_size, placement=Placement())
        self.parts = parts_of(self.run)
        split = next(self.run.feed(self.parts[0], 0))
        self.run.feed = lambda part, start: itertools.repeat(split)  # type: ignore[method-assign]
        self.clock, self.evaluating = clock, 0.0
        evaluate = self.run.calibration_metrics

        def timed(*arguments: Any) -> dict[str, float]:
            began = clock()
            try:
                return evaluate(*arguments)
            finally:
                self.evaluating += clock() - began

        self.run.calibration_metrics = timed  # type: ignore[method-assign]

    def bare(self) -> float:
        """Seconds of all steps, dispatched one after the other."""
        state = jax.block_until_ready(self.run.create_state())
        feed = self.run.feed(self.parts[0], 0)
        began = self.clock()
        for _ in range(self.run.total_steps):
            state, _ = self.run.step(state, next(feed))
        jax.block_until_ready(state)
        return self.clock() - began

    def whole(self) -> tuple[float, float]:
        """Seconds of the loop, and of the evaluation in it."""
        config, processes = self.run.config, Processes()
        self.evaluating = 0.0
        with tempfile.TemporaryDirectory() as temporary:
            workdir = Path(temporary)
            with (
                Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints,
                open(os.devnull, "w") as nowhere,
                silenced(nowhere),
            ):
                job = train.Job(
                    self.run, *self.parts, workdir, processes, checkpoints, lambda: False
                )
                state = jax.block_until_ready(self.run.create_state())
                began = self.clock()
                jax.block_until_ready(train.fit(job, train.Start(state, 0, [])).state)
                return self.clock() - began, self.evaluating


def silenced(nowhere: Any) -> Any:
    """Log lines are written, but to nowhere: a terminal's speed is not ours."""
    import contextlib

    return contextlib.redirect_stdout(nowhere)


def rounds_of(trainer: Trainer, rounds: int) -> Iterator[tuple[float, float, float]]:
    """Seconds bare, whole, and of the evaluation; in turn, in either order."""
    for i in range(rounds + 1):
        if i % 2:
            bare, (whole, evaluating) = trainer.bare(), trainer.whole()
        else:
            whole, evaluating = trainer.whole()
            bare = trainer.bare()
        if i:  # the first compiles
            yield bare, whole, evaluating


def main() -> None:
    """Prints the table."""
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--width", type=int, default=-1, help="of the network; -1: the config's")
    parser.add_argument("--batch", type=int, default=0, help="0: the config's")
    parser.add_argument("--steps", type=int, default=0, help="0: one epoch")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    config = runpy.run_path(arguments.config)["get_config"]()
    config.model.dtype = arguments.dtype
    config.model.width = config.model.width if arguments.width < 0 else arguments.width
    config.train.batch_size = arguments.batch or config.train.batch_size
    info = registry.dataset(config.data).info()
    assert info is not None
    train_size = info.num_train - calibration_size(config.data, info.num_train)
    steps = arguments.steps or -(-train_size // config.train.batch_size)
    config.train.epochs = steps * config.train.batch_size / train_size
    config.optimizer.warmup_epochs = 0.0
    validate(config)
    trainer = Trainer(config, train_size, CLOCKS[arguments.clock])
    print(describe_machine())
    batch, steps = config.train.batch_size, trainer.run.total_steps
    print(
        f"{Path(arguments.config).stem}: {config.model.name}, {steps} steps of {batch}, "
        f"{config.model.dtype}, {arguments.rounds} rounds, {arguments.clock} time on "
        f"{len(os.sched_getaffinity(0))} cores"
    )
    taken = np.asarray(list(rounds_of(trainer, arguments.rounds)))
    bare, whole, evaluating = taken.T
    for name, seconds in {
        "bare step": bare,
        "whole, without evaluation": whole - evaluating,
        "whole": whole,
    }.items():
        low, median, high = np.percentile(batch * steps / seconds, (10, 50, 90))
        print(f"  {name:28} {median:10,.0f} images/s   {low:10,.0f} to {high:,.0f}")
    row("2  whole trainer / bare step, images per second", bare / (whole - evaluating))
    row("   with the evaluation of the calibration split", bare / whole)


if __name__ == "__main__":
    main()
