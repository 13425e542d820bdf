"""What can be wrong with files and the machine: each spoils the folder of everything."""

import dataclasses
import errno
import json
import os
import pickle
import shutil
import types
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.io
from PIL import Image

from sync_jax import trainer as run_lib
from sync_jax.data.datasets.cifar import Cifar100
from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.datasets.svhn import Svhn
from sync_jax.data.prepare import digests, staging
from tests.bad_input.case import PREPARED
from tests.command_line import run
from tests.data import idx_files, test_archives
from tests.data.pictures import pixels
from tests.data.test_published_pictures import food_members, write_cars, write_food

Patch = pytest.MonkeyPatch


def mistake(spoil: Callable[..., object]) -> Callable[..., Callable[[Patch], object]]:
    """Lets a function be given all but its first argument now, and that one later."""
    return lambda *arguments, **named: lambda patch: spoil(patch, *arguments, **named)


@mistake
def write(patch: Patch, path: str, content: bytes | str):
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


@mistake
def cut(patch: Patch, path: str):
    """The first file of a pattern loses its second half."""
    found = sorted(Path().glob(path))[0]
    found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])


@mistake
def remove(patch: Patch, pattern: str):
    for path in Path().glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@mistake
def folder(patch: Patch, *names: str):
    """Folders where a run has files."""
    for path in (Path("runs/done", name) for name in names):
        path.unlink(missing_ok=True)
        path.mkdir()


