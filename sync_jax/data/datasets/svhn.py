"""SVHN, cropped digits, from the .mat files that its authors publish.

73,257 training and 26,032 test pictures of house numbers' digits, 32 x 32 pixels (Netzer et al.,
2011). The further 531,131 "extra" pictures are not used, as in selective classification's papers.
"""

from pathlib import Path

import numpy as np
import scipy.io
import tensorflow_datasets as tfds

from sync_jax.data.prepare.arrays import ArrayBuilder, Arrays
from sync_jax.data.prepare.download import DataError
from sync_jax.data.prepare.published import Archives, PublishedFile

CLASS_NAMES = tuple("0123456789")
IMAGE_SHAPE = (32, 32, 3)
_FOLDER = "http://ufldl.stanford.edu/housenumbers/"
UPSTREAM = Archives(
    forms=(
        (
            PublishedFile(
                "train_32x32.mat",
                "e26dedcc434d2e4c54c9b2d4a06d8373",
                f"{_FOLDER}train_32x32.mat",
            ),
            PublishedFile(
                "test_32x32.mat",
                "eb5a983be6a315427106f1b164d9cef3",
                f"{_FOLDER}test_32x32.mat",
            ),
        ),
    ),
    prepared_bytes=99_289 * 3_200,
)


class Svhn(ArrayBuilder, skip_registration=True):  # type: ignore[call-arg]
    """SVHN, cropped digits, without the extra ones."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = UPSTREAM.required
    IMAGE_SHAPE = IMAGE_SHAPE
    CLASS_NAMES = CLASS_NAMES
    HOMEPAGE = "http://ufldl.stanford.edu/housenumbers/"

    def _arrays(self, folder: Path) -> Arrays:
        train, test = self._upstream.find(folder)
        return {"train": _read(train), "test": _read(test)}


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        contents = scipy.io.loadmat(path, variable_names=("X", "y"))
        images, numbers = contents["X"], contents["y"].reshape(-1)
    except Exception as error:  # what a damaged file raises is anybody's guess
        raise DataError(f"{path} cannot be read: {error}") from error
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != IMAGE_SHAPE:
        raise DataError(f"{path} holds X of shape {images.shape}, expected 32 x 32 x 3 x n bytes")
    if numbers.dtype.kind not in "iuf" or not np.all(np.isin(numbers, range(1, 11))):
        raise DataError(f"{path} holds labels other than 1 to 10")
    # The digit 0 is published as 10.
    return images.transpose(3, 0, 1, 2), numbers.astype(np.int64) % 10
