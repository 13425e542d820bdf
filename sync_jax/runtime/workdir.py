"""A run's folder: checked, made, and locked while the run goes on."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sync_jax.config import describe_differences, read_config, to_json
from sync_jax.errors import InputError, WriteError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import latest_notes
from sync_jax.runtime.console import say
from sync_jax.runtime.files import LockedError, locked, write_text
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.profiling import parse_steps
from sync_jax.runtime.progress import read_metrics


def check_run(config: ConfigDict, workdir: Path) -> None:
    """Refuses what a training could not begin with, whatever the data are.

    Raises:
        InputError: the batch cannot be split over the devices, `workdir` cannot be the run's, or
            the steps to be traced are none.
    """
    parse_steps(config.profile.steps)
    mesh = sharding.make_mesh()
    sharding.check_divisible(
        "config.train.batch_size",
        config.train.batch_size,
        mesh,
        microbatches=config.train.microbatches,
    )
    sharding.check_divisible("config.evaluation.batch_size", config.evaluation.batch_size, mesh)
    check_workdir(config, workdir)
    for name in ("checkpoints", "tensorboard"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is not a folder; name another --workdir")
    read_metrics(workdir)


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that cannot be the run's: InputError, naming the fields that differ."""
    try:
        nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        path, report = workdir / "config.json", workdir / "report.json"
        has_config, has_report = path.exists(), report.exists()
    except OSError as error:  # a name too long, a folder that is another user's
        raise InputError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if not nearest.is_dir():
        whose = (
            "is not a folder" if nearest == workdir else f"is below {nearest}, which is no folder"
        )
        raise InputError(f"--workdir={workdir} {whose}")
    if has_report and not has_config:
        raise InputError(
            f"--workdir={workdir} holds a report and no config.json, as an ensemble's folder; name "
            "another --workdir"
        )
    if has_config:
        refuse_differences(config, read_config(path), workdir)
    elif (notes := latest_notes(workdir / "checkpoints")) is not None:  # it was lost
        refuse_differences(config, notes["config"], workdir)


def refuse_differences(config: ConfigDict, saved: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with another experiment's folder: InputError names fields that differ."""
    if differing := describe_differences(config, saved):
        raise InputError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differing)}; name "
            "another --workdir, or the same values"
        )


def prepare_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the folder and saves the resolved config in it.

    Raises:
        InputError, WriteError: that is not allowed there, or fails on a full disk for example.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "config.json", to_json(config))
    except OSError as error:
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
        kind = InputError if refused else WriteError
        raise kind(f"--workdir={workdir} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def owned(workdir: Path, processes: Processes) -> Iterator[None]:
    """Holds the lock of the folder, which is made when needed; the first process does, for all.

    Raises:
        InputError: another run holds the lock, or the folder cannot be written.
    """
    with contextlib.ExitStack() as held:
        processes.from_first("the workdir's lock", lambda: held.enter_context(_exclusive(workdir)))
        yield


@contextlib.contextmanager
def _exclusive(workdir: Path) -> Iterator[None]:
    def warn() -> None:
        say(f"{workdir} cannot be locked there: see that no other run uses it meanwhile")

    with contextlib.ExitStack() as held:
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(workdir / ".lock", unsupported=warn))
        except LockedError as error:
            raise InputError(
                f"--workdir={workdir} is in use by {error}; wait for it, stop it, or name another "
                "--workdir"
            ) from None
        except OSError as error:
            raise InputError(f"--workdir={workdir} cannot be written: {error.strerror}") from error
        yield
