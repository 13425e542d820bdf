"""The user's own pictures: a folder per class, prepared once as small squares.

    folder/<class>/<picture>                 a fifth of each class becomes the test split
    folder/train/<class>/..., folder/test/<class>/...
                                             the test split as given; also called val or validation

Where there are train, val and test, val joins train: the calibration split is held out of both.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tensorflow_datasets as tfds

from sync_jax.data.arrays import read_arrays
from sync_jax.data.images import SUFFIXES, BadImageError, load_square
from sync_jax.data.info import DatasetInfo
from sync_jax.data.sources import DataError
from sync_jax.data.splits import stratified_split

NAME = "image_folder"
INFO = "sync_jax.json"  # in the prepared folder, written last
BAD_FILES = "bad_files.txt"
_TRAIN, _TEST = ("train", "training"), ("test", "testing", "val", "valid", "validation")
_TEST_SHARE = 5  # one in so many, where the tree has no split folders
_AT_ONCE = 512  # pictures decoded before they are written


@dataclasses.dataclass(frozen=True)
class Tree:
    """The pictures of a folder.

    Attributes:
        folder: absolute.
        class_names: the folders' names, sorted; a label is a position here.
        files: by split, (path relative to the folder, label), sorted.
        ignored: files that are no pictures by their names.
        digest: of all names, sizes and times of change.
    """

    folder: Path
    class_names: tuple[str, ...]
    files: dict[str, list[tuple[str, int]]]
    ignored: int
    digest: str

    def describe(self) -> str:
        """One line."""
        counts = ", ".join(f"{len(files):,} for {split}" for split, files in self.files.items())
        ignored = f"; {self.ignored:,} other files ignored" if self.ignored else ""
        return f"{len(self.class_names)} classes in {self.folder}: {counts}{ignored}"


def scan(folder: Path) -> Tree:
    """Finds the pictures of a folder; opens none.

    Raises:
        DataError: it cannot be read, or is not laid out as above; says what was found.
    """
    where = f"config.data.folder={str(folder)!r}"
    if not folder.is_dir():
        raise DataError(f"{where} {'is not a folder' if folder.exists() else 'does not exist'}")
    try:
        splits, stray = _split_folders(folder)
        found = {
            split: [entry for path in paths for entry in _pictures(folder, path)]
            for split, paths in splits.items()
        }
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror} ({error.filename})") from error
    classes = sorted({name for entries in found.values() for name, *_ in entries})
    pictures = {
        split: sorted((path, name) for name, path, _ in entries if path)
        for split, entries in found.items()
    }
    ignored = sum(count for entries in found.values() for *_, count in entries)
    if len(classes) < 2:
        loose = f"{stray} pictures directly in it and " if stray else ""
        raise DataError(
            f"{where} has {loose}{len(classes)} folder{'s' * (len(classes) != 1)} of pictures; it "
            "must hold one per class, of two classes or more: FOLDER/<class>/<picture>"
        )
    for split, entries in pictures.items():
        empty = sorted(set(classes) - {name for _, name in entries})
        if empty:
            raise DataError(
                f"{where}: {split} has no picture of {', '.join(map(repr, empty[:5]))}"
                f"{' and others' if len(empty) > 5 else ''}; known are {', '.join(SUFFIXES)}"
            )
    label = {name: i for i, name in enumerate(classes)}
    files = {split: [(p, label[name]) for p, name in pictures[split]] for split in pictures}
    if "test" not in files:
        files = _hold_out(files["train"], len(classes), where)
    return Tree(folder, tuple(classes), files, ignored, _digest(folder, files))


def _split_folders(folder: Path) -> tuple[dict[str, list[Path]], int]:
    """The folders that hold class folders, by split, and how many pictures lie beside them."""
    below = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    folders = [path for path in below if path.is_dir()]
    stray = sum(path.suffix.lower() in SUFFIXES for path in below if not path.is_dir())
    train = [path for path in folders if path.name.lower() in _TRAIN]
    test = [path for path in folders if path.name.lower() in _TEST]
    if not train or len(train) + len(test) < len(folders):
        return {"train": [folder]}, stray
    if not test:
        return {"train": train}, stray
    # Of test and val, test is the test split.
    chosen = [path for path in test if path.name.lower().startswith("test")] or test
    rest = [path for path in test if path not in chosen]
    return {"train": train + rest, "test": chosen}, stray


def _pictures(folder: Path, root: Path) -> Iterator[tuple[str, str, int]]:
    """(class, path relative to the folder, 0) of each picture; ("", 1) for other files' paths."""
    for class_folder in sorted(root.iterdir()):
        if class_folder.name.startswith(".") or not class_folder.is_dir():
            continue
        yield class_folder.name, "", 0  # the class, even when it is empty
        for parent, names, files in os.walk(class_folder):
            names[:] = sorted(name for name in names if not name.startswith("."))
            for name in sorted(files):
                if name.startswith("."):
                    continue
                if os.path.splitext(name)[1].lower() in SUFFIXES:
                    path = os.path.relpath(os.path.join(parent, name), folder)
                    yield class_folder.name, path, 0
                else:
                    yield class_folder.name, "", 1


