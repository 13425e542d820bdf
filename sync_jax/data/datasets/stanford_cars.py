"""Stanford Cars: 196 makes, models and years of cars (Krause et al., 2013).

8,144 training and 8,041 test pictures. The authors' addresses are dead; see README for where the
files can be had.
"""

from pathlib import Path

import scipy.io

from sync_jax.data.prepare.archives import Listing, Picture
from sync_jax.data.prepare.pictures import PublishedPictures
from sync_jax.data.prepare.staging import Log
from sync_jax.errors import InputError

_ANNOTATIONS = {"train": "cars_train_annos.mat", "test": "cars_test_annos_withlabels.mat"}


class StanfordCars(PublishedPictures):
    """Stanford Cars."""

    NUM_CLASSES, NUM_TRAIN, NUM_TEST = 196, 8_144, 8_041
    NEEDED = (
        "cars_train/ and cars_test/ (or cars_train/cars_train/, as Kaggle's archive unpacks), and "
        "of the devkit cars_meta.mat, cars_train_annos.mat and cars_test_annos_withlabels.mat, in "
        "it or in devkit/"
    )
    HOW = (
        "the pictures are on Kaggle (jessicali9530/stanford-cars-dataset), the devkit and the test "
        "labels in github.com/pytorch/vision/issues/7545"
    )

    def find(self, folder: Path, log: Log) -> Listing:
        """See `PublishedPictures.find`; in the annotations' order."""
        del log
        names = [str(name) for name in _read(self._file(folder, "cars_meta.mat"), "class_names")]
        splits: dict[str, list[Picture]] = {}
        for split, annotations in _ANNOTATIONS.items():
            path = self._file(folder, annotations)
            pictures = self._folder(folder, f"cars_{split}")
            splits[split] = []
            for row in _read(path, "annotations"):
                try:
                    name, label = str(row["fname"]), int(row["class"]) - 1
                except (TypeError, ValueError, KeyError, IndexError) as error:
                    raise InputError(f"{path} has no file names and classes ({error})") from error
                if not 0 <= label < len(names):
                    raise InputError(f"{path}: {name} is of class {label + 1} of {len(names)}")
                if "/" in name or name.startswith(".") or not (pictures / name).is_file():
                    raise InputError(f"{path} names {name!r}, which is not in {pictures}")
                splits[split].append(Picture(f"cars_{split}/{name}", label, pictures / name))
            if not splits[split]:
                raise InputError(f"{path} names no picture")
        return Listing(tuple(names), splits)

    def _folder(self, folder: Path, name: str) -> Path:
        for path in (folder / name / name, folder / name):
            if path.is_dir():
                return path
        raise InputError(f"{folder} has no {name}/; it must hold {self.NEEDED}")

    def _file(self, folder: Path, name: str) -> Path:
        for below in (".", "devkit", "car_devkit/devkit"):
            if (path := folder / below / name).is_file():
                return path
        raise InputError(f"{folder} has no {name}; it must hold {self.NEEDED}")


def _read(path: Path, field: str) -> list:
    try:
        contents = scipy.io.loadmat(path, variable_names=(field,), squeeze_me=True)
        return list(contents[field].reshape(-1))
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise InputError(f"{path} cannot be read as {field} of the devkit: {error}") from error
