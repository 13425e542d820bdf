"""A trace of some training steps, for TensorBoard's profile plugin or Perfetto."""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from sync_jax.errors import InputError

_MOST = 1000  # steps: a trace of more is too large to be opened


def parse_steps(text: str) -> range:
    """Which steps '100-110', or '100' alone, means, counted from 1; none for ''.

    Raises:
        InputError: something else stands there.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if not 1 <= steps.start < steps.stop <= steps.start + _MOST:
        raise InputError(
            f"config.profile.steps={text!r} must be steps of the run, as '100-110', from 1 and at "
            f"most {_MOST:,} of them"
        )
    return steps


class Trace:
    """Records what host and device do in some steps. A context manager; leaving it ends it."""

    def __init__(self, steps: range, folder: Path, log: Callable[[str], None]):
        """Nothing is recorded yet.

        Args:
            steps: to record; none, and nothing ever happens.
            folder: made when needed; the trace goes to plugins/profile/<time>/ in it.
            log: told where it is.
        """
        self._steps, self._folder, self._log = steps, folder, log
        self._on = False

    def step(self, first: int, last: int) -> contextlib.AbstractContextManager[Any]:
        """Around the dispatch of steps `first` to `last`, which begins the trace if it is time."""
        if not self._on and self._steps and first <= self._steps[-1] and last >= self._steps[0]:
            jax.profiler.start_trace(self._folder)
            self._on = True
        if not self._on:
            return contextlib.nullcontext()
        return jax.profiler.StepTraceAnnotation("train", step_num=first)

    def done(self, last: int, values: Any) -> None:
        """Ends the trace if it is time; waits for the device then.

        Args:
            last: the newest step that is under way.
            values: arrays that it computes.
        """
        if self._on and last >= self._steps[-1]:
            jax.block_until_ready(values)
            self._end()

    def _end(self) -> None:
        if not self._on:
            return
        steps, self._steps, self._on = self._steps, range(0), False
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:  # a full disk costs no training
            self._log(f"no profile: {' '.join(str(error).split())}")
            return
        self._log(
            f"profile of steps {steps[0]} to {steps[-1]}: tensorboard --logdir={self._folder}, or "
            "its .trace.json.gz in ui.perfetto.dev"
        )

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
