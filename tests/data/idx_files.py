"""Small files in exactly the format in which Fashion-MNIST is published."""

import gzip
import hashlib
import struct
from pathlib import Path

import numpy as np

from sync_jax.config import default_config
from sync_jax.data.datasets.fashion_mnist import FashionMnist, idx_file
from sync_jax.data.prepare.download import Upstream

NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing listens there


def arrays(num_train: int = 40, num_test: int = 20, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    contents = {}
    for prefix, size in {"train": num_train, "t10k": num_test}.items():
        contents[f"{prefix}-images-idx3-ubyte"] = rng.integers(0, 256, (size, 28, 28), np.uint8)
        contents[f"{prefix}-labels-idx1-ubyte"] = (np.arange(size) % 10).astype(np.uint8)
    return contents


def idx_bytes(array: np.ndarray) -> bytes:
    magic = 0x0800 + array.ndim
    return struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.tobytes()


def publish(
    folder: Path, contents: dict[str, np.ndarray] | None = None, *, compressed: bool = True
) -> Upstream:
    """Writes the files and says what they are; the sources named exist nowhere.

    The same contents give the same bytes, so a second process may call this for the same folder.
    """
    contents = arrays() if contents is None else contents
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, array in contents.items():
        data = idx_bytes(array)
        files.append(idx_file(name, hashlib.sha256(data).hexdigest(), array.shape, NOWHERE))
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / name).write_bytes(data)
    return Upstream(
        forms=(tuple(files),),
        prepared_bytes=100_000,
        debian_folder=folder.parent / "no-such-folder",
        debian_package="dataset-fashion-mnist",
    )


def dataset(
    data_dir: Path | str, upstream: Upstream | None = None, source: Path | str | None = None
) -> FashionMnist:
    """Fashion-MNIST, published as a test says."""
    section = default_config().data
    section.data_dir, section.source = str(data_dir), str(source or "")
    made = FashionMnist(section)
    if upstream is not None:
        made.UPSTREAM = upstream
    return made