@mistake
def fifo(patch: Patch, name: str):
    """A FIFO in a run: whoever opens it waits for ever."""
    path = Path("runs/done", name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


@mistake
def report(patch: Patch, change, run: str = "done"):
    """A report that is JSON of its schema, and wrong."""
    path = Path(f"runs/{run}/report.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@mistake
def predictions(patch: Patch, split: str = "test", **arrays):
    """Predictions that are an .npz file, and wrong: arrays replaced, or removed."""
    path = Path(f"runs/done/predictions_{split}.npz")
    with np.load(path) as loaded:
        content = dict(loaded)
    for name, change in arrays.items():
        name = name if name in ("labels", "index") else f"outputs/{name}"
        array = content.pop(name)
        if change is not None:
            content[name] = change(array)
    np.savez(path, **content)


def nan_first(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def compressed(patch: Patch) -> None:
    path = Path("runs/done/predictions_test.npz")
    with np.load(path) as loaded:
        content = {name: np.zeros_like(array) for name, array in loaded.items()}
    np.savez_compressed(path, **content)


@mistake
def album(patch: Patch, layout: dict[str, int]):
    """Other pictures: so many in each folder."""
    shutil.rmtree("pictures")
    Path("pictures").mkdir()
    for folder, count in layout.items():
        path = Path("pictures", folder)
        path.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(pixels(i)).save(path / f"{i}.png")


@mistake
def broken(patch: Patch, pattern: str, content: bytes = b"no picture"):
    for path in Path("pictures").glob(pattern):
        path.write_bytes(content)


def nan_pictures(patch: Patch) -> None:
    for path in Path("pictures/ant").iterdir():
        path.unlink()
        Image.fromarray(np.full((12, 12), np.nan, np.float32)).save(path.with_suffix(".tiff"))


@mistake
def cifar100(patch: Patch, change, *, form: str = "binary", after=None):
    """CIFAR-100's archive with other members, published as it is, or damaged after that."""
    contents = test_archives.cifar_contents(100, test_archives.SIZES[100])
    make = {"binary": test_archives.binary_members, "python": test_archives.python_members}
    members = make[form](100, contents)
    change(members)
    path = Path(f"published/cifar-100-{form}.tar.gz")
    path.parent.mkdir()
    test_archives.write_tar(path, members)
    upstream = test_archives.published(path.parent, (path.name,))
    patch.setattr(Cifar100, "UPSTREAM", upstream)
    if after:
        after(path)


def label_100(members: dict[str, bytes]) -> None:
    data = members["train.bin"]
    members["train.bin"] = data[:1] + bytes([100]) + data[2:]


def pickled(**fields) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        content = pickle.loads(members["train"])  # which this test has just made
        content |= {name.encode(): value for name, value in fields.items()}
        members["train"] = pickle.dumps(content, protocol=2)

    return change


@mistake
def street_numbers(patch: Patch, **arrays):
    """SVHN's training file with other arrays, as though it were published so."""
    folder = Path("published")
    folder.mkdir()
    test_archives.write_svhn(folder, {"train": 20, "test": 20})
    path = folder / "train_32x32.mat"
    content = {k: v for k, v in scipy.io.loadmat(path).items() if k in ("X", "y")} | arrays
    scipy.io.savemat(path, content)
    upstream = test_archives.published(folder, (path.name, "test_32x32.mat"))
    patch.setattr(Svhn, "UPSTREAM", upstream)


@mistake
def clothes(patch: Patch, change, *, upstream_too: bool = False):
    """Fashion-MNIST's files damaged, or with other contents, as though they were published so."""
    contents = idx_files.arrays()
    if upstream_too:
        change(contents)
    upstream = idx_files.publish(Path("published"), contents, compressed=False)
    patch.setattr(FashionMnist, "UPSTREAM", upstream)
    if not upstream_too:
        change(Path("published/train-labels-idx1-ubyte"))


def no_network(patch: Patch) -> None:
    """No Debian folder, no server, no apt-get."""
    upstream = dataclasses.replace(idx_files.publish(Path("x")), debian_folder=Path("nowhere"))
    shutil.rmtree("x")
    patch.setattr(FashionMnist, "UPSTREAM", upstream)
    patch.setenv("PATH", "/nowhere")


def full_disk(patch: Patch) -> None:
    free = types.SimpleNamespace(free=100)
    patch.setattr(shutil, "disk_usage", lambda path: free)


def little_memory(patch: Patch) -> None:
    patch.setattr(run_lib, "free_memory", lambda mesh: 1e5)


def no_files(patch: Patch) -> None:
    for number, path in enumerate(Path("pictures/bee").iterdir()):
        path.unlink()
        os.mkfifo(path) if number % 2 else path.symlink_to("nowhere")


def no_device(patch: Patch) -> None:
    """As JAX does; in this process it has found its devices already."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'tqu': not in the list of known backends.")

    patch.setattr(jax, "devices", devices)
    patch.setenv("JAX_PLATFORMS", "tqu")


def no_home(patch: Patch) -> None:
    """As for a user of whom the system knows nothing."""
    patch.setattr(os.path, "expanduser", lambda path: path)


@mistake
def cars(patch: Patch, change):
    Path("published").mkdir()
    write_cars(Path("published"))
    change(Path("published"))


@mistake
def food(patch: Patch, change, form: str = "tar"):
    members, _ = food_members()
    change(members)
    write_food(Path("published"), members, form)


def cut_food(patch: Patch) -> None:
    food(lambda members: None, "tar.gz")(patch)
    cut("published/food-101.tar.gz")(patch)


@mistake
def imagenet(patch: Patch, archive: bytes):
    Path("published").mkdir()
    for split in ("train", "val"):
        Path(f"published/ILSVRC2012_img_{split}.tar").write_bytes(archive)


def same_seed(content: dict) -> None:
    content["config"]["seed"] = 0


def labels_beyond(patch: Patch) -> None:
    """Labels that were never right: the digests are theirs."""
    path = next(Path("album").rglob("labels_train.npy"))
    np.save(path, np.full(20, 3, np.int32))
    digests.write(path.parent, {path.name: path})


def closed(patch: Patch) -> None:
    """As for a user who may not look into the folder; root may."""

    def refused(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    patch.setattr(staging, "os", types.SimpleNamespace(**vars(os) | {"stat": refused}))


def squares() -> None:
    """The prepared pictures as squares; made here, for few cases need them."""
    assert run(*PREPARED, "--mode=prepare") == 0
