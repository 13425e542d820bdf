"""The datasets, how they are prepared once, and how a prepared split is read.

Preparing turns the published files into ArrayRecord files in `data_dir`, through a TFDS builder:

    data_dir/<name>/<version>/      the prepared dataset; there if and only if it is complete
    data_dir/downloads/<name>/      what was fetched
    data_dir/incomplete-*/          a preparation in progress, or what is left of a killed one
"""

import contextlib
import fcntl
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from sync_jax.data import cifar, fashion_mnist, image_folder, sources, svhn
from sync_jax.data.archives import Archives
from sync_jax.data.arrays import ArrayBuilder, read_arrays
from sync_jax.data.info import DatasetInfo
from sync_jax.data.sources import DataError, Upstream

DATASETS = {
    "fashion_mnist": DatasetInfo(
        name="fashion_mnist",
        num_classes=len(fashion_mnist.CLASS_NAMES),
        image_shape=fashion_mnist.IMAGE_SHAPE,
        class_names=fashion_mnist.CLASS_NAMES,
        mean=(0.2860406,),
        std=(0.3530242,),
        num_train=60_000,
        num_test=10_000,
    ),
    # Means and deviations of the three are those of the field's codes, for the same numbers.
    "cifar10": DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_shape=cifar.IMAGE_SHAPE,
        class_names=cifar.CIFAR10_CLASS_NAMES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_train=50_000,
        num_test=10_000,
    ),
    "cifar100": DatasetInfo(
        name="cifar100",
        num_classes=100,
        image_shape=cifar.IMAGE_SHAPE,
        class_names=cifar.CIFAR100_CLASS_NAMES,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
        num_train=50_000,
        num_test=10_000,
    ),
    "svhn": DatasetInfo(
        name="svhn",
        num_classes=10,
        image_shape=svhn.IMAGE_SHAPE,
        class_names=svhn.CLASS_NAMES,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_train=73_257,
        num_test=26_032,
    ),
}
_BUILDERS: dict[str, tuple[type[ArrayBuilder], Upstream | Archives]] = {
    "fashion_mnist": (fashion_mnist.FashionMnist, fashion_mnist.UPSTREAM),
    "cifar10": (cifar.Cifar10, cifar.CIFAR10_UPSTREAM),
    "cifar100": (cifar.Cifar100, cifar.CIFAR100_UPSTREAM),
    "svhn": (svhn.Svhn, svhn.UPSTREAM),
}


FOLDER = image_folder.NAME
NAMES = (*DATASETS, FOLDER)


# Of the `data` section of a config: a published dataset or a folder of the user's.


def dataset_info(section: ConfigDict) -> DatasetInfo | None:
    """What is known of a config's dataset; None of a folder's that is not prepared.

    Raises:
        DataError: the prepared folder is damaged, or the pictures have changed since.
    """
    if section.name == FOLDER:
        return image_folder.read_info(folder_target(section), section.folder)
    return DATASETS[section.name]


def is_ready(section: ConfigDict) -> bool:
    """Says whether a config's dataset is prepared."""
    if section.name == FOLDER:
        return (folder_target(section) / image_folder.INFO).is_file()
    return is_prepared(section.name, data_dir=section.data_dir)


def make_ready(section: ConfigDict, log: Callable[[str], None] = print) -> Path:
    """Prepares a config's dataset where it is not prepared; see `prepare`.

    Raises:
        DataError: it cannot be.
    """
    if section.name != FOLDER:
        return prepare(
            section.name, data_dir=section.data_dir, source=section.source or None, log=log
        )
    target, root = folder_target(section), _expand(section.data_dir)
    if is_ready(section):
        log(f"{FOLDER}: already prepared in {target}")
        return target
    tree = image_folder.scan(_expand(section.folder))
    log(f"{FOLDER}: {tree.describe()}")
    with _disk_errors(root), _exclusive(root, target.parent.name, log):
        if is_ready(section):
            log(f"{FOLDER}: prepared in {target} by another process")
            return target
        _remove_leftovers(root, target.parent.name)
        bad = _build(
            target.parent.name,
            lambda staging: image_folder.ImageFolder(
                tree=tree, size=section.image_size, data_dir=staging
            ),
            target,
            needed=image_folder.prepared_bytes(tree, section.image_size),
            root=root,
        ).finish()
    for line in bad:
        log(f"{FOLDER}: {line}")
    log(f"{FOLDER}: prepared in {target}")
    return target


