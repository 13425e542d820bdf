"""Fashion-MNIST as a TFDS builder that needs no TensorFlow.

60,000 training and 10,000 test photographs of clothes, 28 x 28 grey pixels in 10 classes of equal
size (Xiao, Rasul and Vollgraf, 2017), published as four files in IDX format.
"""

from pathlib import Path

import tensorflow_datasets as tfds

from sync_jax.data.prepare.arrays import ArrayBuilder, Arrays
from sync_jax.data.prepare.download import IdxFile, Upstream, read_idx

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
IMAGE_SHAPE = (28, 28, 1)

# Debian recompressed the files; with the gzip headers of the originals put back, they have the
# MD5 sums that the authors publish, so these are the sums of the authors' own bytes.
UPSTREAM = Upstream(
    files=(
        IdxFile(
            "train-images-idx3-ubyte",
            (60_000, 28, 28),
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        ),
        IdxFile(
            "train-labels-idx1-ubyte",
            (60_000,),
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        ),
        IdxFile(
            "t10k-images-idx3-ubyte",
            (10_000, 28, 28),
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        ),
        IdxFile(
            "t10k-labels-idx1-ubyte",
            (10_000,),
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        ),
    ),
    debian_folder=Path("/usr/share/datasets/fashion-mnist"),
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    debian_package="dataset-fashion-mnist",
)


class FashionMnist(ArrayBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Fashion-MNIST."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The four published files, compressed or not."
    IMAGE_SHAPE = IMAGE_SHAPE
    CLASS_NAMES = CLASS_NAMES
    HOMEPAGE = "https://github.com/zalandoresearch/fashion-mnist"

    def _arrays(self, folder: Path) -> Arrays:
        arrays = {file.name: read_idx(folder, file) for file in self._upstream.files}
        return {
            split: (arrays[f"{prefix}-images-idx3-ubyte"], arrays[f"{prefix}-labels-idx1-ubyte"])
            for split, prefix in {"train": "train", "test": "t10k"}.items()
        }
