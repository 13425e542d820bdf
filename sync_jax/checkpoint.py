"""Checkpoints of the training state; the only file that imports Orbax."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sync_jax.errors import InputError, WriteError
from sync_jax.steps import TrainState

_DAMAGED = ".damaged"  # after the name of a checkpoint that was put aside


class Checkpoints:
    """The checkpoints of one run: written in the background, each complete or absent.

    A context manager: leaving it waits for the save in progress.
    """

    def __init__(self, folder: Path, *, keep: int):
        """Opens a folder, which need not exist yet.

        Args:
            folder: one subfolder per checkpoint, named by its step.
            keep: how many of the latest to keep.
        """
        self._folder = folder.absolute()
        self._keep = keep
        self._open()

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Steps done in the latest complete checkpoint; None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state and writes it in the background; waits for an earlier save first.

        Args:
            state: not donated: it may be, once this returns.
            step: steps done; nothing is written if that is saved already.

        Raises:
            WriteError: this or the earlier one cannot be written; those before are intact.
        """
        if step == self.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), digest=ocp.args.JsonSave(_digests(state))
        )
        self._guarded(lambda: self._manager.save(step, args=args))

    def restore(
        self, like: TrainState, log: Callable[[str], None] = print
    ) -> tuple[TrainState, int] | None:
        """The latest checkpoint that is whole; those after it are put aside, by name.

        Every array is compared with the digest that was made of it when it was saved.

        Args:
            like: gives shapes, dtypes and shardings.
            log: told a line of each that is damaged.

        Returns:
            The state and the steps done; None where there is no checkpoint at all.

        Raises:
            InputError: there are checkpoints, and none can be used. All are left as they are.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                state = self._read(like, step)
            except Exception as error:  # Orbax and TensorStore raise what they like
                damaged[step] = " ".join(str(error).split())[:300] or type(error).__name__
                continue
            if damaged:
                self._put_aside(damaged, log)
            return state, step
        if not steps:
            return None
        reasons = "; ".join(f"{self._folder / str(step)}: {damaged[step]}" for step in steps)
        raise InputError(
            f"no checkpoint can be restored, and none is overwritten ({reasons}); to begin anew, "
            f"move {self._folder} away"
        )

    def _read(self, like: TrainState, step: int) -> TrainState:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), digest=ocp.args.JsonRestore()
        )
        found = self._manager.restore(step, args=args)
        state: TrainState = found["state"]
        expected, digests = found["digest"], _digests(state)
        wrong = sorted(name for name in digests if digests[name] != expected.get(name))
        if wrong:
            raise ValueError(f"{wrong[0]} is not what was saved")
        return state

    def _put_aside(self, damaged: dict[int, str], log: Callable[[str], None]) -> None:
        for step, reason in damaged.items():
            path = self._folder / str(step)
            log(f"checkpoint {path} is damaged and put aside as {path.name}{_DAMAGED}: {reason}")
            path.rename(path.with_name(f"{path.name}{_DAMAGED}"))
        self._manager.close()
        self._open()  # the manager would not write these steps again

    def wait(self) -> None:
        """Returns when every save is on the disk.

        Raises:
            WriteError: one cannot be written; those before are intact.
        """
        self._guarded(self._manager.wait_until_finished)

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore raise what they like
            raise WriteError(
                f"{self._folder} cannot be written: {' '.join(str(error).split())[:300]}; earlier "
                "checkpoints are intact, and the same command goes on from the last"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.wait()
        self._manager.close()


def _digests(state: TrainState) -> dict[str, str]:
    """SHA-256 of every array's bytes, by its path."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    arrays = jax.device_get([leaf for _, leaf in leaves])
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
        for (path, _), array in zip(leaves, arrays, strict=True)
    }