def load(section: ConfigDict, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a split of a config's dataset; see `load_split`.

    Raises:
        DataError: it is not prepared, or damaged.
    """
    if section.name == FOLDER:
        return image_folder.load_split(folder_target(section), split)
    return load_split(section.name, split, data_dir=section.data_dir)


def folder_target(section: ConfigDict) -> Path:
    """Where the pictures of `data.folder` are once they are prepared."""
    key = image_folder.key(_expand(section.folder), section.image_size)
    return _expand(section.data_dir) / FOLDER / key / str(image_folder.ImageFolder.VERSION)


def is_prepared(name: str, *, data_dir: str | os.PathLike) -> bool:
    """Says whether `load_split` will find a dataset.

    Args:
        name: a key of `DATASETS`.
        data_dir: where datasets are prepared; `~` is expanded.

    Raises:
        DataError: there is no such dataset.
    """
    # A finished preparation is moved here in one step, its files already on the disk.
    return os.path.isfile(prepared_folder(name, data_dir=data_dir) / "dataset_info.json")


def prepared_folder(name: str, *, data_dir: str | os.PathLike) -> Path:
    """The folder that holds a dataset once it is prepared.

    Args:
        name: a key of `DATASETS`.
        data_dir: where datasets are prepared; `~` is expanded.

    Raises:
        DataError: there is no such dataset.
    """
    if name not in _BUILDERS:
        raise DataError(f"data.name={name!r} is no dataset; choose from {', '.join(DATASETS)}")
    builder, _ = _BUILDERS[name]
    return _expand(data_dir) / name / str(builder.VERSION)


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    log: Callable[[str], None] = print,
    upstream: Upstream | Archives | None = None,
) -> Path:
    """Obtains a dataset's files, verifies them and writes them as ArrayRecord; once is enough.

    Interrupted at any moment, it leaves nothing that passes for prepared, and can be run again. Run
    by several processes at once, the first prepares and the others wait for it.

    Args:
        name: a key of `DATASETS`.
        data_dir: where to prepare; made when needed; `~` is expanded.
        source: a folder that holds the files. No other source is tried then, for whoever names one
            wants that one, or has no network. None or "": see `sources.obtain`.
        log: told what is done and which source is used, a line at a time.
        upstream: the files and where they may be had, if not the dataset's own.

    Returns:
        The prepared folder.

    Raises:
        DataError: there is no such dataset, it cannot be obtained, or data_dir cannot be written.
    """
    target = prepared_folder(name, data_dir=data_dir)
    root = _expand(data_dir)
    upstream = upstream or _BUILDERS[name][1]
    if is_prepared(name, data_dir=data_dir):
        log(f"{name}: already prepared in {target}")
        return target
    # Before anything is written: a folder named by mistake leaves no trace.
    named = _named_folder(source, upstream) if source else None
    with _disk_errors(root), _exclusive(root, name, log):
        if is_prepared(name, data_dir=data_dir):
            log(f"{name}: prepared in {target} by another process")
            return target
        _remove_leftovers(root, name)
        if named is None:
            folder = _obtain(name, upstream, root, log)
        else:
            log(f"{name}: using the files in {named}")
            folder = named
        _build(
            name,
            lambda staging: _BUILDERS[name][0](data_dir=staging, upstream=upstream),
            target,
            needed=upstream.prepared_bytes,
            root=root,
            manual_dir=folder,
        )
    log(f"{name}: prepared in {target}")
    return target


def _expand(path: str | os.PathLike) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _named_folder(source: str | os.PathLike, upstream: Upstream | Archives) -> Path:
    folder = _expand(source)
    try:
        upstream.verify(folder)
    except DataError as error:
        raise DataError(
            f"data.source={os.fspath(source)!r}: {error}; it must hold {upstream.required}; "
            "without data.source other sources are tried"
        ) from None
    return folder


def _obtain(
    name: str, upstream: Upstream | Archives, root: Path, log: Callable[[str], None]
) -> Path:
    try:
        return upstream.obtain(
            cache=root / "downloads" / name, log=lambda line: log(f"{name}: {line}")
        )
    except DataError as error:
        raise DataError(
            f"{name} cannot be obtained: {error}; with the files in a folder of yours, say "
            "--config.data.source=FOLDER"
        ) from None


def _build(
    name: str,
    make_builder: Callable[[str], Any],
    target: Path,
    *,
    needed: int,
    root: Path,
    manual_dir: Path | None = None,
) -> Any:
    """Builds beside the target, makes sure of the result, and moves it there in one step."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DataError(
            f"data.data_dir={str(root)!r} needs {needed / 1e6:.1f} MB to prepare {name}, "
            f"{free / 1e6:.1f} MB are free"
        )
    prefix = sources.incomplete_prefix(name)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as staging:
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
        if isinstance(builder, image_folder.ImageFolder):
            builder.write_info(built)
        for path in (*built.iterdir(), built):
            _flush(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # not a finished preparation, or we would not be here
            shutil.rmtree(target)
        built.rename(target)
        _flush(target.parent)
    return builder


def load_split(
    name: str, split: str, *, data_dir: str | os.PathLike
) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split of a prepared dataset into memory.

    Args:
        name: a key of `DATASETS`.
        split: "train" or "test", the official splits.
        data_dir: where the dataset was prepared; `~` is expanded.

    Returns:
        images `[n, height, width, channels]` uint8 and labels `[n]` int32, in published order.

    Raises:
        DataError: there is no such dataset or split, it is not prepared, or it is damaged.
    """
    folder = prepared_folder(name, data_dir=data_dir)
    if split not in ("train", "test"):
        raise DataError(f"{name} has no split {split!r}; choose from train, test")
    builder_class, upstream = _BUILDERS[name]
    if not is_prepared(name, data_dir=data_dir):
        raise DataError(
            f"{name} is not prepared: there is no {folder}; prepare it with "
            f"`{_command(name, data_dir)}`, which finds or fetches "
            f"{upstream.fetched}, or takes them from a folder of yours with "
            "--config.data.source=FOLDER"
        )
    try:
        return read_arrays(builder_class(data_dir=_expand(data_dir)), split)
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise what they like
        raise DataError(
            f"{folder} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); "
            f"if it is damaged, delete it and prepare again with `{_command(name, data_dir)}`"
        ) from error


def _command(name: str, data_dir: str | os.PathLike) -> str:
    folder = shlex.quote(os.fspath(data_dir))
    return (
        f"python -m sync_jax.main --config=configs/{name}.py --mode=prepare "
        f"--config.data.data_dir={folder}"
    )


def _remove_leftovers(root: Path, name: str) -> None:
    """Removes what killed processes left; only while holding the lock, for then none is alive."""
    for parent in (root, root / "downloads"):
        for leftover in parent.glob(f"{sources.incomplete_prefix(name)}*"):
            shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    """Makes sure that a file or folder is on the disk, so that a power cut cannot undo it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        place = f" ({error.filename})" if error.filename else ""
        raise DataError(f"data.data_dir={str(root)!r} cannot be used: {reason}{place}") from error


@contextlib.contextmanager
def _exclusive(root: Path, name: str, log: Callable[[str], None]) -> Iterator[None]:
    """Holds the dataset's lock, which the system lets go of even when the process is killed."""
    if root.exists() and not root.is_dir():
        raise DataError(f"data.data_dir={str(root)!r} is not a folder")
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{name}: waiting for another process that prepares it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Keeps TFDS from drawing progress bars and printing where it builds."""
    tfds.display_progress_bar(False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(True)
