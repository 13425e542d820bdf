"""Weights of torchvision's ResNets and VGG16-BN from .safetensors and .pth files.

Nothing in such a file is executed. A .pth file holds a pickle, which could name any function; the
reader here knows those that rebuild a tensor, and refuses every other name.
"""

import io
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from safetensors.numpy import load_file

from sync_jax.errors import InputError
from sync_jax.models.vgg import LAYERS
from sync_jax.runtime.console import printable

_STORAGES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ByteStorage": "<u1",
    "BoolStorage": "?",
}
# Our names of arrays and torchvision's, where they differ.
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


def load_pretrained(
    path: Path, params: optax.Params, batch_stats: optax.Params
) -> tuple[optax.Params, optax.Params, str]:
    """Replaces what a .safetensors, .pth or .pt file has weights for.

    `params` and `batch_stats` are of a `SelectiveNetwork` with a ResNet or VGG16; shapes alone will
    do, to see whether the file can be used. Returns both, with NumPy arrays for what was replaced,
    and a line that says what did not match.
    """
    if path.suffix not in (".safetensors", ".pth", ".pt") or not path.is_file():
        raise InputError(
            f"config.model.pretrained={str(path)!r} must be a file that ends in .safetensors, .pth "
            "or .pt"
        )
    weights = read_weights(path)
    unused = {name for name in weights if not name.endswith("num_batches_tracked")}
    loaded: list[str] = []
    left: dict[str, list[str]] = {"not in the file": [], "of another shape": []}

    def replace(tree_path: Any, ours: Any) -> Any:
        names = [key.key for key in tree_path[1:]]
        theirs, name = torch_name(names), "/".join(names)
        if theirs not in weights:
            left["not in the file"].append(name)
            return ours
        unused.discard(theirs)
        value = from_torch(weights[theirs])
        if value.shape != ours.shape:
            shapes = f"{theirs} {weights[theirs].shape} for {name} {ours.shape}"
            left["of another shape"].append(shapes)
            return ours
        if not np.all(np.isfinite(value)):
            raise InputError(f"{path}: {theirs} holds a number that is not finite")
        loaded.append(name)
        return value.astype(ours.dtype)

    params, batch_stats = jax.tree_util.tree_map_with_path(replace, (params, batch_stats))
    if not loaded:
        some = ", ".join(sorted(weights)[:3])
        raise InputError(f"{path}: no name and shape fits this network; it holds {some}, ...")
    message = f"pretrained: {len(loaded)} arrays from {path.name}"
    left["not in this network"] = sorted(unused)
    for what, found in left.items():
        if found:
            more = f" and {len(found) - 6} more" if len(found) > 6 else ""
            message += f"; {what}: {', '.join(found[:6])}{more}"
    return params, batch_stats, printable(message)


def torch_name(names: list[str]) -> str:
    """Returns torchvision's name for a path such as ["backbone", "bn1", "scale"]."""
    module, leaf = ".".join(names[1:-1]), _LEAVES.get(names[-1], names[-1])
    if names[0] == "class_head":
        module = "fc"
    elif match := re.fullmatch(r"features_(conv|norm)(\d+)", module):
        number = int(match[2])
        index = [i for i, layer in enumerate(LAYERS) if layer != "pool"][number]
        # In torchvision's `features` BatchNorm and ReLU come after each convolution.
        module = f"features.{index + 2 * number + (match[1] == 'norm')}"
    module = re.sub(r"^layer(\d)_(\d+)", r"layer\1.\2", module)
    module = module.replace("downsample_conv", "downsample.0")
    return f"{module.replace('downsample_bn', 'downsample.1')}.{leaf}"


def from_torch(array: np.ndarray) -> np.ndarray:
    """Maps kernels `[out, in, h, w]` to `[h, w, in, out]` and `[out, in]` to `[in, out]`."""
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a .safetensors file or of a state dict that `torch.save` wrote."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with zipfile.ZipFile(path) as archive:
            return _read_state_dict(archive)
    except zipfile.BadZipFile:
        raise InputError(
            f"{path} is no file of torch.save in its format since 2020; load it with PyTorch and "
            "save it again, as .safetensors for the best"
        ) from None
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds something else than weights: {error}") from error
    except Exception as error:  # a damaged pickle can raise any
        raise InputError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _read_state_dict(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        # So nothing can expand to more than the file has.
        raise pickle.UnpicklingError("its members are compressed, which torch.save never does")
    pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise pickle.UnpicklingError("there is no data.pkl in it")
    reader = _Reader(archive, pickles[0].removesuffix("data.pkl"))
    contents = reader.load()
    if isinstance(contents, dict) and isinstance(contents.get("state_dict"), dict):
        contents = contents["state_dict"]
    if not isinstance(contents, dict):
        raise pickle.UnpicklingError(f"a {type(contents).__name__}, not a state dict")
    return {str(name): value for name, value in contents.items() if isinstance(value, np.ndarray)}


class _Reader(pickle.Unpickler):
    """Unpickles tensors as NumPy arrays and nothing that could run code."""

    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        self._archive, self._prefix = archive, prefix
        self._storages: dict[str, np.ndarray] = {}
        super().__init__(io.BytesIO(archive.read(f"{prefix}data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        # Each time a new object, for a pickle may also change what it is given.
        if (module, name) == ("collections", "OrderedDict"):
            return lambda *arguments: _Dict(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *arguments: _rebuild_tensor(*arguments)
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda data, requires_grad, hooks: data
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, dtype, key, _, size = pid
        if kind != "storage" or dtype not in _STORAGES.values():
            raise pickle.UnpicklingError(f"it refers to a {kind}, not to a storage")
        name = f"{self._prefix}data/{key}"
        if name not in self._storages:  # once, however many tensors share it
            data = self._archive.read(name)
            if len(data) != size * np.dtype(dtype).itemsize:
                raise pickle.UnpicklingError(f"storage {key} has {len(data)} bytes")
            self._storages[name] = np.frombuffer(data, dtype)
        return self._storages[name]


class _Dict(dict):
    """In place of an OrderedDict, whose attributes a state dict may come with: `_metadata`."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
    if len(shape) != len(strides) or min((*shape, *strides, offset), default=0) < 0:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} with strides {strides}")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if math.prod(shape) and last >= storage.size:
        raise pickle.UnpicklingError(f"a tensor of shape {shape} beyond its storage")
    # No copy: of strides that are 0 it could be of any size.
    return np.lib.stride_tricks.as_strided(
        storage[offset:], shape, [s * storage.itemsize for s in strides], writeable=False
    )
