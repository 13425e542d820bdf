"""Preparing once: the folder, the lock, and building beside the place where the result goes.

data_dir/<name>/<version>/      the prepared dataset; there if and only if it is complete
data_dir/downloads/<name>/      what was fetched
data_dir/incomplete-*/          a preparation in progress, or what is left of a killed one
"""

import contextlib
import errno
import hashlib
import io
import os
import shlex
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import rich.console
import rich.progress
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from sync_jax.data.prepare import digests
from sync_jax.errors import InputError
from sync_jax.runtime.console import one_line, say
from sync_jax.runtime.files import LockedError, flush, hold, locked

Log = Callable[[str], None]


class Prepared:
    """A dataset that is prepared once; subclasses find its source and build its folder."""

    VERSION: ClassVar[str] = "1.0.0"
    LAST: ClassVar[str]  # a file that every prepared folder has

    def __init__(self, section: ConfigDict):
        self.section, self.name = section, str(section.name)
        self.key = self.name  # of the lock and of temporary folders
        self.root = expand(section.data_dir)
        self.folder = self.root / self.name / self.VERSION
        self._held, self._without_digests = False, set[Path]()

    def is_prepared(self) -> bool:
        """See `Dataset.is_prepared`."""
        # A finished preparation is moved here in one step, its files already on the disk.
        last = self.folder / self.LAST
        with disk_errors(self.root), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(last)  # or a folder that this user may not look into would be prepared again
        return os.path.isfile(last)

    def prepare(self, log: Log = say) -> None:
        """See `Dataset.prepare`."""

        def tell(line: str) -> None:
            log(f"{self.name}: {line}")

        if self.is_prepared():
            tell(f"already prepared in {self.folder}")
            return
        # Before anything is written: a folder named by mistake leaves no trace.
        source = self._find(tell)
        with exclusive(self.root, self.key, tell):
            if self.is_prepared():
                tell(f"prepared in {self.folder} by another process")
                return
            self._build(source, tell)
        tell(f"prepared in {self.folder}")

    def digest(self) -> str:
        """See `Dataset.digest`: a published dataset is known by its name and its version here."""
        return hashlib.sha256(f"{self.name} {self.VERSION}".encode()).hexdigest()

    def files(self, split: str) -> np.ndarray | None:
        """See `Dataset.files`."""
        del split
        return None

    def groups(self, split: str) -> np.ndarray | None:
        """See `Dataset.groups`."""
        del split
        return None

    def reports(self) -> list[Path]:
        """See `Dataset.reports`."""
        return []

    def _find(self, log: Log) -> Any:
        """Finds what the user names, and writes nothing."""
        raise NotImplementedError

    def _build(self, source: Any, log: Log) -> None:
        """Builds the folder from what `_find` has found, or from what can be fetched."""
        raise NotImplementedError

    def _absent(self) -> str:
        """Says what to do about a dataset that is not prepared."""
        raise NotImplementedError

    def _require(self, split: str = "train", splits: Iterable[str] = ("train", "test")) -> None:
        if split not in splits:
            raise InputError(f"{self.name} has no split {split!r}; choose from {', '.join(splits)}")
        if not self.is_prepared():
            raise InputError(
                f"{self.name} is not prepared: there is no {self.folder}; {self._absent()}"
            )
        if not self._held:  # so that --mode=clean leaves it
            self._held = True
            with contextlib.suppress(LockedError, OSError):
                weakref.finalize(self, os.close, hold(self.folder))

    def _verify(self, *splits: str) -> None:
        """Compares the records of splits, and all that is no record, with their digests."""

        def wanted(name: str) -> bool:
            return ".array_record" not in name or any(
                f"-{split}.array_record" in name for split in splits
            )

        self._verify_files(self.folder, wanted)

    def _verify_files(self, folder: Path, wanted: Callable[[str], bool]) -> None:
        """Compares files with their digests; first computes those that an earlier version lacks."""

        def known() -> bool:
            with damage(folder):
                return digests.verify(folder, wanted)

        def add() -> None:
            if not known():
                self._say(f"{folder} was prepared without digests; computing them")
                has = digests.read(folder)["files"]
                digests.write(folder, {x: p for x, p in files_in(folder).items() if x not in has})

        if folder in self._without_digests or known():
            return
        if problem := self._make(add):
            self._without_digests.add(folder)
            self._say(f"{problem}; {folder} has no digests, and is used as it is")

    def _make(self, make: Callable[[], None]) -> str:
        """Makes something in the prepared folder; returns why it is not permitted, or ''."""
        try:
            with exclusive(self.root, self.key, self._say):
                make()
        except InputError as error:
            if getattr(error.__cause__, "errno", 0) not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return str(error)
        return ""

    def _say(self, line: str) -> None:
        say(f"{self.name}: {line}")

    @property
    def command(self) -> str:
        """The command line that prepares it."""
        return (
            f"python -m sync_jax.main --config=configs/{self.name}.py --mode=prepare "
            f"--config.data.data_dir={shlex.quote(os.fspath(self.section.data_dir))}"
        )


