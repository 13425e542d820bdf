"""The log of a training: console, metrics.jsonl, TensorBoard, and the steps that are not finite."""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from sync_jax.errors import InputError, NonFiniteError, WriteError
from sync_jax.runtime.files import write_text
from sync_jax.runtime.processes import Processes

# The host is at most so many steps ahead of the device: it never waits for its own newest step,
# and SIGTERM waits for no more than these.
_AHEAD = 2
_TIMED = 10  # steps from which the time of a training is estimated
_BEGINNING = b'{"step": '  # of a line of metrics.jsonl
_ACTIONS = ("stop", "skip", "rollback")  # the last one is in notes of version 0.1 alone


class TrainingLog(contextlib.ExitStack):
    """Averages metrics over some steps, and shows and writes them. A context manager.

    `unlogged` has the metrics by step that no line has averaged yet, for a checkpoint.
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, *, start_step: int, total_steps: int,
        unlogged: list[tuple[int, dict[str, float]]], indices: Callable[[int], np.ndarray],
        processes: Processes, advice: Callable[[float], str] = lambda seconds: "",
    ):  # fmt: skip
        """Opens the files.

        `unlogged` is of a checkpoint, `indices` gives a step's examples, and `advice` a few words
        on a training that takes so many seconds.
        """
        super().__init__()
        self.unlogged = list(unlogged)
        self._bad_steps = NonFiniteSteps(
            workdir, config, start_step=start_step, indices=indices, processes=processes
        )
        self._every = config.log.every_steps
        self._next_line = (start_step // self._every + 1) * self._every
        self._newest: deque[Any] = deque()
        self._unchecked: list[tuple[int, Any]] = []
        self._writer = None
        if processes.first:
            self._writer = self.enter_context(MetricWriter(workdir, start_step=start_step))
        self._progress = self.enter_context(Progress(
            total_steps=total_steps, start_step=start_step, batch_size=config.train.batch_size,
            shown=processes.first, advice=advice,
        ))  # fmt: skip

    def is_device_busy(self) -> bool:
        """True if the newest step is not done yet."""
        return bool(self._newest) and not self._newest[-1].values.is_ready()

    def add(self, step: int, metrics: Any) -> Any:
        """Takes a step's `steps.Metrics`; waits for the step before the last two, returns its."""
        self._unchecked.append((step, metrics))
        self._progress.step(step)
        self._newest.append(metrics)
        if len(self._newest) <= _AHEAD:
            return None
        oldest = self._newest.popleft()
        jax.block_until_ready(oldest)
        self._progress.computed(step - _AHEAD)
        return oldest

    def update(self, step: int, *, wait: bool, last: bool = False) -> None:
        """Fetches the metrics that are due, and writes the lines; may raise NonFiniteError.

        `step` is the newest that was added, and the run's last one if `last`. If `wait`, its
        metrics are fetched too: nothing that is not finite is evaluated or saved.
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

    def _check(self, entries: list[tuple[int, Any]]) -> None:
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
        text = f"epoch {epoch:.1f} (step {step}): calibration accuracy {values['accuracy']:.4f}"
        if "mean_selection" in values:
            text += f"  mean g {values['mean_selection']:.3f}"
        self._progress.line(text)

    def flush(self) -> None:
        """Makes sure that all lines are on the disk: before a checkpoint that follows them is."""
        if self._writer is not None:
            self._writer.flush()

    def _write(self, step: int, part: str, values: Mapping[str, float]) -> None:
        if self._writer is not None:
            self._writer.write(step, part, values)


class NonFiniteSteps:
    """Steps whose loss, gradient or parameters are not finite: noted, and stopped at or skipped.

    Such a step has changed nothing (`steps.train_step`). nonfinite.jsonl has a line for each: step,
    action, bad (the terms that are not finite), finite (the others), indices (the batch's examples,
    as positions in the official training split).
    """

    def __init__(
        self, workdir: Path, config: ConfigDict, *, start_step: int,
        indices: Callable[[int], np.ndarray], processes: Processes,
    ):  # fmt: skip
        """Reads the notes of earlier processes, and forgets the steps after `start_step`."""
        self._path = workdir / "nonfinite.jsonl"
        self._action, self._budget = config.train.on_nonfinite, config.train.nonfinite_budget
        self._indices, self._processes = indices, processes
        read = processes.from_first("reading what steps were not finite", self._read)
        self._entries: list[dict[str, Any]] = [x for x in read if x["step"] <= start_step]
        if len(self._entries) < len(read):
            self._write()

    def meet(self, step: int, values: dict[str, float]) -> None:
        """Notes a step, counted from 1, and its metrics; NonFiniteError if the run has to stop."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        bad = {name: str(value) for name, value in values.items() if name not in finite}
        left = self._budget - sum(entry["action"] != "stop" for entry in self._entries)
        spent = self._action != "stop" and left <= 0
        action = "stop" if spent else self._action
        entry = {"step": step, "action": action, "bad": bad, "finite": finite}
        entry["indices"] = self._indices(step).tolist()
        self._entries = [e for e in self._entries if e["step"] != step] + [entry]
        self._write()
        message = f"step {step}: {', '.join(f'{name}={value}' for name, value in bad.items())}"
        if action == "stop":
            good = ", ".join(f"{name}={value:.4g}" for name, value in finite.items())
            budget = f"; config.train.nonfinite_budget={self._budget} is spent" if spent else ""
            raise NonFiniteError(
                f"{message} (finite: {good or 'nothing'}){budget}; its examples are in "
                f"{self._path}; a smaller config.optimizer.learning_rate or a longer warm-up "
                "usually helps"
            )
        self._processes.print(f"{message}: skipped; {left - 1} skips left in the budget")

    def _write(self) -> None:
        if self._processes.first:
            write_text(self._path, "".join(json.dumps(entry) + "\n" for entry in self._entries))

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        try:
            entries = [json.loads(line) for line in self._path.read_text().splitlines()]
            if not all(type(e["step"]) is int and e["action"] in _ACTIONS for e in entries):
                raise ValueError("no steps and actions")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{self._path} is damaged ({error}); move it away, and the budget begins anew"
            ) from error
        return entries


