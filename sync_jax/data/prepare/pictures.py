"""The datasets of encoded pictures: published ones, which the user has, and folders of the user's.

    data_dir/<name>/<version>/                  prepared; there if and only if it is complete
    data_dir/image_folder/<folder>/<version>/   likewise, a folder's
    data_dir/incomplete-*/                      a preparation in progress or stopped

All functions take the `data` section of a config.
"""

import dataclasses
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from sync_jax.data.datasets import food101, image_folder, imagenet100, stanford_cars
from sync_jax.data.images import Layout
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import Listing
from sync_jax.data.prepare.download import DataError, incomplete_prefix
from sync_jax.data.prepare.records import (
    INFO,
    DecodedPictures,
    PictureBuilder,
    Records,
    check_disk,
    read_info,
)
from sync_jax.data.prepare.squares import Squares, make_squares, open_squares
from sync_jax.data.prepare.staging import build, disk_errors, exclusive, expand, remove_leftovers
from sync_jax.runtime.console import say

FOLDER = image_folder.NAME
# ImageNet's mean and deviation, which the field's codes use for all of these.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_OVERHEAD = 1.05  # records take a little more than what is in them
_RESERVE = 10_000_000  # bytes


@dataclasses.dataclass(frozen=True)
class Published:
    """A dataset that the user must fetch.

    Attributes:
        builder: of its records.
        find: (the user's folder, one for temporary files, log) to its pictures.
        needed: what the folder must hold, in words.
        how: where that can be had.
        num_classes: of it.
        num_train: examples of the official training split.
        num_test: likewise.
    """

    builder: type[PictureBuilder]
    find: Callable[[Path, Path, Callable[[str], None]], Listing]
    needed: str
    how: str
    num_classes: int
    num_train: int
    num_test: int


PUBLISHED = {
    "imagenet100": Published(
        imagenet100.Imagenet100,
        lambda folder, scratch, log: imagenet100.find(folder),
        imagenet100.NEEDED,
        imagenet100.HOW,
        100,
        imagenet100.NUM_TRAIN,
        imagenet100.NUM_TEST,
    ),
    "stanford_cars": Published(
        stanford_cars.StanfordCars,
        lambda folder, scratch, log: stanford_cars.find(folder),
        stanford_cars.NEEDED,
        stanford_cars.HOW,
        stanford_cars.NUM_CLASSES,
        stanford_cars.NUM_TRAIN,
        stanford_cars.NUM_TEST,
    ),
    "food101": Published(
        food101.Food101,
        food101.find,
        food101.NEEDED,
        food101.HOW,
        food101.NUM_CLASSES,
        food101.NUM_TRAIN,
        food101.NUM_TEST,
    ),
}
NAMES = (*PUBLISHED, FOLDER)


def prepared_folder(section: ConfigDict) -> Path:
    """Where the records are once they are prepared."""
    root = expand(section.data_dir)
    if section.name == FOLDER:
        key = image_folder.key(expand(section.folder))
        return root / FOLDER / key / str(image_folder.ImageFolder.VERSION)
    return root / section.name / str(PUBLISHED[section.name].builder.VERSION)


def is_prepared(section: ConfigDict) -> bool:
    """Says whether the records are there; of squares see `prepare_squares`."""
    return (prepared_folder(section) / INFO).is_file()


def dataset_info(section: ConfigDict) -> DatasetInfo | None:
    """What is known of the dataset; of one that is not prepared what is published, or None.

    Raises:
        DataError: the prepared folder is damaged, or the folder's pictures have changed since.
    """
    known = read_info(prepared_folder(section), section.name, section.image_size)
    if section.name != FOLDER:
        published = PUBLISHED[section.name]
        if known is not None:
            return dataclasses.replace(known[0], mean=_MEAN, std=_STD)
        return DatasetInfo(
            name=section.name,
            num_classes=published.num_classes,
            image_shape=(section.image_size, section.image_size, 3),
            class_names=tuple(map(str, range(published.num_classes))),
            mean=_MEAN,
            std=_STD,
            num_train=published.num_train,
            num_test=published.num_test,
        )
    if known is None:
        return None
    info, digest = known
    folder = expand(section.folder)
    # The pictures need not be there any more; if they are, they must be the same.
    if os.path.isdir(folder) and image_folder.scan(folder).listing.digest() != digest:
        raise DataError(
            f"the pictures in {folder} have changed since they were prepared; delete "
            f"{prepared_folder(section)} to prepare them again, or name another "
            "--config.data.data_dir"
        )
    return info


def listed_info(section: ConfigDict) -> DatasetInfo | None:
    """What the files' names say of a folder that is not prepared; None where there is no folder.

    Upper bounds of its sizes, for a file may turn out to be no picture.

    Raises:
        DataError: the folder is not laid out as it should be.
    """
    folder = expand(section.folder)
    if not os.path.isdir(folder):
        return None
    listing = image_folder.scan(folder).listing
    return DatasetInfo(
        name=section.name,
        num_classes=len(listing.class_names),
        image_shape=(section.image_size, section.image_size, 3),
        class_names=listing.class_names,
        mean=_MEAN,
        std=_STD,
        num_train=len(listing.splits["train"]),
        num_test=len(listing.splits["test"]),
    )