def expand(path: str) -> Path:
    """Makes a path absolute, `~` expanded."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise InputError(f"{path!r} names a home folder that is not known; write it out")
    return Path(os.path.abspath(expanded))


def check_folder(folder: Path, what: object = None, rest: str = "") -> None:
    """Raises an InputError where a path is no folder; `what` names it there, before `rest`."""
    if not os.path.isdir(folder):  # unlike Path's, these never raise
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{what or folder} {problem}{rest}")


@contextlib.contextmanager
def exclusive(root: Path, name: str, log: Log) -> Iterator[None]:
    """Holds the lock of a dataset.

    Where the work fails, the lock and the folders made for it go again, if nothing is in them.
    """
    path = root / f"{name}.lock"
    with disk_errors(root):
        if root.exists() and not root.is_dir():
            raise InputError(f"data.data_dir={str(root)!r} is not a folder")
        made = [x for x in (path, root / "downloads", root, *root.parents) if not x.exists()]
        try:
            root.mkdir(parents=True, exist_ok=True)
            with locked(path, waiting=lambda: log("waiting for another process that prepares it")):
                yield
        except (InputError, OSError):
            for leftover in made:
                with contextlib.suppress(OSError):
                    leftover.unlink() if leftover == path else leftover.rmdir()
            raise


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turns an error of the disk into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        place = f" ({error.filename})" if error.filename else ""
        raise InputError(f"data.data_dir={str(root)!r} cannot be used: {reason}{place}") from error


@contextlib.contextmanager
def damage(path: Path) -> Iterator[None]:
    """Turns any error while a prepared file or folder is read into a line that says what to do."""
    try:
        yield
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise what they like
        raise InputError(
            f"{path} is damaged or cannot be read ({type(error).__name__}: {one_line(error)}); "
            "delete it and prepare again"
        ) from error


def files_in(folder: Path) -> dict[str, Path]:
    """The finished files of a prepared folder, by name."""
    unfinished = (".incomplete", ".done")
    names = {path.name: path for path in sorted(folder.iterdir()) if path.is_file()}
    names.pop(digests.FILE, None)
    return {x: path for x, path in names.items() if x[0] != "." and path.suffix not in unfinished}


def check_disk(folder: Path, needed: int, what: str) -> None:
    """Raises an InputError where a disk has not as many bytes free as are needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"data.data_dir={str(folder)!r} needs {needed / 1e6:,.1f} MB {what}, "
            f"{free / 1e6:,.1f} MB are free"
        )


def incomplete_prefix(name: str) -> str:
    """The beginning of the names of a dataset's temporary folders."""
    return f"incomplete-{name}-"


def remove_leftovers(root: Path, name: str, *, keep: tuple[Path, ...] = ()) -> None:
    """Removes what killed processes left; only while holding the lock, for then none is alive."""
    for parent in (root, root / "downloads"):
        for leftover in parent.glob(f"{incomplete_prefix(name)}*"):
            if leftover not in keep:
                shutil.rmtree(leftover)


def build(dataset: Prepared, make_builder: Callable[[str], Any]) -> Any:
    """Builds beside the prepared folder, and moves there in one step what is complete.

    `make_builder` makes a TFDS builder, which is returned, given its data_dir.
    """
    prefix, target = incomplete_prefix(dataset.key), dataset.folder
    with tempfile.TemporaryDirectory(prefix=prefix, dir=dataset.root) as staging:
        builder = make_builder(staging)
        try:
            with quiet_tfds():
                builder.download_and_prepare(file_format="array_record")
        except RuntimeError as error:  # what ArrayRecord makes of a disk that fills up
            raise InputError(
                f"data.data_dir={str(dataset.root)!r} cannot be written: {one_line(error)}"
            ) from error
        built = Path(builder.data_dir)
        source = str(dataset.section.folder or dataset.section.source)
        digests.write(built, files_in(built), source and os.fspath(expand(source)))
        for path in (*built.iterdir(), built):
            flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # not a finished preparation, or we would not be here
            shutil.rmtree(target)
        built.rename(target)
        flush(target.parent)
    return builder


@contextlib.contextmanager
def quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from drawing progress bars and printing where it builds."""
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)


def tfds_info(builder: Any, features: dict[str, Any]) -> tfds.core.DatasetInfo:
    """TFDS's own description of a builder's images and labels, in their order."""
    return tfds.core.DatasetInfo(
        builder=builder,
        description=builder.name,
        features=tfds.features.FeaturesDict(features),
        supervised_keys=("image", "label"),
        disable_shuffling=True,
    )


def progress_bar() -> rich.progress.Progress:
    """A progress bar on the terminal, gone when it is done."""
    console = rich.console.Console(stderr=True)
    return rich.progress.Progress(
        *rich.progress.Progress.get_default_columns(),
        rich.progress.MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # into a file it would write empty lines
    )
