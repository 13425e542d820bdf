"""Fashion-MNIST as a TFDS builder that needs no TensorFlow.

60,000 training and 10,000 test photographs of clothes, 28 x 28 grey pixels in 10 classes of equal
size (Xiao, Rasul and Vollgraf, 2017), published as four files in IDX format.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sync_jax.data.sources import DataError, IdxFile, Upstream, read_idx

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


# Unregistered, for TFDS has a builder of this name: which one a name means would depend on imports.
class FashionMnist(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds ArrayRecord files from the published ones, found in TFDS's manual folder.

    Images are stored as raw bytes, for decoding PNGs would take longer than reading the rest, and a
    training run reads them all at its start. Examples keep the published order.
    """

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The four published files, compressed or not."

    def __init__(self, *, upstream: Upstream = UPSTREAM, **kwargs: Any):
        self._upstream = upstream
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=IMAGE_SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(names=CLASS_NAMES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            homepage="https://github.com/zalandoresearch/fashion-mnist",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        folder = Path(dl_manager.manual_dir)
        arrays = {file.name: read_idx(folder, file) for file in self._upstream.files}
        generators = {}
        for split, prefix in {"train": "train", "test": "t10k"}.items():
            images = arrays[f"{prefix}-images-idx3-ubyte"]
            labels = arrays[f"{prefix}-labels-idx1-ubyte"]
            _check_labels(f"{folder}/{prefix}-labels-idx1-ubyte", labels, len(images))
            generators[split] = self._generate_examples(images, labels)
        return generators

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image.reshape(IMAGE_SHAPE), "label": int(label)}


def _check_labels(name: str, labels: np.ndarray, num_images: int) -> None:
    if len(labels) != num_images:
        raise DataError(f"{name} holds {len(labels)} labels for {num_images} images")
    if labels.max() >= len(CLASS_NAMES):
        raise DataError(
            f"{name} holds a label {labels.max()}, expected 0 to {len(CLASS_NAMES) - 1}"
        )