def _hold_out(
    files: list[tuple[str, int]], num_classes: int, where: str
) -> dict[str, list[tuple[str, int]]]:
    """A fifth of each class for test: the same one every time."""
    labels = np.asarray([label for _, label in files])
    smallest = int(np.bincount(labels, minlength=num_classes).min())
    if smallest < _TEST_SHARE:
        raise DataError(
            f"{where}: a class has {smallest} pictures; at least {_TEST_SHARE} of each are needed "
            "to hold some out for test, or give train and test folders of your own"
        )
    kept, held_out = stratified_split(labels, holdout=len(files) // _TEST_SHARE, seed=0)
    return {"train": [files[i] for i in kept], "test": [files[i] for i in held_out]}


def _digest(folder: Path, files: dict[str, list[tuple[str, int]]]) -> str:
    digest = hashlib.sha256()
    for split, entries in sorted(files.items()):
        for path, label in entries:
            status = os.stat(folder / path)
            line = f"{split}\0{path}\0{label}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def key(folder: Path, size: int) -> str:
    """The name under which a folder's pictures are prepared at a size."""
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.name)[:40] or "root"
    path = os.fsencode(os.path.realpath(folder))
    return f"{word}-{hashlib.sha256(path).hexdigest()[:8]}-{size}px"


def prepared_bytes(tree: Tree, size: int) -> int:
    """Disk that the prepared squares take, generously."""
    return sum(map(len, tree.files.values())) * (3 * size * size + 500)


