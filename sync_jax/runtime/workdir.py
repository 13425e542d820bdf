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
from sync_jax.runtime.training_log import read_metrics


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
    try:
        nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        path, report = workdir / "config.json", workdir / "report.json"
        has_config, has_report = path.exists(), report.exists()
    except OSError as error:  # a name too long, a folder that is another user's
        raise InputError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if not nearest.is_dir():
        below = f"is below {nearest}, which is no folder"
        raise InputError(
            f"--workdir={workdir} {'is not a folder' if nearest == workdir else below}"
        )
    if has_report and not has_config:
        raise InputError(
            f"--workdir={workdir} holds a report and no config.json, as an ensemble's folder; name "
            "another --workdir"
        )
    if (saved := saved_config(workdir)) is not None:
        refuse_differences(config, saved, workdir)
    for path in workdir.glob("*.*"):  # a run writes all of these
        if path.suffix in (".json", ".jsonl", ".npz", ".png") and path.is_dir():
            raise InputError(f"{path} is a folder; move it away, or name another --workdir")


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The config of the run in a folder, from a checkpoint where config.json was lost, or None."""
    if (workdir / "config.json").exists():
        return read_config(workdir / "config.json")
    notes = latest_notes(workdir / "checkpoints")
    return None if notes is None else notes["config"]


def refuse_differences(config: ConfigDict, saved: dict[str, Any], workdir: Path) -> None:
    """Refuses to go on with another experiment's folder: InputError names fields that differ."""
    if differing := describe_differences(config, saved):
        raise InputError(
            f"--workdir={workdir} holds another experiment: {'; '.join(differing)}; name "
            "another --workdir, or the same values"
        )


def prepare_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the folder and saves the resolved config in it; InputError or WriteError otherwise."""
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

    InputError if another run holds it, or the folder cannot be written.
    """

    def warn() -> None:
        say(f"{workdir} cannot be locked there: see that no other run uses it meanwhile")

    def lock() -> None:
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

    with contextlib.ExitStack() as held:
        processes.from_first("the workdir's lock", lock)
        yield
