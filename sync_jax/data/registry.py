"""The datasets, how they are prepared once, and how a prepared split is read.

Here are those of small images, which are read into memory whole; `data.pictures` has the others.
Preparing turns the published files into ArrayRecord files in `data_dir`, through a TFDS builder:

    data_dir/<name>/<version>/      the prepared dataset; there if and only if it is complete
    data_dir/downloads/<name>/      what was fetched
    data_dir/incomplete-*/          a preparation in progress, or what is left of a killed one
"""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.datasets import cifar, fashion_mnist, svhn
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare import pictures
from sync_jax.data.prepare.arrays import ArrayBuilder, read_arrays
from sync_jax.data.prepare.download import DataError, Upstream
from sync_jax.data.prepare.published import Archives
from sync_jax.data.prepare.records import DecodedPictures, check_disk
from sync_jax.data.prepare.squares import Squares
from sync_jax.data.prepare.staging import build, exclusive, expand, remove_leftovers
from sync_jax.runtime.console import say

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
NAMES = (*DATASETS, *pictures.NAMES)

# What gives `[n, height, width, channels]` uint8 when it is sliced.
Images = np.ndarray | Squares | DecodedPictures

# Of the `data` section of a config:


def dataset_info(section: ConfigDict) -> DatasetInfo | None:
    """What is known of a config's dataset; None of a folder's that is not prepared.

    Raises:
        DataError: the prepared dataset is damaged, or a folder's pictures have changed since.
    """
    if section.name in pictures.NAMES:
        return pictures.dataset_info(section)
    return DATASETS[section.name]


def is_ready(section: ConfigDict) -> bool:
    """Says whether a config's dataset is prepared."""
    if section.name in pictures.NAMES:
        return pictures.is_prepared(section)
    return is_prepared(section.name, data_dir=section.data_dir)


def make_ready(section: ConfigDict, log: Callable[[str], None] = say) -> Path:
    """Prepares a config's dataset where it is not prepared; see `prepare`.

    Raises:
        DataError: it cannot be.
    """
    if section.name in pictures.NAMES:
        return pictures.prepare(section, log)
    return prepare(section.name, data_dir=section.data_dir, source=section.source or None, log=log)


def load(section: ConfigDict, split: str, *, decode: bool = False) -> tuple[Images, np.ndarray]:
    """A split of a config's dataset: images and labels; see `load_split` and `pictures.load`.

    Raises:
        DataError: it is not prepared, or damaged.
    """
    if section.name in pictures.NAMES:
        return pictures.load(section, split, decode=decode)
    return load_split(section.name, split, data_dir=section.data_dir)


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
    return expand(data_dir) / name / str(builder.VERSION)


def prepare(
    name: str,
    *,
    data_dir: str | os.PathLike,
    source: str | os.PathLike | None = None,
    log: Callable[[str], None] = say,
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
    root = expand(data_dir)
    upstream = upstream or _BUILDERS[name][1]
    if is_prepared(name, data_dir=data_dir):
        log(f"{name}: already prepared in {target}")
        return target
    # Before anything is written: a folder named by mistake leaves no trace.
    named = _named_folder(source, upstream) if source else None
    with exclusive(root, name, log):
        if is_prepared(name, data_dir=data_dir):
            log(f"{name}: prepared in {target} by another process")
            return target
        remove_leftovers(root, name)
        if named is None:
            folder = _obtain(name, upstream, root, log)
        else:
            log(f"{name}: using the files in {named}")
            folder = named
        check_disk(root, upstream.prepared_bytes, f"to prepare {name}")
        build(
            name,
            lambda staging: _BUILDERS[name][0](data_dir=staging, upstream=upstream),
            target,
            root=root,
            manual_dir=folder,
        )
    log(f"{name}: prepared in {target}")
    return target


def _named_folder(source: str | os.PathLike, upstream: Upstream | Archives) -> Path:
    folder = expand(source)
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
        return read_arrays(builder_class(data_dir=expand(data_dir)), split)
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