class ImageFolder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The user's own pictures as squares of raw bytes."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, tree: Tree, size: int, **kwargs: Any):
        """Takes the pictures, pixels of a side, and what TFDS takes."""
        self._tree, self._size = tree, size
        self._bad: list[str] = []
        self._written = dict.fromkeys(tree.files, 0)
        self._sum = np.zeros(3, np.float64)
        self._squares = np.zeros(3, np.float64)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=(self._size, self._size, 3),
            dtype=np.uint8,
            encoding=tfds.features.Encoding.BYTES,
        )
        label = tfds.features.ClassLabel(num_classes=len(self._tree.class_names))
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pictures of a folder per class.",
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._tree.files}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        files = self._tree.files[split]
        labels_seen = set()
        # Pillow lets go of Python's lock while it decodes, so threads do.
        with (
            ThreadPool(os.cpu_count()) as pool,
            rich.progress.Progress(
                console=rich.console.Console(stderr=True), transient=True
            ) as progress,
        ):
            task = progress.add_task(f"{split}: decoding", total=len(files))
            for start in range(0, len(files), _AT_ONCE):
                part = files[start : start + _AT_ONCE]
                for (path, label), image in zip(part, pool.map(self._load, part), strict=True):
                    if isinstance(image, str):
                        self._bad.append(f"{path}: {image}")
                        continue
                    if split == "train":
                        pixels = image.reshape(-1, 3) / 255.0
                        self._sum += pixels.mean(axis=0)
                        self._squares += (pixels**2).mean(axis=0)
                    labels_seen.add(label)
                    yield self._written[split], {"image": image, "label": label}
                    self._written[split] += 1
                progress.update(task, advance=len(part))
        lost = sorted(set(range(len(self._tree.class_names))) - labels_seen)
        if lost:
            raise DataError(
                f"config.data.folder={str(self._tree.folder)!r}: {split} has no readable picture "
                f"of {self._tree.class_names[lost[0]]!r}; {'; '.join(self._bad[-3:])}"
            )

    def _load(self, entry: tuple[str, int]) -> np.ndarray | str:
        try:
            return load_square(self._tree.folder / entry[0], self._size)
        except BadImageError as error:
            return str(error)

    def write_info(self, folder: Path) -> None:
        """Writes what `read_info` reads, and the list of bad files."""
        count = self._written["train"]
        mean = self._sum / count
        std = np.sqrt(np.maximum(self._squares / count - mean**2, 1e-6))
        if self._bad:
            (folder / BAD_FILES).write_text(
                "".join(f"{line}\n" for line in self._bad), errors="surrogateescape"
            )
        contents = {
            "folder": os.fsencode(self._tree.folder).decode(errors="replace"),
            "class_names": [
                os.fsencode(n).decode(errors="replace") for n in self._tree.class_names
            ],
            "size": self._size,
            "mean": mean.tolist(),
            "std": std.tolist(),
            "num_train": count,
            "num_test": self._written["test"],
            "bad_files": len(self._bad),
            "digest": self._tree.digest,
        }
        (folder / INFO).write_text(json.dumps(contents, indent=1) + "\n")

    def finish(self) -> list[str]:
        """What to say of bad files: a line each for the first, and how many there are."""
        if not self._bad:
            return []
        total = sum(map(len, self._tree.files.values()))
        lines = [f"cannot be read, left out: {line}" for line in self._bad[:5]]
        lines.append(f"{len(self._bad):,} of {total:,} pictures left out; all are in {BAD_FILES}")
        return lines


def read_info(prepared: Path, folder: str) -> DatasetInfo | None:
    """What is known of a prepared folder; None where it is not prepared.

    Args:
        prepared: where it is.
        folder: the pictures; they need not be there any more.

    Raises:
        DataError: it is damaged, or the pictures have changed since.
    """
    path = prepared / INFO
    if not path.is_file():
        return None
    try:
        known = json.loads(path.read_text())
        info = DatasetInfo(
            name=NAME,
            num_classes=len(known["class_names"]),
            image_shape=(known["size"], known["size"], 3),
            class_names=tuple(known["class_names"]),
            mean=tuple(known["mean"]),
            std=tuple(known["std"]),
            num_train=known["num_train"],
            num_test=known["num_test"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {prepared}") from error
    pictures = Path(os.path.abspath(os.path.expanduser(folder)))
    if pictures.is_dir() and scan(pictures).digest != known.get("digest"):
        raise DataError(
            f"the pictures in {pictures} have changed since they were prepared; delete {prepared} "
            "to prepare them again, or name another --config.data.data_dir"
        )
    return info


def load_split(prepared: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a prepared split; see `catalogue.load_split`.

    Raises:
        DataError: it is not prepared, or damaged.
    """
    if not (prepared / INFO).is_file():
        raise DataError(f"there is no {prepared}; --mode=prepare makes it")
    try:
        return read_arrays(tfds.builder_from_directory(prepared), split)
    except Exception as error:  # TFDS, ArrayRecord and protobuf raise what they like
        raise DataError(
            f"{prepared} cannot be read ({type(error).__name__}: {' '.join(str(error).split())}); "
            "if it is damaged, delete it and prepare again"
        ) from error
