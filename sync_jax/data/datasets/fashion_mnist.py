"""Fashion-MNIST.

60,000 training and 10,000 test photographs of clothes, 28 x 28 grey pixels in 10 classes of equal
size (Xiao, Rasul and Vollgraf, 2017), published as four files in IDX format.
"""

import math
from pathlib import Path

import numpy as np

from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.arrays import ArrayDataset, Arrays
from sync_jax.data.prepare.download import PublishedFile, Upstream

CLASS_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# Debian recompressed the files; with the gzip headers of the originals put back, they have the MD5
# sums that the authors publish, so these are the SHA-256 sums of the authors' own bytes.
_DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
_COUNTS = {"train": 60_000, "t10k": 10_000}


def idx_file(name: str, digest: str, shape: tuple[int, ...], url: str = _URL) -> PublishedFile:
    """A file of bytes in IDX format: two zeros, 8, the rank, the dimensions, and the array."""
    size = 4 + 4 * len(shape) + math.prod(shape)
    return PublishedFile(f"{name}.gz", digest, f"{url}{name}.gz", size)


class FashionMnist(ArrayDataset):
    """Fashion-MNIST."""

    INFO = DatasetInfo(
        name="fashion_mnist",
        num_classes=len(CLASS_NAMES),
        image_shape=(28, 28, 1),
        class_names=CLASS_NAMES,
        mean=(0.2860406,),
        std=(0.3530242,),
        num_train=60_000,
        num_test=10_000,
    )
    UPSTREAM = Upstream(
        forms=(
            tuple(
                idx_file(
                    name,
                    digest,
                    (_COUNTS[name.partition("-")[0]], *((28, 28) if "images" in name else ())),
                )
                for name, digest in _DIGESTS.items()
            ),
        ),
        prepared_bytes=70_000 * 1_000,
        debian_folder=Path("/usr/share/datasets/fashion-mnist"),
        debian_package="dataset-fashion-mnist",
    )

    def read(self, paths: tuple[Path, ...]) -> Arrays:
        """See `ArrayDataset.read`."""
        train_images, train_labels, test_images, test_labels = (
            _parse(b"".join(file.content(path)))
            for file, path in zip(self.UPSTREAM.forms[0], paths, strict=True)
        )
        return {"train": (train_images, train_labels), "test": (test_images, test_labels)}


def _parse(data: bytes) -> np.ndarray:
    """The array in a verified IDX file."""
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
