"""Stanford Cars: 196 makes, models and years of cars (Krause et al., 2013).

8,144 training and 8,041 test pictures. The authors' addresses are dead; see README for where the
files can be had.
"""

from pathlib import Path

import scipy.io
import tensorflow_datasets as tfds

from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.download import DataError
from sync_jax.data.prepare.records import PictureBuilder

NUM_CLASSES, NUM_TRAIN, NUM_TEST = 196, 8_144, 8_041
NEEDED = (
    "cars_train/ and cars_test/ (or cars_train/cars_train/, as Kaggle's archive unpacks), and of "
    "the devkit cars_meta.mat, cars_train_annos.mat and cars_test_annos_withlabels.mat, in it or "
    "in devkit/"
)
HOW = (
    "the pictures are on Kaggle (jessicali9530/stanford-cars-dataset), the devkit and the test "
    "labels in github.com/pytorch/vision/issues/7545"
)
_ANNOTATIONS = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}


class StanfordCars(PictureBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Stanford Cars."""

    VERSION = tfds.core.Version("1.0.0")
    HOMEPAGE = "https://ai.stanford.edu/~jkrause/cars/car_dataset.html"


def find(folder: Path) -> Listing:
    """The pictures in a folder that holds `NEEDED`, in the annotations' order.

    Raises:
        DataError: it does not, or annotations and pictures do not belong together.
    """
    names = [str(name) for name in _read(_file(folder, "cars_meta.mat"), "class_names")]
    splits: dict[str, list[Picture]] = {}
    for split, annotations in _ANNOTATIONS.items():
        path = _file(folder, annotations)
        pictures = _pictures(folder, f"cars_{split}")
        splits[split] = []
        for row in _read(path, "annotations"):
            try:
                name, label = str(row["fname"]), int(row["class"]) - 1
            except (TypeError, ValueError, KeyError, IndexError) as error:
                raise DataError(f"{path} has no file names and classes ({error})") from error
            if not 0 <= label < len(names):
                raise DataError(f"{path}: {name} is of class {label + 1} of {len(names)}")
            if "/" in name or name.startswith(".") or not (pictures / name).is_file():
                raise DataError(f"{path} names {name!r}, which is not in {pictures}")
            splits[split].append(Picture(f"cars_{split}/{name}", label, pictures / name))
        if not splits[split]:
            raise DataError(f"{path} names no picture")
    return Listing(tuple(names), splits)


def _pictures(folder: Path, name: str) -> Path:
    for path in (folder / name / name, folder / name):
        if path.is_dir():
            return path
    raise DataError(f"{folder} has no {name}/; it must hold {NEEDED}")


def _file(folder: Path, name: str) -> Path:
    for below in (".", "devkit", "car_devkit/devkit"):
        if (path := folder / below / name).is_file():
            return path
    raise DataError(f"{folder} has no {name}; it must hold {NEEDED}")


def _read(path: Path, field: str) -> list:
    try:
        contents = scipy.io.loadmat(path, variable_names=(field,), squeeze_me=True)
        return list(contents[field].reshape(-1))
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise DataError(f"{path} cannot be read as {field} of the devkit: {error}") from error
