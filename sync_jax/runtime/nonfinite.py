"""What happens after a step whose loss, gradient or parameters are not finite.

Such a step has changed nothing (`steps.train_step`); it is noticed when its metrics are fetched, so
that the device never waits for the host. What it was stands in nonfinite.jsonl, a line each: step,
action, bad (the terms that are not finite), finite (the others), indices (the batch's examples, as
positions in the official training split).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sync_jax.errors import InputError, NonFiniteError
from sync_jax.runtime.files import write_atomically
from sync_jax.runtime.processes import Processes

FILE = "nonfinite.jsonl"
ACTIONS = ("stop", "skip", "rollback")


class RollbackError(Exception):
    """The run has to go back to the latest checkpoint."""


class NonFiniteSteps:
    """The bad steps of a run: noted, and then stopped at, skipped or rolled back before."""

    def __init__(
        self,
        workdir: Path,
        *,
        action: str,
        budget: int,
        indices: Callable[[int], np.ndarray],
        processes: Processes,
    ):
        """Reads what earlier processes noted.

        Args:
            workdir: exists.
            action: 'stop', 'skip' or 'rollback'.
            budget: how many bad steps are lived with.
            indices: a step's examples.
            processes: of the run; the first writes.
        """
        self._path = workdir / FILE
        self._action, self._budget = action, budget
        self._indices, self._processes = indices, processes
        self._entries: list[dict[str, Any]] = processes.from_first(
            "reading what steps were not finite", lambda: _read(self._path)
        )

    @property
    def skipped(self) -> set[int]:
        """Steps that are left out when they come again after a rollback."""
        return {entry["step"] for entry in self._entries if entry["action"] == "rollback"}

    def begin(self, start: int) -> None:
        """Forgets the steps after `start` that will be met again."""
        kept = [e for e in self._entries if e["step"] <= start or e["action"] == "rollback"]
        if kept != self._entries:
            self._entries = kept
            self._write()

    def meet(self, step: int, values: dict[str, float]) -> None:
        """Notes a bad step.

        Args:
            step: the number of steps with it.
            values: its metrics.

        Raises:
            NonFiniteError: the run has to stop.
            RollbackError: it has to go back.
        """
        if step in self.skipped:
            return
        bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        others = [entry for entry in self._entries if entry["action"] != "stop"]
        spent = self._action != "stop" and len(others) >= self._budget
        action = "stop" if spent else self._action
        indices = self._indices(step).tolist()
        entry = {
            "step": step, "action": action, "bad": bad, "finite": finite, "indices": indices
        }  # fmt: skip
        self._entries = [e for e in self._entries if e["step"] != step] + [entry]
        self._write()
        shown = ", ".join(f"{name}={value}" for name, value in bad.items())
        message = f"step {step}: {shown}"
        if action == "stop":
            good = ", ".join(f"{name}={value:.4g}" for name, value in finite.items())
            budget = f"; config.train.nonfinite_budget={self._budget} is spent" if spent else ""
            raise NonFiniteError(
                f"{message} (finite: {good or 'nothing'}){budget}; its examples are in "
                f"{self._path}; a smaller config.optimizer.learning_rate or a longer warm-up "
                "usually helps"
            )
        left = self._budget - len(others) - 1
        if action == "rollback":
            raise RollbackError(f"{message}: going back, to leave it out; {left} more may follow")
        self._processes.print(f"{message}: skipped; {left} more may be")

    def _write(self) -> None:
        if not self._processes.first:
            return
        text = "".join(json.dumps(entry) + "\n" for entry in self._entries)
        write_atomically(self._path, lambda file: file.write(text.encode()))


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(type(e["step"]) is int and e["action"] in ACTIONS for e in entries):
            raise ValueError("no steps and actions")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}); move it away, and steps that it left out come again"
        ) from error
    return entries
