"""Progress of a run: on the console, in metrics.jsonl and as TensorBoard events."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2
from tensorboardX.summary import scalar

from sync_jax.errors import InputError, WriteError
from sync_jax.runtime.files import write_text

_BEGINNING = b'{"step": '  # of a line of metrics.jsonl


class Progress:
    """A progress bar on a terminal, plain lines elsewhere. A context manager."""

    def __init__(self, *, total_steps: int, start_step: int, batch_size: int, shown: bool = True):
        """Prepares the display of one process; the others have `shown` False."""
        self._shown, self._total, self._batch_size = shown, total_steps, batch_size
        self._first: tuple[int, float] | None = None  # step and time after the compilation
        console = rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=5),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[shown]}"),
            console=console,
            disable=not (console.is_terminal and shown),
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=start_step, shown="")

    def step(self, done: int) -> None:
        """Moves the bar."""
        if self._first is None:
            self._first = done, time.monotonic()
        self._bar.update(self._task, completed=done)

    def metrics(self, done: int, values: Mapping[str, float]) -> None:
        """Shows the latest averages: beside the bar, or as a line with rate and time left."""
        first, began = self._first or (done, time.monotonic())
        rate = (done - first) / max(time.monotonic() - began, 1e-9)
        # A terminal of 80 columns has room for little beside steps, time and time left.
        short = {"loss": "loss", "accuracy": "acc", "mean_selection": "g", "coverage": "cov"}
        labels = {name: name for name in short} | {"mean_selection": "mean g"}
        present = [name for name in short if name in values]
        beside = " ".join(f"{short[name]} {values[name]:.3f}" for name in present)
        self._bar.update(self._task, shown=f"{beside} {rate * self._batch_size:.0f}/s")
        if self._bar.disable:
            shown = "  ".join(f"{labels[name]} {values[name]:.3f}" for name in present)
            left = f"{(self._total - done) / rate:.0f}" if rate else "?"
            self.line(
                f"step {done}/{self._total}  {shown}  {rate * self._batch_size:,.0f} images/s  "
                f"{left} s left"
            )

    def line(self, text: str) -> None:
        """Prints a line that stays, above the bar."""
        if not self._shown:
            return
        if self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()
        sys.stdout.flush()


class MetricWriter:
    """Appends metrics to `metrics.jsonl` and to TensorBoard's event file. A context manager."""

    def __init__(self, workdir: Path, *, start_step: int):
        """Opens both, and drops entries after `start_step`: these steps are done again."""
        path = self._path = workdir / "metrics.jsonl"
        kept = [entry for entry in read_metrics(workdir) if entry["step"] <= start_step]
        text = "".join(json.dumps(entry) + "\n" for entry in kept)
        with _named_errors(path):
            write_text(path, text)
            self._file = path.open("a")
        # Seconds of training before this process, so that a resumed run knows its whole time.
        self.seconds_before = max((entry["seconds"] for entry in kept), default=0.0)
        self._began = time.monotonic()
        # Not SummaryWriter, whose thread ends at the first error: later writes wait for it.
        self._folder = workdir / "tensorboard"
        with _named_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            self._events = EventsWriter(str(self._folder / "events"))
            # TensorBoard hides later steps that an interrupted run has written.
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._event(start_step + 1, session_log=started)

    @property
    def seconds(self) -> float:
        """Seconds of training, those of earlier processes included."""
        return self.seconds_before + time.monotonic() - self._began

    def write(self, step: int, part: str, values: Mapping[str, float]) -> None:
        """Appends numbers by name, of the part 'train' or 'calibration'.

        Raises:
            WriteError: they cannot be written, on a full disk for example.
        """
        entry = {"step": step, "part": part, "seconds": round(self.seconds, 3), **values}
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
            self._file.flush()
            os.fsync(self._file.fileno())

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # the error that there was says more
            self._file.close()
        with contextlib.suppress(OSError):
            self._events.close()


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Adds the file's name to the error of a failed write."""
    try:
        yield
    except OSError as error:
        raise WriteError(f"{path} cannot be written: {error.strerror}") from error


def read_metrics(workdir: Path) -> list[dict]:
    """The entries of a run's `metrics.jsonl`; without the last line if a kill cut it short.

    Raises:
        InputError: it holds something else.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    entries: list[dict] = []
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
