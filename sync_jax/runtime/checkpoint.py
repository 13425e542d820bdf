"""Checkpoints of the training state; the only file that imports Orbax."""

import contextlib
import copy
import errno
import functools
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax import Array

from sync_jax.errors import FailedError, InputError, WriteError
from sync_jax.runtime.console import one_line
from sync_jax.runtime.hashing import mix
from sync_jax.runtime.orbax_log import orbax_log
from sync_jax.runtime.processes import Processes

T = TypeVar("T")

_ABOUT = "about"  # the item beside the state: fingerprints, notes, score
_PASSING = (
    *(errno.EACCES, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE),
    *(errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),  # of a mount
)


class Restored(NamedTuple):
    """A checkpoint: a tree of arrays, the steps done, and notes of JSON's types."""

    state: Any
    step: int
    notes: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: written in the background, each complete or absent.

    A context manager: leaving it waits for the save in progress. Of several processes all make the
    same calls; each writes what is on its devices, into a folder that all of them see.
    """

    def __init__(
        self, folder: Path, *, keep: int, keep_best: int = 0, best_metric: str = "",
        processes: Processes | None = None,
    ):  # fmt: skip
        """Opens a folder; keeps the latest, and those with the highest scores `best_metric`.

        What Orbax says of its failures goes to orbax.log beside the folder.
        """
        self._folder = folder.absolute()
        self._best_metric, self._processes = best_metric, processes or Processes()

        def look() -> tuple[list[tuple[int, float]], list[str]]:
            scores = [
                (step, about["score"])
                for step, about in _read_abouts(folder).items()
                if about["score"] is not None and about["best_metric"] == best_metric
            ]
            return scores, sorted(path.name for path in folder.glob("*.orbax-checkpoint-tmp*"))

        orbax_log.open(self._folder.with_name("orbax.log"))
        # Before Orbax opens, which clears half-written checkpoints away.
        scores, self._half_written = self._processes.from_first("the checkpoints' scores", look)
        self._scores: dict[int, float] = dict(scores)
        self._policy = _Kept(keep, keep_best, self._scores)
        self._guarded(self._open)

    def _open(self) -> None:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of a process that was killed while it saved
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Steps done in the latest complete checkpoint; None without one."""
        return self._manager.latest_step()

    def save(
        self, state: Any, step: int, *, notes: Mapping[str, Any] | None = None,
        score: float | None = None,
    ) -> None:  # fmt: skip
        """Copies the state and writes it in the background; waits for an earlier save first.

        The state, a tree of arrays whose `step` equals `step`, may be donated once this returns.
        Notes are of JSON's types. A higher score is better; None is the worst. Nothing is written
        if that step is saved already.
        WriteError if this or the earlier one cannot be written; those before are intact.
        """
        if step == self.latest_step():
            return
        about = {
            "fingerprints": fingerprints(state),
            # A copy: they are written in the background, while the caller goes on with his.
            "notes": copy.deepcopy(dict(notes or {})),
            "score": score,
            "best_metric": self._best_metric,
        }
        if score is not None:
            self._scores[step] = score
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            **{_ABOUT: ocp.args.JsonSave(about | {"digest": _digest(about)})},
        )
        self._guarded(lambda: self._manager.save(step, args=args))

    def restore(
        self, like: Any, log: Callable[[str], None] = print, *, last: int | None = None
    ) -> Restored | None:
        """Reads the latest checkpoint that is whole; puts those after it aside, by name.

        `like` gives shapes, dtypes and shardings; devices and processes may be others than those
        that saved. `log` gets a line on each checkpoint that is damaged, renamed, of a step after
        the `last` of the training, or was half written.
        InputError if there are checkpoints and none can be used: all are left as they are.
        FailedError if one cannot be read for want of memory or the like.
        """
        steps: list[int] = self._processes.from_first("the list of checkpoints", self._steps)
        while self._half_written:
            half = self._folder / self._half_written.pop(0)
            log(f"checkpoint {half} was half written when its process ended, and is removed")
        damaged: dict[int, str] = {}
        for step in steps:
            if last is not None and step > last:
                damaged[step] = f"the training ends at step {last}"
                continue
            restored = self._attempt(like, step)
            if isinstance(restored, Restored):
                if damaged:
                    self._put_aside(damaged, log)
                return restored
            damaged[step] = restored
        if not steps:
            return None
        reasons = "; ".join(f"{self._folder / str(step)}: {damaged[step]}" for step in steps)
        raise InputError(
            f"no checkpoint can be restored, and none is overwritten ({reasons}); to begin anew, "
            f"move {self._folder} away{orbax_log.hint()}"
        )

    def _steps(self) -> list[int]:
        """The latest first; also of folders that are empty, which Orbax passes over."""
        try:
            names = [path.name for path in self._folder.iterdir() if path.is_dir()]
        except OSError as error:
            raise FailedError(f"{self._folder} cannot be read: {error.strerror}") from error
        steps = [int(name) for name in names if name.isascii() and name.isdecimal()]
        return sorted({step for step in steps if str(step) in names}, reverse=True)

    def _attempt(self, like: Any, step: int) -> Restored | str:
        """Reads a checkpoint, or says why it cannot be used; on all processes alike."""
        found = self._on_all(step, "reading", lambda: self._read(like, step))
        if isinstance(found, str):
            return found
        state, about = found
        # Of arrays that are divided between processes this is a collective, for which all are here.
        reason = self._on_all(step, "comparing", lambda: _compare(state, about))
        return reason or Restored(state, step, about["notes"])

    def _on_all(self, step: int, what: str, function: Callable[[], T]) -> T | str:
        """Calls a function on every process; the reason instead, if it fails on any."""
        result, reason = None, (False, "")
        try:
            result = function()
        except Exception as error:  # Orbax and TensorStore raise what they like
            reason = _is_passing(error), one_line(error)
        passing, text = max(self._processes.share(f"{what} checkpoint {step}", reason))
        if passing:
            raise FailedError(
                f"{self._folder / str(step)} cannot be read now: {text}; the same command tries "
                "again"
            )
        return text or result  # type: ignore[return-value]

    def _read(self, like: Any, step: int) -> tuple[Any, dict[str, Any]]:
        """Reads this process's parts of the state, without waiting for another, and the notes."""
        folder = self._folder / str(step)
        about = _read_about(folder)
        alone = ocp.options.MultiprocessingOptions(
            primary_host=self._processes.index,
            active_processes={self._processes.index},
            barrier_sync_key_prefix="alone",
        )
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like
        )
        with ocp.Checkpointer(
            ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            multiprocessing_options=alone,
        ) as reader:
            args = ocp.args.StandardRestore(abstract)
            return reader.restore(folder / "state", args=args), about

    def _put_aside(self, damaged: dict[int, str], log: Callable[[str], None]) -> None:
        def rename() -> None:
            for step, reason in damaged.items():
                path = self._folder / str(step)
                names = (f"{path.name}.damaged{suffix}" for suffix in ("", *range(2, 1000)))
                name = next(name for name in names if not path.with_name(name).exists())
                log(f"checkpoint {path} is put aside as {name}: {reason}{orbax_log.hint()}")
                self._guarded(functools.partial(path.rename, path.with_name(name)))

        self._processes.from_first("putting damaged checkpoints aside", rename)
        self._manager.close()
        self._open()  # the manager would not write these steps again

    def wait(self) -> None:
        """Returns when every save is on the disk; WriteError if one cannot be written."""
        self._guarded(self._manager.wait_until_finished)

    def _guarded(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:  # Orbax and TensorStore raise what they like
            raise WriteError(
                f"{self._folder} cannot be written: {one_line(error)}; earlier "
                "checkpoints are intact, and the same command goes on from the last"
                f"{orbax_log.hint()}"
            ) from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._guarded(self._manager.close)  # which waits
            return
        with contextlib.suppress(Exception):  # the error that there is says more than another
            self._manager.close()


class _Kept(ocp.checkpoint_managers.PreservationPolicy):
    """The latest few, and those with the highest scores.

    Orbax keeps scores too, in files of their own: if one of them is damaged, it does not open.
    """

    def __init__(self, latest: int, best: int, scores: Mapping[int, float]):
        self._latest, self._best, self._scores = latest, best, scores

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: ocp.checkpoint_managers.PreservationContext
    ) -> list[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        scored = sorted((x for x in steps if x in self._scores), key=self._scores.__getitem__)
        kept = {*steps[-self._latest :], *scored[len(scored) - self._best :]}
        return [checkpoint.step in kept for checkpoint in checkpoints]


def latest_notes(folder: Path) -> dict[str, Any] | None:
    """The notes of the latest checkpoint in a folder that has readable ones; None without any."""
    abouts = _read_abouts(folder)
    return abouts[max(abouts)]["notes"] if abouts else None


def _read_abouts(folder: Path) -> dict[int, dict[str, Any]]:
    """Fingerprints, notes and scores of the checkpoints in a folder, by their steps."""
    abouts = {}
    for path in folder.glob(f"*/{_ABOUT}"):
        # What cannot be used is damaged, renamed or put aside, which `restore` finds out.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            abouts[int(path.parent.name)] = _read_about(path.parent)
    return abouts


def _read_about(folder: Path) -> dict[str, Any]:
    """Fingerprints, notes and score of a checkpoint; ValueError if it is not of its name's step."""
    about = json.loads((folder / _ABOUT / "metadata").read_text())
    if about["digest"] != _digest(about):
        raise ValueError("its notes are not what was saved")
    step = about["fingerprints"][".step"][0]  # of one number the first sum is the number itself
    if str(step) != folder.name:
        raise ValueError(f"it holds the state after step {step}")
    return about


def fingerprints(state: Any) -> dict[str, list[int]]:
    """64 bits of every array, by its path, computed on the devices; any changed bit changes them.

    Sums of integers, so that neither the number of devices nor the sharding matters.
    """
    # One after the other: of arrays that are divided between devices each is a collective.
    return {
        jax.tree_util.keystr(path): jax.device_get(_fingerprint(leaf)).tolist()
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


@jax.jit
def _fingerprint(x: Array) -> Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    if x.dtype == jnp.bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    place = mix(jnp.arange(x.size, dtype=jnp.uint32).reshape(x.shape))
    # Odd weights: what changes one element alone never leaves the first sum as it was.
    return jnp.stack([jnp.sum(bits * (place | 1)), jnp.sum(mix(bits + place))])


def _digest(about: Mapping[str, Any]) -> str:
    """SHA-256 of fingerprints, notes and score, without the digest there."""
    rest = {name: value for name, value in about.items() if name != "digest"}
    text = json.dumps(rest, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _compare(state: Any, about: dict[str, Any]) -> None:
    """Raises ValueError for arrays that are not those that were saved."""
    found, expected = fingerprints(state), about["fingerprints"]
    wrong = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if wrong:
        raise ValueError(f"{wrong[0]} is not what was saved")


def _is_passing(error: Exception) -> bool:
    """True for errors of the system, which say nothing about the files themselves."""
    if isinstance(error, OSError):
        return error.errno in _PASSING
    # TensorStore raises ValueError, with the system's words in it.
    texts = ("RESOURCE_EXHAUSTED", *map(os.strerror, _PASSING))
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