def prepare(section: ConfigDict, log: Callable[[str], None] = say) -> Path:
    """Writes the pictures as ArrayRecord, each once decoded to be sure that it can be.

    Interrupted at any moment, it leaves nothing that passes for prepared, and goes on from there
    when it is run again. Run by several processes at once, the first prepares, the others wait.

    Returns:
        The prepared folder.

    Raises:
        DataError: the pictures are not where they should be, or data_dir cannot be written.
    """
    target, root = prepared_folder(section), expand(section.data_dir)
    name = section.name if section.name != FOLDER else target.parent.name
    if is_prepared(section):
        log(f"{section.name}: already prepared in {target}")
        return target
    scratch = root / f"{incomplete_prefix(name)}unpacked"
    builder, listing = _find(section, scratch, log)
    with disk_errors(root):
        digest = listing.digest()
        work = root / f"{incomplete_prefix(name)}{digest[:16]}"
    with exclusive(root, name, log):
        if is_prepared(section):
            log(f"{section.name}: prepared in {target} by another process")
            return target
        remove_leftovers(root, name, keep=(work, scratch))
        if work.is_dir():
            log(f"{section.name}: going on with a preparation that was stopped")
        written = sum(path.stat().st_size for path in work.glob("*")) if work.is_dir() else 0
        needed = int(listing.num_bytes() * _OVERHEAD) + _RESERVE - written
        check_disk(root, needed, f"to prepare {name}")
        said: list[str] = []

        def finish(built: PictureBuilder, folder: Path) -> None:
            said.extend(built.write_info(folder, digest=digest))

        build(
            name,
            lambda staging: builder(listing=listing, work=work, data_dir=staging),
            target,
            root=root,
            finish=finish,
        )
        for leftover in (work, scratch):
            shutil.rmtree(leftover, ignore_errors=True)
    for line in (*said, f"prepared in {target}"):
        log(f"{section.name}: {line}")
    return target


def prepare_squares(section: ConfigDict, log: Callable[[str], None] = say) -> None:
    """Makes the squares for device memory where they are not made.

    Raises:
        DataError: the records are not prepared or are damaged, or there is no room.
    """
    target, root = prepared_folder(section), expand(section.data_dir)
    layout = Layout.of(section)
    name = section.name if section.name != FOLDER else target.parent.name
    _require(section)
    for split in ("train", "test"):
        _records(section, split)
    with exclusive(root, name, log):
        make_squares(
            target,
            layout,
            ("train", "test"),
            log=lambda line: log(f"{section.name}: {line}"),
        )


def load(
    section: ConfigDict, split: str, *, decode: bool
) -> tuple[Squares | DecodedPictures, np.ndarray]:
    """A split's pictures and labels; neither is read into memory as a whole.

    Args:
        section: of the config.
        split: "train" or "test".
        decode: from the records whenever they are asked for, rather than from the squares.

    Returns:
        What gives `[n, size, size, 3]` uint8 when it is sliced, and labels `[n]` int32.

    Raises:
        DataError: it is not prepared, or damaged.
    """
    _require(section)
    target, layout = prepared_folder(section), Layout.of(section)
    records, labels = _records(section, split)
    rows = np.arange(len(labels))
    if decode:
        return DecodedPictures(records, rows, layout), labels
    return Squares(open_squares(target, layout, split), rows, layout.size), labels


def _records(section: ConfigDict, split: str) -> tuple[Records, np.ndarray]:
    """The records of a split, and their labels."""
    target = prepared_folder(section)
    records = Records(target, split)
    labels = records.labels()
    known = read_info(target, section.name, section.image_size)
    if known is not None and labels.max() >= known[0].num_classes:
        raise DataError(f"{target} is damaged: {split} has labels beyond its classes; delete it")
    return records, labels


def _require(section: ConfigDict) -> None:
    if not is_prepared(section):
        raise DataError(_absent(section))


def _absent(section: ConfigDict) -> str:
    """What to do about a dataset that is not prepared."""
    where = f"{section.name} is not prepared: there is no {prepared_folder(section)}"
    options = f"--config.data.data_dir={shlex.quote(os.fspath(section.data_dir))}"
    command = f"python -m sync_jax.main --config=configs/{section.name}.py --mode=prepare {options}"
    if section.name == FOLDER:
        return f"{where}; `{command} --config.data.folder=FOLDER` prepares it"
    published = PUBLISHED[section.name]
    return (
        f"{where}; put into a folder {published.needed} ({published.how}) and prepare it with "
        f"`{command} --config.data.source=FOLDER`"
    )


def _find(
    section: ConfigDict, scratch: Path, log: Callable[[str], None]
) -> tuple[type[PictureBuilder], Listing]:
    if section.name == FOLDER:
        tree = image_folder.scan(expand(section.folder))
        log(f"{FOLDER}: {tree.describe()}")
        return image_folder.ImageFolder, tree.listing
    if not section.source:
        raise DataError(_absent(section))
    published, folder = PUBLISHED[section.name], expand(section.source)
    if not os.path.isdir(folder):
        problem = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise DataError(
            f"data.source={section.source!r} {problem}; it must hold {published.needed}"
        )
    log(f"{section.name}: looking for the pictures in {folder}")
    with disk_errors(scratch.parent):
        listing = published.find(folder, scratch, log)
    counts = {split: len(pictures) for split, pictures in listing.splits.items()}
    line = ", ".join(f"{count:,} for {split}" for split, count in counts.items())
    log(f"{section.name}: {len(listing.class_names)} classes: {line}")
    expected = {"train": published.num_train, "test": published.num_test}
    if counts != expected:
        log(f"{section.name}: published are {expected['train']:,} and {expected['test']:,}")
    return published.builder, listing
