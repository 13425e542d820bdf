"""The log of a training: metrics from the device to console, metrics.jsonl and TensorBoard."""

import contextlib
import math
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import jax
import numpy as np

from sync_jax.runtime.nonfinite import NonFiniteSteps
from sync_jax.runtime.progress import MetricWriter, Progress

# The host is at most so many steps ahead of the device: it never waits for its own newest step,
# and SIGTERM waits for no more than these.
_AHEAD = 2
Entry = tuple[int, dict[str, float]]


class StepMetrics(Protocol):
    """Metrics of a step, on the device until they are fetched."""

    values: Any

    def fetch(self) -> dict[str, float]:
        """The metrics by name; waits for the device."""


class TrainingLog:
    """Averages metrics over some steps, and shows and writes them. A context manager.

    Attributes:
        unlogged: metrics by step that no line has averaged yet, for a checkpoint.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        every: int,
        start_step: int,
        total_steps: int,
        batch_size: int,
        unlogged: list[Entry],
        bad_steps: NonFiniteSteps,
        writes: bool,
    ):
        """Opens nothing before it is entered.

        Args:
            workdir: exists.
            every: steps between two lines.
            start_step: steps done, of `total_steps`.
            total_steps: of the run.
            batch_size: examples of a step.
            unlogged: of a checkpoint.
            bad_steps: is told of steps that are not finite.
            writes: True for the one process that shows and writes.
        """
        self.unlogged = list(unlogged)
        self._every, self._bad_steps = every, bad_steps
        self._next_line = (start_step // every + 1) * every
        self._newest: deque[StepMetrics] = deque()
        self._unchecked: list[tuple[int, StepMetrics]] = []
        self._progress = Progress(
            total_steps=total_steps, start_step=start_step, batch_size=batch_size, shown=writes
        )
        self._open: Callable[[], MetricWriter] | None = None
        if writes:
            self._open = lambda: MetricWriter(workdir, start_step=start_step)
        self._writer: MetricWriter | None = None
        self._stack = contextlib.ExitStack()

    def is_device_busy(self) -> bool:
        """True if the newest step is not done yet."""
        return bool(self._newest) and not self._newest[-1].values.is_ready()

    def add(self, step: int, metrics: StepMetrics) -> Any:
        """Takes a step's metrics; waits for the step before the last two, and returns its own."""
        self._unchecked.append((step, metrics))
        self._progress.step(step)
        self._newest.append(metrics)
        if len(self._newest) <= _AHEAD:
            return None
        oldest = self._newest.popleft()
        jax.block_until_ready(oldest)
        return oldest

    def update(self, step: int, *, wait: bool, last: bool = False) -> None:
        """Fetches the metrics that are due, and writes the lines.

        Args:
            step: the newest that was added, and of the run if `last`.
            wait: True to fetch its metrics too, which waits for the device: nothing that is not
                finite is evaluated or saved.
            last: see step.

        Raises:
            NonFiniteError: a step was not finite, and the run has to stop.
        """
        if not wait and step < self._next_line:
            return
        ready = len(self._unchecked) if wait else len(self._unchecked) - 1
        self._check(self._unchecked[:ready])
        self._unchecked = self._unchecked[ready:]
        # A line has the steps before its own; the run's last line has its own too.
        checked = step if wait else step - 1
        while self._next_line <= min(step, checked + 1) and not (self._next_line == step and last):
            self._line(self._next_line, before=self._next_line)
            self._next_line += self._every
        if last:
            self._line(step, before=step + 1)

    def _check(self, entries: list[tuple[int, StepMetrics]]) -> None:
        """Fetches metrics; those of steps that were not finite are noted, and left out."""
        for _, metrics in entries:  # all copies are under way before the first is waited for
            metrics.values.copy_to_host_async()
        for step, metrics in entries:
            values = metrics.fetch()
            if all(map(math.isfinite, values.values())):
                self.unlogged.append((step, values))
            else:
                self._bad_steps.meet(step, values)

    def _line(self, step: int, *, before: int) -> None:
        entries = [values for done, values in self.unlogged if done < before]
        self.unlogged = [entry for entry in self.unlogged if entry[0] >= before]
        if entries:
            averages = {name: float(np.mean([x[name] for x in entries])) for name in entries[0]}
            self._write(step, "train", averages)
            self._progress.metrics(step, averages)

    def calibration(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Shows and writes metrics of the calibration split."""
        self._write(step, "calibration", values)
        selection = ""
        if "mean_selection" in values:
            selection = f"  mean g {values['mean_selection']:.3f}"
        self._progress.line(
            f"epoch {epoch:.1f} (step {step}): calibration accuracy {values['accuracy']:.4f}"
            f"{selection}"
        )

    def flush(self) -> None:
        """Makes sure that all lines are on the disk: before a checkpoint that follows them is."""
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int, part: str, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, part, values)

    def __enter__(self) -> "TrainingLog":
        with contextlib.ExitStack() as stack:
            if self._open is not None:
                self._writer = stack.enter_context(self._open())
            stack.enter_context(self._progress)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
