"""Checkpoints of the training state; the only file that imports Orbax."""

from pathlib import Path
from types import TracebackType

import jax
import orbax.checkpoint as ocp

from sync_jax.errors import InputError
from sync_jax.steps import TrainState


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
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Steps done in the latest complete checkpoint; None without one."""
        return self._manager.latest_step()

    def save(self, state: TrainState, step: int) -> None:
        """Copies the state and writes it in the background; waits for an earlier save first.

        Args:
            state: not donated: it may be, once this returns.
            step: steps done.
        """
        self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, like: TrainState) -> TrainState:
        """The latest checkpoint.

        Args:
            like: gives shapes, dtypes and shardings.

        Raises:
            InputError: there is none, or it does not hold such a state.
        """
        step = self.latest_step()
        if step is None:
            raise InputError(f"{self._folder} holds no checkpoint")
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        try:
            return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).strip().split("\n", 1)[0]
            raise InputError(
                f"the checkpoint {self._folder / str(step)} cannot be restored: {reason}; "
                "move it away to go on from the one before"
            ) from error

    def wait(self) -> None:
        """Returns when every save is on the disk; raises what went wrong with it."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._manager.close()
