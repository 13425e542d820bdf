"""SVHN, cropped digits, from the .mat files that its authors publish.

73,257 training and 26,032 test pictures of house numbers' digits, 32 x 32 pixels (Netzer et al.,
2011). The further 531,131 "extra" pictures are not used, as in selective classification's papers.
"""

from pathlib import Path

import numpy as np

from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import read_mat
from sync_jax.data.prepare.arrays import ArrayDataset, Arrays
from sync_jax.data.prepare.download import PublishedFile, Upstream
from sync_jax.errors import InputError

_URL = "http://ufldl.stanford.edu/housenumbers/"
_MD5 = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
}


class Svhn(ArrayDataset):
    """SVHN, cropped digits, without the extra ones."""

    INFO = DatasetInfo(
        name="svhn",
        num_classes=10,
        image_shape=(32, 32, 3),
        class_names=tuple("0123456789"),
        # The field's codes use these for SVHN.
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        num_train=73_257,
        num_test=26_032,
    )
    UPSTREAM = Upstream(
        forms=(tuple(PublishedFile(name, md5, _URL + name) for name, md5 in _MD5.items()),),
        prepared_bytes=99_289 * 3_200,
    )

    def read(self, paths: tuple[Path, ...]) -> Arrays:
        """See `ArrayDataset.read`."""
        return {split: _read(path) for split, path in zip(("train", "test"), paths, strict=True)}


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    images, numbers = read_mat(path, "X", "y")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[:3] != Svhn.INFO.image_shape:
        raise InputError(f"{path} holds X of shape {images.shape}, expected 32 x 32 x 3 x n bytes")
    if numbers.dtype.kind not in "iuf" or not np.all(np.isin(numbers, range(1, 11))):
        raise InputError(f"{path} holds labels other than 1 to 10")
    # The digit 0 is published as 10.
    return images.transpose(3, 0, 1, 2), numbers.reshape(-1).astype(np.int64) % 10
