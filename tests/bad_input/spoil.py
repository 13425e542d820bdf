"""What can be wrong with files and the machine: each spoils the folder of everything."""

import dataclasses
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
from safetensors.numpy import save_file

from sync_jax import trainer as run_lib
from sync_jax.data.datasets.cifar import Cifar100
from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.datasets.svhn import Svhn
from tests.bad_input.case import PREPARED
from tests.command_line import run
from tests.data import idx_files, test_archives
from tests.data.pictures import pixels
from tests.data.test_published_pictures import food_members, write_cars, write_food


def write(path: str, content: bytes | str) -> Callable[[pytest.MonkeyPatch], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda monkeypatch: Path(path).write_bytes(data)


def cut(path: str) -> Callable[[pytest.MonkeyPatch], object]:
    """The first file of a pattern loses its second half."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        found = sorted(Path().glob(path))[0]
        found.write_bytes(found.read_bytes()[: found.stat().st_size // 2])

    return spoil


def remove(pattern: str) -> Callable[[pytest.MonkeyPatch], object]:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        for path in Path().glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return spoil


def folder(*names: str) -> Callable[[pytest.MonkeyPatch], object]:
    """Folders where a run has files."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        for path in (Path("runs/done", name) for name in names):
            path.unlink(missing_ok=True)
            path.mkdir()

    return spoil


def report(change: Callable[[dict], object], run: str = "done"):
    """A report that is JSON of its schema, and wrong."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        path = Path(f"runs/{run}/report.json")
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def predictions(split: str = "test", **arrays: Callable[[np.ndarray], np.ndarray] | None):
    """Predictions that are an .npz file, and wrong: arrays replaced, or removed."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        path = Path(f"runs/done/predictions_{split}.npz")
        with np.load(path) as loaded:
            content = dict(loaded)
        for name, change in arrays.items():
            name = name if name in ("labels", "index") else f"outputs/{name}"
            array = content.pop(name)
            if change is not None:
                content[name] = change(array)
        np.savez(path, **content)

    return spoil


def nan_first(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[0] = np.nan
    return array


def compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("runs/done/predictions_test.npz")
    with np.load(path) as loaded:
        content = {name: np.zeros_like(array) for name, array in loaded.items()}
    np.savez_compressed(path, **content)


def album(layout: dict[str, int], kind: str = "png") -> Callable[[pytest.MonkeyPatch], object]:
    """Other pictures: so many in each folder."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.rmtree("pictures")
        Path("pictures").mkdir()
        for folder, count in layout.items():
            path = Path("pictures", folder)
            path.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(pixels(i)).save(path / f"{i}.{kind}")

    return spoil


def broken(pattern: str, content: bytes = b"no picture") -> Callable[[pytest.MonkeyPatch], object]:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        for path in Path("pictures").glob(pattern):
            path.write_bytes(content)

    return spoil


def nan_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in Path("pictures/ant").iterdir():
        path.unlink()
        Image.fromarray(np.full((12, 12), np.nan, np.float32)).save(path.with_suffix(".tiff"))


def cifar100(change, *, form: str = "binary", after: Callable[[Path], object] | None = None):
    """CIFAR-100's archive with other members, published as it is, or damaged after that."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        contents = test_archives.cifar_contents(100, test_archives.SIZES[100])
        make = {"binary": test_archives.binary_members, "python": test_archives.python_members}
        members = make[form](100, contents)
        change(members)
        path = Path(f"published/cifar-100-{form}.tar.gz")
        path.parent.mkdir()
        test_archives.write_tar(path, members)
        upstream = test_archives.published(path.parent, (path.name,))
        monkeypatch.setattr(Cifar100, "UPSTREAM", upstream)
        if after:
            after(path)

    return spoil


def label_100(members: dict[str, bytes]) -> None:
    data = members["train.bin"]
    members["train.bin"] = data[:1] + bytes([100]) + data[2:]


def pickled(**fields) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        content = pickle.loads(members["train"])  # which this test has just made
        content |= {name.encode(): value for name, value in fields.items()}
        members["train"] = pickle.dumps(content, protocol=2)

    return change


def street_numbers(**arrays) -> Callable[[pytest.MonkeyPatch], object]:
    """SVHN's training file with other arrays, as though it were published so."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        folder = Path("published")
        folder.mkdir()
        test_archives.write_svhn(folder, {"train": 20, "test": 20})
        path = folder / "train_32x32.mat"
        content = {k: v for k, v in scipy.io.loadmat(path).items() if k in ("X", "y")} | arrays
        scipy.io.savemat(path, content)
        upstream = test_archives.published(folder, (path.name, "test_32x32.mat"))
        monkeypatch.setattr(Svhn, "UPSTREAM", upstream)

    return spoil


def clothes(change, *, upstream_too: bool = False) -> Callable[[pytest.MonkeyPatch], object]:
    """Fashion-MNIST's files damaged, or with other contents, as though they were published so."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        contents = idx_files.arrays()
        if upstream_too:
            change(contents)
        upstream = idx_files.publish(Path("published"), contents, compressed=False)
        monkeypatch.setattr(FashionMnist, "UPSTREAM", upstream)
        if not upstream_too:
            change(Path("published/train-labels-idx1-ubyte"))

    return spoil


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Debian folder, no server, no apt-get."""
    upstream = dataclasses.replace(idx_files.publish(Path("x")), debian_folder=Path("nowhere"))
    shutil.rmtree("x")
    monkeypatch.setattr(FashionMnist, "UPSTREAM", upstream)
    monkeypatch.setenv("PATH", "/nowhere")


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    free = types.SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)


def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lib, "free_memory", lambda mesh: 1e5)


def no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, path in enumerate(Path("pictures/bee").iterdir()):
        path.unlink()
        os.mkfifo(path) if number % 2 else path.symlink_to("nowhere")


def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JAX does; in this process it has found its devices already."""

    def devices():
        raise RuntimeError("Unable to initialize backend 'tqu': not in the list of known backends.")

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "tqu")


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user of whom the system knows nothing."""
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


def cars(change: Callable[[Path], object]) -> Callable[[pytest.MonkeyPatch], object]:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        Path("published").mkdir()
        write_cars(Path("published"))
        change(Path("published"))

    return spoil


def food(change: Callable[[dict[str, bytes]], object], form: str = "tar"):
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        members, _ = food_members()
        change(members)
        write_food(Path("published"), members, form)

    return spoil


def cut_food(monkeypatch: pytest.MonkeyPatch) -> None:
    food(lambda members: None, "tar.gz")(monkeypatch)
    cut("published/food-101.tar.gz")(monkeypatch)


def imagenet(archive: bytes) -> Callable[[pytest.MonkeyPatch], object]:
    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        Path("published").mkdir()
        Path("published/ILSVRC2012_img_train.tar").write_bytes(archive)
        Path("published/ILSVRC2012_img_val.tar").write_bytes(archive)

    return spoil


def weights(**arrays: np.ndarray) -> Callable[[pytest.MonkeyPatch], object]:
    named = {name.replace("__", "."): array for name, array in arrays.items()}
    return lambda monkeypatch: save_file(named, "w.safetensors")


def other_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path("runs/done/config.json")
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 5'))


def same_seed(content: dict) -> None:
    content["config"]["seed"] = 0


def squares() -> None:
    """The prepared pictures as squares; made here, for few cases need them."""
    arguments = [*PREPARED, "--mode=prepare"]
    assert run(*arguments) == 0
