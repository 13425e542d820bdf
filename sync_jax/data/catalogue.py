"""The datasets, how they are prepared once, and how a prepared split is read.

Preparing turns the published files into ArrayRecord files in `data_dir`, through a TFDS builder:

    data_dir/<name>/<version>/      the prepared dataset; there if and only if it is complete
    data_dir/downloads/<name>/      what was fetched
    data_dir/incomplete-*/          a preparation in progress, or what is left of a killed one
"""

import contextlib
import dataclasses
import fcntl
import io
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from sync_jax.data import cifar, fashion_mnist, sources, svhn
from sync_jax.data.archives import Archives
from sync_jax.data.arrays import ArrayBuilder
from sync_jax.data.sources import DataError, Upstream

_READ_BATCH = 4096  # records read at once


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What models and pipelines need to know of a dataset.

    Attributes:
        name: as in `config.data.name`.
        num_classes: labels are 0 to num_classes - 1.
        image_shape: (height, width, channels).
        class_names: one for each label.
        mean: per channel, of the training pixels divided by 255.
        std: likewise the standard deviation.
        num_train: examples in the official training split.
        num_test: examples in the official test split.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_train: int
    num_test: int


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
        _build(name, folder, target, upstream, root)
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
    name: str, folder: Path, target: Path, upstream: Upstream | Archives, root: Path
) -> None:
    """Builds beside the target, makes sure of the result, and moves it there in one step."""
    needed = upstream.prepared_bytes
    free = shutil.disk_usage(root).free
    if free < needed:
        raise DataError(
            f"data.data_dir={str(root)!r} needs {needed / 1e6:.1f} MB to prepare {name}, "
            f"{free / 1e6:.1f} MB are free"
        )
    prefix = sources.incomplete_prefix(name)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root) as staging:
        builder = _BUILDERS[name][0](data_dir=staging, upstream=upstream)
        try:
            with _quiet_tfds():
                builder.download_and_prepare(
                    file_format="array_record",
                    download_config=tfds.download.DownloadConfig(manual_dir=folder),
                )
        except RuntimeError as error:  # what ArrayRecord makes of a disk that fills up
            raise DataError(
                f"data.data_dir={str(root)!r} cannot be written: {' '.join(str(error).split())}"
            ) from error
        built = Path(builder.data_dir)
        for path in (*built.iterdir(), built):
            _flush(path)
        target.parent.mkdir(exist_ok=True)
        if target.exists():  # not a finished preparation, or we would not be here
            shutil.rmtree(target)
        built.rename(target)
        _flush(target.parent)


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
        return _read(builder_class(data_dir=_expand(data_dir)), split)
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


def _read(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    # Records are parsed here: decoding by TFDS gives the same and takes three times as long.
    records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    images = np.empty((len(records), *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _READ_BATCH):
        stop = min(start + _READ_BATCH, len(records))
        for index, record in enumerate(records.__getitems__(range(start, stop)), start):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            pixels = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            images[index] = pixels.reshape(images.shape[1:])
            labels[index] = feature["label"].int64_list.value[0]
    return images, labels


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