class Progress(rich.progress.Progress):
    """A progress bar on a terminal, plain lines elsewhere. A context manager."""

    def __init__(
        self, *, total_steps: int, start_step: int, batch_size: int, shown: bool = True,
        advice: Callable[[float], str] = lambda seconds: "",
    ):  # fmt: skip
        """Prepares the display of one process; the others have `shown` False."""
        self._total, self._batch_size, self._advice = total_steps, batch_size, advice
        self._computed: list[float] = []  # when the first steps were
        self._first: tuple[int, float] | None = None  # step and time after the compilation
        console = rich.console.Console(quiet=not shown)
        super().__init__(
            rich.progress.BarColumn(bar_width=5),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.add_task("train", total=total_steps, completed=start_step, shown="")

    def step(self, done: int) -> None:
        """Moves the bar."""
        if self._first is None:
            self._first = done, time.monotonic()
        self.update(self._task, completed=done)

    def computed(self, step: int) -> None:
        """Notes that a step has been computed, and after ten says how long the others will take."""
        if len(self._computed) > _TIMED or self.console.quiet:
            return
        self._computed.append(time.monotonic())  # of the first one after its compilation
        if len(self._computed) > _TIMED:
            # The median: an evaluation between two steps, which has to compile, does not count.
            left = float(np.median(np.diff(self._computed))) * (self._total - step)
            self.line(f"about {duration(left)} of training left{self._advice(left)}")

    def metrics(self, done: int, values: Mapping[str, float]) -> None:
        """Shows the latest averages: beside the bar, or as a line with rate and time left."""
        first, began = self._first or (done, time.monotonic())
        rate = (done - first) / max(time.monotonic() - began, 1e-9)
        # A terminal of 80 columns has room for little beside steps, time and time left.
        short = {"loss": "loss", "accuracy": "acc", "mean_selection": "g", "coverage": "cov"}
        labels = {name: name for name in short} | {"mean_selection": "mean g"}
        present = [name for name in short if name in values]
        beside = " ".join(f"{short[name]} {values[name]:.3f}" for name in present)
        self.update(self._task, shown=f"{beside} {rate * self._batch_size:.0f}/s")
        if self.disable:
            shown = "  ".join(f"{labels[name]} {values[name]:.3f}" for name in present)
            left = f"{(self._total - done) / rate:.0f}" if rate else "?"
            self.line(
                f"step {done}/{self._total}  {shown}  {rate * self._batch_size:,.0f} images/s  "
                f"{left} s left"
            )

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        self.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """Seconds in words, such as '7 minutes'."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    whole = max(round(seconds), 1)
    return f"{whole} second{'s' if whole > 1 else ''}"


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard's event file. A context manager."""

    def __init__(self, workdir: Path, *, start_step: int):
        """Opens both, and drops entries after `start_step`: these steps are done again."""
        path = self._path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= start_step]
        with _named_errors(path):
            write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
            self._file = path.open("a")
        # With the seconds of earlier processes, so that a resumed run knows its whole time.
        self._began = time.monotonic() - max((entry["seconds"] for entry in kept), default=0.0)
        # Not SummaryWriter, whose thread ends at the first error: later writes wait for it.
        self._folder = workdir / "tensorboard"
        with _named_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"))
            # TensorBoard hides later steps that an interrupted run has written.
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(start_step + 1, session_log=started)

    def write(self, step: int, part: str, values: Mapping[str, float]) -> None:
        """Appends numbers by name, of the part 'train' or 'calibration'; may raise WriteError."""
        seconds = round(time.monotonic() - self._began, 3)
        entry = {"step": step, "part": part, "seconds": seconds, **values}
        with _named_errors(self._path):
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        with _named_errors(self._folder):
            for name, value in values.items():
                self._event(step, summary=scalar(f"{part}/{name}", value))
            self._events.flush()

    def _event(self, step: int, **what: Any) -> None:
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))

    def flush(self) -> None:
        """Makes sure that the entries are on the disk, as they must be before a checkpoint is."""
        with _named_errors(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        for file in (self._file, self._events):
            with contextlib.suppress(OSError):  # the error that there was says more
                file.close()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to the error of a failed write."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from error


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads a run's `metrics.jsonl`, without the last line if a kill cut it short."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    entries = []
    try:
        # After a power cut what was not yet on the disk can be zeros.
        lines = path.read_bytes().rstrip(b"\0").splitlines(keepends=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if type(entry["step"]) is not int or not math.isfinite(entry["seconds"]):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            if not line.endswith(b"\n") and line[: len(_BEGINNING)] == _BEGINNING[: len(line)]:
                break
            raise InputError(
                f"{path}: line {number} is no entry of a run's metrics; name another --workdir, or "
                "move the file away"
            ) from None
        entries.append(entry)
    return entries
