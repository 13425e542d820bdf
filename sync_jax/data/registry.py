"""The names of the datasets. A new one is a file in `datasets/` and a line here."""

from collections.abc import Callable

from ml_collections import ConfigDict

from sync_jax.data.datasets.cifar import Cifar10, Cifar100
from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.datasets.food101 import Food101
from sync_jax.data.datasets.image_folder import ImageFolder
from sync_jax.data.datasets.imagenet100 import Imagenet100
from sync_jax.data.datasets.stanford_cars import StanfordCars
from sync_jax.data.datasets.svhn import Svhn
from sync_jax.data.datasets.tfds import PREFIX, TfdsDataset
from sync_jax.data.images import Layout
from sync_jax.data.info import Dataset
from sync_jax.errors import InputError, suggestion

# Each is called with the `data` section of a config, and reads nothing then.
DATASETS: dict[str, Callable[[ConfigDict], Dataset]] = {
    "cifar10": Cifar10,
    "cifar100": Cifar100,
    "fashion_mnist": FashionMnist,
    "food101": Food101,
    "image_folder": ImageFolder,
    "imagenet100": Imagenet100,
    "stanford_cars": StanfordCars,
    "svhn": Svhn,
}


def dataset(section: ConfigDict) -> Dataset:
    """Makes the dataset that a config names; nothing is read yet.

    Args:
        section: `data`; its name is a key of `DATASETS`, or 'tfds:NAME' for one of TFDS.

    Raises:
        InputError: there is no such dataset, or the section does not fit it.
    """
    name: str = section.name
    Layout.of(section)  # sizes that decrease are a mistake, whatever the images
    if name.startswith(PREFIX):
        return TfdsDataset(section)
    if name not in DATASETS:
        raise InputError(
            f"config.data.name={name!r} is unknown{suggestion(name, DATASETS)}; choose from "
            f"{', '.join(sorted(DATASETS))}, or {PREFIX}NAME for a dataset of TensorFlow Datasets"
        )
    return DATASETS[name](section)
