"""Stanford Cars: 196 makes, models and years of cars (Krause et al., 2013).

8,144 training and 8,041 test pictures. The authors' addresses are dead; see README for where the
files can be had.
"""

from pathlib import Path

from sync_jax.data.prepare.archives import Listing, Picture, read_mat
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
        (class_names,) = read_mat(self._place(folder, "cars_meta.mat"), "class_names")
        names = tuple(map(str, class_names.reshape(-1)))
        splits: dict[str, list[Picture]] = {}
        for split, annotations in _ANNOTATIONS.items():
            path, pictures = self._place(folder, annotations), self._place(folder, f"cars_{split}/")
            splits[split] = []
            for row in read_mat(path, "annotations")[0].reshape(-1):
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
        return Listing(names, splits)

    def _place(self, folder: Path, name: str) -> Path:
        """A file of the devkit, or a folder of pictures."""
        for below in (name, ".", "devkit", "car_devkit/devkit"):
            if (path := folder / below / name).exists():
                return path
        raise InputError(f"{folder} has no {name}; it must hold {self.NEEDED}")
