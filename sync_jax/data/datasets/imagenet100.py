"""ImageNet-100: 100 classes of ILSVRC 2012, those of Contrastive Multiview Coding.

126,689 training pictures; the 5,000 validation pictures of these classes are the test split. Only
the 100 classes' pictures are read, a tenth of the archive's bytes.
"""

import importlib.resources
import os
import re
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
        return _find(folder, self.NEEDED)


def _find(folder: Path, needed: str) -> Listing:
    names = class_names()
    label = {wnid: number for number, wnid in enumerate(names)}
    for root in (folder, folder / "ILSVRC" / "Data" / "CLS-LOC", folder / "Data" / "CLS-LOC"):
        splits = {}
        for split, tar, below, read in (
            ("train", _TRAIN_TAR, "train", _from_train_tar),
            ("test", _VAL_TAR, "val", _from_val_tar),
        ):
            if (root / tar).is_file():
                splits[split] = read(root / tar, label)
            elif (root / below).is_dir():
                splits[split] = _from_folder(root / below, label)
        if len(splits) == 2:
            break
    else:
        raise InputError(f"{folder} does not hold {needed}")
    for split, pictures in splits.items():
        missing = sorted(set(range(len(names))) - {picture.label for picture in pictures})
        if missing:
            raise InputError(
                f"{folder}: {split} has no picture of {len(missing)} of the {len(names)} classes, "
                f"the first {names[missing[0]]}; it must hold {needed}"
            )
    return Listing(names, splits)


def _from_train_tar(path: Path, label: dict[str, int]) -> list[Picture]:
    """The archive holds one archive for each of a thousand classes; most are not looked into."""
    pictures = []
    for inner in tar_members(path):
        wnid = inner.name.rpartition("/")[2].removesuffix(".tar")
        if wnid in label:
            for member in tar_members(path, offset=inner.offset, size=inner.size):
                if is_picture(member.name):
                    name = f"{wnid}/{member.name.rpartition('/')[2]}"
                    pictures.append(member._replace(name=name, label=label[wnid]))
    return _in_order(pictures)


def _from_val_tar(path: Path, label: dict[str, int]) -> list[Picture]:
    truth = _validation_labels()
    pictures = []
    for member in tar_members(path):
        name = member.name.rpartition("/")[2]
        wnid = _validation_class(name, truth)
        if wnid in label:
            pictures.append(member._replace(name=f"{wnid}/{name}", label=label[wnid]))
    return _in_order(pictures)


def _from_folder(folder: Path, label: dict[str, int]) -> list[Picture]:
    pictures = []
    try:
        for wnid in label:
            if (folder / wnid).is_dir():
                for name in filter(is_picture, os.listdir(folder / wnid)):
                    pictures.append(Picture(f"{wnid}/{name}", label[wnid], folder / wnid / name))
        if not pictures:  # all validation pictures in one folder, as the archive unpacks
            truth = _validation_labels()
            for name in os.listdir(folder):
                wnid = _validation_class(name, truth)
                if wnid in label:
                    pictures.append(Picture(f"{wnid}/{name}", label[wnid], folder / name))
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return _in_order(pictures)


def _in_order(pictures: list[Picture]) -> list[Picture]:
    """The same one, whatever the pictures are read from."""
    return sorted(pictures, key=lambda picture: (picture.label, picture.name))


def _validation_class(name: str, truth: list[str]) -> str:
    """The class of a validation picture by its name; "" where it is none."""
    match = _VAL_NAME.fullmatch(name)
    number = int(match[1]) if match else 0
    return truth[number - 1] if 1 <= number <= len(truth) else ""


def _validation_labels() -> list[str]:
    """The WordNet id of each of the 50,000 validation pictures; TFDS carries them."""
    folder = importlib.resources.files("tensorflow_datasets") / "datasets" / "imagenet2012"
    return folder.joinpath("validation_labels.txt").read_text().split()
