"""CIFAR-10 and CIFAR-100 from either archive that their authors publish.

60,000 photographs of 32 x 32 pixels in 10 or 100 classes of equal size (Krizhevsky, 2009), 10,000
of them for test.
"""

import dataclasses
import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import named_members
from sync_jax.data.prepare.arrays import ArrayDataset, Arrays
from sync_jax.data.prepare.download import PublishedFile, Upstream
from sync_jax.errors import InputError

CIFAR10_CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# The fine labels, in the published order: the alphabet's.
CIFAR100_CLASS_NAMES = tuple(
    """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
    camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
    cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
    lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
    oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
    possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
    spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
    train trout tulip turtle wardrobe whale willow_tree wolf woman worm
    """.split()  # noqa: SIM905
)
_PIXELS = 3 * 32 * 32
_BYTE_NAMES = ("u1", b"u1", "uint8", b"uint8")  # of a dtype
_URL = "https://www.cs.toronto.edu/~kriz/"


def _upstream(name: str, binary_md5: str, python_md5: str) -> Upstream:
    """Either archive: of the binary form, which is what is fetched, or of Python's."""
    files = {f"{name}-binary.tar.gz": binary_md5, f"{name}-python.tar.gz": python_md5}
    return Upstream(
        forms=tuple((PublishedFile(file, md5, _URL + file),) for file, md5 in files.items()),
        prepared_bytes=60_000 * 3_200,
    )


class Cifar10(ArrayDataset):
    """CIFAR-10."""

    # Means and deviations of both are those of the field's codes, for the same numbers.
    INFO = DatasetInfo(
        name="cifar10",
        num_classes=10,
        image_shape=(32, 32, 3),
        class_names=CIFAR10_CLASS_NAMES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        num_train=50_000,
        num_test=10_000,
    )
    UPSTREAM = _upstream(
        "cifar-10", "c32a1d4ab5d03f1284b67883e8d87530", "c58f30108f718f92721af3b95e74349a"
    )

    def read(self, paths: tuple[Path, ...]) -> Arrays:
        """See `ArrayDataset.read`."""
        splits = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
        return _read(paths[0], splits, label_bytes=1, key=b"labels")


class Cifar100(ArrayDataset):
    """CIFAR-100 with its fine labels."""

    INFO = dataclasses.replace(
        Cifar10.INFO,
        name="cifar100",
        num_classes=100,
        class_names=CIFAR100_CLASS_NAMES,
        mean=(0.5071, 0.4867, 0.4408),
        std=(0.2675, 0.2565, 0.2761),
    )
    UPSTREAM = _upstream(
        "cifar-100", "03b5dce01913d631647c71ecec9e9cb8", "eb9058c3a382ffc7106e4002c42a8d85"
    )

    def read(self, paths: tuple[Path, ...]) -> Arrays:
        """See `ArrayDataset.read`."""
        # A coarse label comes before the fine one.
        splits = {"train": ["train"], "test": ["test"]}
        return _read(paths[0], splits, label_bytes=2, key=b"fine_labels")


def _read(path: Path, splits: dict[str, list[str]], *, label_bytes: int, key: bytes) -> Arrays:
    """Reads an archive of either form, as its name says; nothing is unpacked to the disk.

    In the binary form `label_bytes` come before an image, the last of which is the label; in the
    Python form labels are found by their `key`.
    """
    suffix = ".bin" if "binary" in path.name else ""
    wanted = {name + suffix for names in splits.values() for name in names}
    parts = {}
    try:
        with tarfile.open(path, mode="r:gz") as archive:
            for name, data in named_members(archive, wanted):
                where = f"{path}: {name}"
                parts[name.removesuffix(suffix)] = (
                    _parse_binary(where, data, label_bytes)
                    if suffix
                    else _parse_python(where, data, key)
                )
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    arrays = {}
    for split, names in splits.items():
        if missing := [name for name in names if name not in parts]:
            raise InputError(f"{path} does not hold {', '.join(missing)}")
        pixels, labels = (np.concatenate([parts[name][i] for name in names]) for i in (0, 1))
        arrays[split] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    return arrays


def _parse_binary(where: str, data: bytes, label_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    size = label_bytes + _PIXELS
    if not data or len(data) % size:
        raise InputError(f"{where} has {len(data)} bytes, expected a multiple of {size}")
    records = np.frombuffer(data, np.uint8).reshape(-1, size)
    return records[:, label_bytes:], records[:, label_bytes - 1].astype(np.int64)


def _parse_python(where: str, data: bytes, key: bytes) -> tuple[np.ndarray, np.ndarray]:
    try:
        contents = _Reader(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = contents[b"data"].array, np.asarray(contents[key])
        pixels = pixels.reshape(-1, _PIXELS)
    except Exception as error:  # what a damaged pickle raises is anybody's guess
        raise InputError(f"{where} cannot be read: {error}") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise InputError(f"{where} does not hold the arrays that it should")
    return pixels, labels


class _Reader(pickle.Unpickler):
    """Unpickles arrays of bytes, and nothing that could run code.

    Not even NumPy's own functions: a pickle may give an array any state, and one whose elements are
    said to be objects would have NumPy follow addresses of the file's choice.
    """

    def find_class(self, module: str, name: str) -> Any:
        # Each time a new object, for a pickle may also change what it is given.
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return lambda *arguments: _Stub(arguments)
        if (module, name) == ("_codecs", "encode"):
            return lambda *arguments: arguments[0].encode("latin1")  # how protocol 2 spells bytes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")


class _Stub:
    """In place of a NumPy dtype, known by its arguments, or of an array of bytes."""

    array: np.ndarray

    def __init__(self, arguments: tuple[Any, ...]):
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if len(state) != 5:  # of a dtype: byte order and alignment, which bytes have not
            return
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Stub) or dtype.arguments[0] not in _BYTE_NAMES:
            raise pickle.UnpicklingError("it has an array of other elements than bytes")
        if not isinstance(data, bytes):
            raise pickle.UnpicklingError("it has an array without contents")
        self.array = np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
