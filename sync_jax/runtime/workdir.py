"""A run's folder: checked, made, and locked while the run goes on."""

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sync_jax.config import describe_differences, read_config, to_json
from sync_jax.errors import InputError, WriteError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import latest_notes
from sync_jax.runtime.console import say
from sync_jax.runtime.files import LockedError, check_plain, locked, write_text
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import read_metrics

_RESULTS = ("predictions_", "report.json")  # how the names of a run's results begin
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR)
_VISIBLE_WITHIN = 30.0  # seconds in which a network's file system shows a new file to other hosts


def check_run(config: ConfigDict, workdir: Path) -> None:
    """Raises InputError for what a training could not begin with, whatever the data are."""
    for part, microbatches in {"train": config.train.microbatches, "evaluation": 1}.items():
        sharding.check_divisible(
            f"config.{part}.batch_size", config[part].batch_size, sharding.make_mesh(),
            microbatches=microbatches,
        )  # fmt: skip
    check_workdir(config, workdir)
    for name in ("checkpoints", "tensorboard"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is not a folder; name another --workdir")
    read_metrics(workdir)


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that cannot be the run's: InputError, naming the fields that differ."""
    check_plain(workdir)
    try:
        nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        if not nearest.is_dir():
            below = f"is below {nearest}, which is no folder"
            raise InputError(
                f"--workdir={workdir} {'is not a folder' if nearest == workdir else below}"
            )
        has_results = any(name.startswith(_RESULTS) for name in _names(workdir))
        saved = [] if is_abandoned(config, workdir) else saved_configs(workdir)
    except OSError as error:  # a name too long, a folder that is another user's
        raise InputError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if has_results and not saved:
        raise InputError(
            f"--workdir={workdir} holds a report or predictions and no config.json, as an "
            "ensemble's folder; name another --workdir"
        )
    for theirs in saved:
        refuse_differences(config, theirs, workdir)


def saved_configs(workdir: Path) -> list[dict[str, Any]]:
    """The config of a folder's run, from config.json and its latest checkpoint, if they exist."""
    path, notes = workdir / "config.json", latest_notes(workdir / "checkpoints")
    found = [read_config(path)] if path.exists() else []
    return found if notes is None else [*found, notes["config"]]


def is_abandoned(config: ConfigDict, workdir: Path) -> bool:
    """Returns True for the folder of another experiment that ended before its first checkpoint.

    It holds no result, and no checkpoint, not even one that is damaged or was put aside.
    """
    path = workdir / "config.json"
    saved = read_config(path) if path.exists() else {}
    is_ours = {"method", "target_coverage", "checkpoint"} <= saved.keys()  # no other program's
    if not is_ours or not describe_differences(config, saved):
        return False
    checkpoints = [x for x in _names(workdir / "checkpoints") if ".orbax-checkpoint-tmp" not in x]
    return not checkpoints and not any(x.startswith(_RESULTS) for x in _names(workdir))


def _names(folder: Path) -> list[str]:
    """The names in a folder, none if there is nothing of its name."""
    return sorted(os.listdir(folder)) if os.path.lexists(folder) else []


def refuse_differences(config: ConfigDict, saved: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with another experiment's folder: InputError names fields that differ."""
    if differing := describe_differences(config, saved):
        raise InputError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differing)}; name "
            "another --workdir, or the same values"
        )


def prepare_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the folder and saves the resolved config in it; errors as of `writing`.

    Removes the logs of another experiment that has left nothing else.
    """
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        if is_abandoned(config, workdir):
            say(f"{workdir} holds logs of another experiment, without a checkpoint: removed")
            for path in ("metrics.jsonl", "nonfinite.jsonl", "tensorboard/events*"):
                for log in workdir.glob(path):
                    log.unlink()
        write_text(workdir / "config.json", to_json(config))


def check_shared(workdir: Path, processes: Processes) -> None:
    """Raises InputError on all processes if one does not see the same folder as the first.

    The first writes an empty file there, all look for it, and everything is removed again.
    """
    if processes.count == 1:
        return
    token = workdir / f".shared-{secrets.token_hex(8)}"
    made = [folder for folder in (workdir, *workdir.parents) if not os.path.exists(folder)]

    def write() -> str:
        with writing(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
            token.touch()
        return token.name

    try:
        path = workdir / processes.from_first("the workdir", write)
        deadline = time.monotonic() + min(_VISIBLE_WITHIN, processes.seconds / 2)
        while not (seen := os.path.exists(path)) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = processes.share("a look into the workdir", [seen, socket.gethostname()])
    finally:
        if processes.first:
            with contextlib.suppress(OSError):
                token.unlink()
                for folder in made:
                    folder.rmdir()
    if blind := [f"process {i} on {host}" for i, (seen, host) in enumerate(found) if not seen]:
        raise InputError(
            f"--workdir={workdir} is not one folder for all processes: {', '.join(blind)} cannot "
            f"see what process 0 on {found[0][1]} writes there; name a folder that all share"
        )


@contextlib.contextmanager
def writing(workdir: Path) -> Iterator[None]:
    """Raises an InputError where nothing may be written, a WriteError where writing fails."""
    try:
        yield
    except OSError as error:
        kind = InputError if error.errno in _REFUSED else WriteError
        raise kind(f"--workdir={workdir} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def owned(workdir: Path, processes: Processes) -> Iterator[None]:
    """Holds the lock of the folder, which is made when needed; the first process does, for all.

    InputError if another run holds it; errors of `writing`.
    """

    def warn() -> None:
        say(f"{workdir} cannot be locked there: see that no other run uses it meanwhile")

    def lock() -> None:
        try:
            with writing(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(workdir / ".lock", unsupported=warn))
        except LockedError as error:
            raise InputError(
                f"--workdir={workdir} is in use by {error}; wait for it, stop it, or name another "
                "--workdir"
            ) from None

    with contextlib.ExitStack() as held:
        processes.from_first("the workdir's lock", lock)
        yield
