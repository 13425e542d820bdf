"""Steps whose loss, gradient or parameters are not finite: noted, and stopped at or skipped.

Such a step has changed nothing (`steps.train_step`); it is noticed when its metrics are fetched, so
that the device never waits for the host. nonfinite.jsonl has a line for each: step, action, bad
(the terms that are not finite), finite (the others), indices (the batch's examples, as positions in
the official training split).
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sync_jax.errors import InputError, NonFiniteError
from sync_jax.runtime.files import write_text
from sync_jax.runtime.processes import Processes

FILE = "nonfinite.jsonl"
_ACTIONS = ("stop", "skip", "rollback")  # the last one is in notes of version 0.1 alone


class NonFiniteSteps:
    """The steps of a run that were not finite, within a budget."""

    def __init__(
        self, workdir: Path, *, action: str, budget: int, indices: Callable[[int], np.ndarray],
        processes: Processes,
    ):  # fmt: skip
        """Reads the notes of earlier processes.

        Args:
            workdir: exists.
            action: 'stop' or 'skip'.
            budget: number of steps that may be skipped.
            indices: gives a step's examples.
            processes: of the run; the first writes.
        """
        self._path = workdir / FILE
        self._action, self._budget = action, budget
        self._indices, self._processes = indices, processes
        self._entries: list[dict[str, Any]] = processes.from_first(
            "reading what steps were not finite", lambda: _read(self._path)
        )

    def begin(self, start: int) -> None:
        """Forgets the steps after `start`, which will be done again."""
        kept = [entry for entry in self._entries if entry["step"] <= start]
        if kept != self._entries:
            self._entries = kept
            self._write()

    def meet(self, step: int, values: dict[str, float]) -> None:
        """Notes a step, counted from 1, and its metrics; NonFiniteError if the run has to stop."""
        bad = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        others = [entry for entry in self._entries if entry["action"] != "stop"]
        spent = self._action != "stop" and len(others) >= self._budget
        action = "stop" if spent else self._action
        entry = {"step": step, "action": action, "bad": bad, "finite": finite}
        entry["indices"] = self._indices(step).tolist()
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
        self._processes.print(f"{message}: skipped; {left} skips left in the budget")

    def _write(self) -> None:
        if not self._processes.first:
            return
        text = "".join(json.dumps(entry) + "\n" for entry in self._entries)
        write_text(self._path, text)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        if not all(type(e["step"]) is int and e["action"] in _ACTIONS for e in entries):
            raise ValueError("no steps and actions")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}); move it away, and the budget begins anew"
        ) from error
    return entries
