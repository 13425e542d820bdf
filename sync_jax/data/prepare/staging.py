"""What preparing a dataset needs whatever it is made of: a lock, a staging folder, clear errors."""

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from sync_jax.data.prepare.download import DataError, incomplete_prefix
from sync_jax.data.prepare.records import flush


def expand(path: str | os.PathLike) -> Path:
    """Absolute, `~` expanded.

    Raises:
        DataError: it can be no path, or begins with a home folder that is not known.
    """
    text = os.fspath(path)
    if "\0" in text:
        raise DataError(f"{text!r} cannot be a path: it holds a null character")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise DataError(f"{text!r} names a home folder that is not known; write it out")
    return Path(os.path.abspath(expanded))


@contextlib.contextmanager
def exclusive(root: Path, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the dataset's lock, which the system lets go of even when the process is killed.

    Where what is done meanwhile fails with a DataError, the lock and the folders that were made for
    it go again, if nothing else is in them.

    Raises:
        DataError: `root` is not a folder, or cannot be written.
    """
    path = root / f"{name}.lock"
    with disk_errors(root):
        if root.exists() and not root.is_dir():
            raise DataError(f"data.data_dir={str(root)!r} is not a folder")
        made = [x for x in (path, root / "downloads", root, *root.parents) if not x.exists()]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(
                path, lambda: log(f"{name}: waiting for another process that prepares it")
            ):
                yield
        except (DataError, OSError):
            for leftover in made:
                with contextlib.suppress(OSError):
                    leftover.unlink() if leftover == path else leftover.rmdir()
            raise


@contextlib.contextmanager
def _locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    while True:
        with path.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            # The process that held it may have removed it: then it is no longer everyone's.
            if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                yield
                return


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Errors of the disk in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        place = f" ({error.filename})" if error.filename else ""
        raise DataError(f"data.data_dir={str(root)!r} cannot be used: {reason}{place}") from error


def remove_leftovers(root: Path, name: str, *, keep: tuple[Path, ...] = ()) -> None:
    """Removes what killed processes left; only while holding the lock, for then none is alive."""
    for parent in (root, root / "downloads"):
        for leftover in parent.glob(f"{incomplete_prefix(name)}*"):
            if leftover not in keep:
                shutil.rmtree(leftover)


def build(
    name: str,
    make_builder: Callable[[str], Any],
    target: Path,
    *,
    root: Path,
    manual_dir: Path | None = None,
    finish: Callable[[Any, Path], None] = lambda builder, built: None,
) -> None:
    """Builds beside the target, and moves there in one step what is complete and on the disk.

    Args:
        name: the dataset's.
        make_builder: makes a TFDS builder, given its data_dir.
        target: the prepared folder.
        root: in which it is.
        manual_dir: where the builder finds its files.
        finish: given the builder and the folder built, adds to it.

    Raises:
        DataError: it cannot be written, or what the builder raises.
    """
    with tempfile.TemporaryDirectory(prefix=incomplete_prefix(name), dir=root) as staging:
        builder = make_builder(staging)
        try:
            with _quiet_tfds():
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(manual_dir=manual_dir),
                )
        except RuntimeError as error:  # what ArrayRecord makes of a disk that fills up
            raise DataError(
                f"data.data_dir={str(root)!r} cannot be written: {' '.join(str(error).split())}"
            ) from error
        built = Path(builder.data_dir)
        finish(builder, built)
        for path in (*built.iterdir(), built):
            flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # not a finished preparation, or we would not be here
            shutil.rmtree(target)
        built.rename(target)
        flush(target.parent)


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from drawing progress bars and printing where it builds."""
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
