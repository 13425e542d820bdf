"""ImageNet-100: 100 classes of ILSVRC 2012, those of Contrastive Multiview Coding.

126,689 training pictures; the 5,000 validation pictures of these classes are the test split. Only
the 100 classes' pictures are read, a tenth of the archive's bytes.
"""

import importlib.resources
import os
import re
from collections.abc import Iterable
from pathlib import Path

from sync_jax.data.prepare.archives import Listing, Picture, is_picture, tar_members
from sync_jax.data.prepare.pictures import PublishedPictures
from sync_jax.data.prepare.staging import Log
from sync_jax.errors import InputError

_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
_VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


def class_names() -> tuple[str, ...]:
    """The classes' WordNet ids; a label is a position here."""
    data = importlib.resources.files("sync_jax.data.datasets")
    text = data.joinpath("imagenet100.txt").read_text()
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


class Imagenet100(PublishedPictures):
    """ImageNet-100."""

    NUM_CLASSES, NUM_TRAIN, NUM_TEST = 100, 126_689, 5_000
    NEEDED = (
        "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, or folders train/<wnid>/*.JPEG and "
        "val/<wnid>/*.JPEG or val/*.JPEG (also as the ILSVRC/Data/CLS-LOC of Kaggle)"
    )
    HOW = "image-net.org gives them out after registration, for research that is not commercial"

    def find(self, folder: Path, log: Log) -> Listing:
        """See `PublishedPictures.find`."""
        del log
        names = class_names()
        label = {wnid: number for number, wnid in enumerate(names)}
        for below in (".", "ILSVRC/Data/CLS-LOC", "Data/CLS-LOC"):
            splits = {}
            for split, tar, name, read in (
                ("train", _TRAIN_TAR, "train", _from_train_tar),
                ("test", _VAL_TAR, "val", _from_val_tar),
            ):
                root = folder / below
                if (root / tar).is_file():
                    splits[split] = read(root / tar, label)
                elif (root / name).is_dir():
                    splits[split] = _from_folder(root / name, label)
            if len(splits) == 2:
                break
        else:
            raise InputError(f"{folder} does not hold {self.NEEDED}")
        for split, pictures in splits.items():
            # The same order, whatever the pictures are read from.
            pictures.sort(key=lambda picture: (picture.label, picture.name))
            missing = sorted(set(range(len(names))) - {picture.label for picture in pictures})
            if missing:
                raise InputError(
                    f"{folder}: {split} has no picture of {len(missing)} of the {len(names)} "
                    f"classes, the first {names[missing[0]]}; it must hold {self.NEEDED}"
                )
        return Listing(names, splits)


def _from_train_tar(path: Path, label: dict[str, int]) -> list[Picture]:
    """The archive holds one archive for each of a thousand classes; most are not looked into."""
    pictures = []
    for inner in tar_members(path):
        wnid = inner.name.rpartition("/")[2].removesuffix(".tar")
        if wnid in label:
            members = tar_members(path, offset=inner.offset, size=inner.size)
            pictures += _of_class(members, wnid, label[wnid])
    return pictures


def _from_val_tar(path: Path, label: dict[str, int]) -> list[Picture]:
    return _by_number(tar_members(path), label)


def _from_folder(folder: Path, label: dict[str, int]) -> list[Picture]:
    def files(folder: Path) -> list[Picture]:
        return [Picture(name, -1, folder / name) for name in os.listdir(folder)]

    try:
        pictures = []
        for wnid in label:
            if (folder / wnid).is_dir():
                pictures += _of_class(files(folder / wnid), wnid, label[wnid])
        # All validation pictures may be in one folder, as the archive unpacks.
        return pictures or _by_number(files(folder), label)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error


def _of_class(files: Iterable[Picture], wnid: str, label: int) -> list[Picture]:
    return [
        file._replace(name=f"{wnid}/{file.name.rpartition('/')[2]}", label=label)
        for file in files
        if is_picture(file.name)
    ]


def _by_number(files: Iterable[Picture], label: dict[str, int]) -> list[Picture]:
    """The validation pictures of some classes; a file's name tells its number."""
    truth, pictures = _validation_labels(), []
    for file in files:
        match = _VAL_NAME.fullmatch(file.name.rpartition("/")[2])
        number = int(match[1]) if match else 0
        wnid = truth[number - 1] if 1 <= number <= len(truth) else ""
        if wnid in label:
            pictures += _of_class([file], wnid, label[wnid])
    return pictures


def _validation_labels() -> list[str]:
    """The WordNet id of each of the 50,000 validation pictures; TFDS carries them."""
    folder = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012"
    return folder.joinpath("validation_labels.txt").read_text().split()
