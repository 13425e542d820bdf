"""What users get wrong: one line, exit 2, nothing written and nothing lost.

Root may write everywhere, so what cannot be written is here below a regular file or in /proc, where
not even root makes a folder.
"""

import dataclasses
import json
import os
import pickle
import re
import runpy
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import scipy.io
from PIL import Image
from safetensors.numpy import save_file

from sync_jax import run as run_lib
from sync_jax.config import to_json
from sync_jax.data import catalogue, cifar, fashion_mnist, pictures, svhn
from sync_jax.evaluate import Predictions, evaluation_record
from sync_jax.report import write_report
from tests import tiny
from tests.command_line import QUICKSTART, ROOT, run
from tests.data import idx_files, test_archives
from tests.data.pictures import pixels, write_pictures
from tests.data.test_published_pictures import food_members, tar, write_cars, write_food


class Bad(NamedTuple):
    """A mistake: a command line, what its line must match, and what is wrong beside it."""

    arguments: list[str]
    message: str
    spoil: Callable[[pytest.MonkeyPatch], object] | None = None


TINY = [f"--config.{path}={value}" for path, value in tiny.OVERRIDES.items()]
TRAIN = [QUICKSTART, *TINY, "--config.data.data_dir=data"]
DONE = [*TRAIN, "--workdir=runs/done"]
EVALUATE = [*DONE, "--mode=evaluate"]
COMPARE = ["--mode=compare", "--runs=runs/*", "--workdir=table"]
ALBUM = [
    "--config=configs/image_folder.py",
    *("--config.data.folder=pictures", "--config.data.image_size=12"),
    *("--config.train.batch_size=8", "--config.evaluation.batch_size=8"),
    "--config.data.calibration_size=3",
]
PREPARED = [*ALBUM, "--config.data.data_dir=album", "--workdir=new"]
NEW_ALBUM = [*ALBUM, "--config.data.data_dir=new", "--mode=prepare"]
RESNET = [*TRAIN, "--workdir=new", "--config.model.name=resnet18", "--config.model.width=2"]
RESNET += ["--config.model.features=0"]


def prepare(name: str) -> list[str]:
    where = ["--config.data.source=published", "--config.data.data_dir=new", "--mode=prepare"]
    return [f"--config=configs/{name}.py", *where]


def file(text: str) -> dict:
    """A config file of the user's."""
    return {
        "arguments": ["--config=mine.py"],
        "spoil": lambda monkeypatch: Path("mine.py").write_text(text),
    }


def changed(line: str) -> dict:
    """The default config with a line more."""
    return file(
        "from ml_collections import config_dict\n"
        "from sync_jax.config import default_config\n"
        f"def get_config():\n  c = default_config()\n  {line}\n  return c\n"
    )


# --- What can be wrong with files -----------------------------------------------------------------


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
        monkeypatch.setitem(catalogue._BUILDERS, "cifar100", (cifar.Cifar100, upstream))
        if after:
            after(path)

    return spoil


def label_100(members: dict[str, bytes]) -> None:
    data = members["train.bin"]
    members["train.bin"] = data[:1] + bytes([100]) + data[2:]


def pickled(**fields) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        content = pickle.loads(members["train"])
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
        monkeypatch.setitem(catalogue._BUILDERS, "svhn", (svhn.Svhn, upstream))

    return spoil


def clothes(change, *, upstream_too: bool = False) -> Callable[[pytest.MonkeyPatch], object]:
    """Fashion-MNIST's files damaged, or with other contents, as though they were published so."""

    def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
        contents = idx_files.arrays()
        if upstream_too:
            change(contents)
        upstream = idx_files.publish(Path("published"), contents, compressed=False)
        builder = (fashion_mnist.FashionMnist, upstream)
        monkeypatch.setitem(catalogue._BUILDERS, "fashion_mnist", builder)
        if not upstream_too:
            change(Path("published/train-labels-idx1-ubyte"))

    return spoil


def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """No Debian folder, no server, no apt-get."""
    upstream = dataclasses.replace(idx_files.publish(Path("x")), debian_folder=Path("nowhere"))
    shutil.rmtree("x")
    monkeypatch.setitem(
        catalogue._BUILDERS, "fashion_mnist", (fashion_mnist.FashionMnist, upstream)
    )
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


BAD = {
    # The command line.
    "no config": Bad([], "--config is missing; for example --config=configs/fashion_mnist.py"),
    "no such file": Bad(
        ["--config=configs/imagnet.py"],
        "configs/imagnet.py is no file; choose from configs/cifar10.py, .*, or name one of yours",
    ),
    "a folder": Bad(["--config=configs"], "--config=configs is no file"),
    "stray argument": Bad([QUICKSTART, "train"], "unexpected argument 'train'"),
    "unknown flag": Bad([QUICKSTART, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "unknown mode": Bad(
        [QUICKSTART, "--mode=tset"],
        "--mode=tset: .*prepare.train.evaluate.sweep.compare.ensemble",
    ),
    "unknown field": Bad(
        [QUICKSTART, "--config.train.epocs=3"],
        "config.train has no field 'epocs' .did you mean 'epochs'..; choose from batch_size",
    ),
    "unknown section": Bad([QUICKSTART, "--config.trian.epochs=3"], "did you mean 'train'"),
    "field of a value": Bad([QUICKSTART, "--config.method.x=3"], "config.method is a value"),
    "value for a section": Bad([QUICKSTART, "--config.train=3"], "config.train=3"),
    "no number": Bad([QUICKSTART, "--config.train.epochs=many"], "config.train.epochs=many"),
    "no integer": Bad([QUICKSTART, "--config.train.batch_size=1.5"], "config.train.batch_size=1.5"),
    "no boolean": Bad([QUICKSTART, "--config.data.flip=maybe"], "config.data.flip=maybe"),
    "unknown method": Bad(
        [QUICKSTART, "--config.method=snyc"],
        "config.method='snyc' .*did you mean 'sync'.*choose from ccl_sc, ce, deep_gamblers, ",
    ),
    "unknown dataset": Bad(
        [QUICKSTART, "--config.data.name=mnist"],
        "config.data.name='mnist' is unknown.*choose from cifar10, .*fashion_mnist, ",
    ),
    "no data": Bad(
        ["--config=configs/imagenet100.py", "--config.data.data_dir=new"],
        "imagenet100 is not prepared: .*ILSVRC2012_img_train.tar.*image-net.org.*--mode=prepare",
    ),
    "no such source": Bad(
        [
            "--config=configs/stanford_cars.py",
            "--mode=prepare",
            "--config.data.data_dir=new",
            "--config.data.source=nowhere",
        ],
        "data.source='nowhere' does not exist; it must hold cars_train/",
    ),
    "crops beyond the square": Bad(
        [QUICKSTART, "--config.data.stored_size=32"],
        "image_size=64, stored_size=32 and short_side=32 must not decrease",
    ),
    "not finite": Bad([QUICKSTART, "--config.loss.alpha=nan"], r"alpha=nan must be .* in \[0, 1\]"),
    "no steps to trace": Bad(
        [QUICKSTART, "--config.profile.steps=ten"], "profile.steps='ten' must be steps of the run"
    ),
    "a trace beyond the end": Bad(
        [*TRAIN, "--workdir=new", "--config.profile.steps=35-37"],
        "profile.steps='35-37' is beyond the run's 18 steps",
    ),
    "coverage 0": Bad([QUICKSTART, "--config.target_coverage=0"], r"target_coverage=0.* \(0, 1\]"),
    "delta 1": Bad([QUICKSTART, "--config.evaluation.delta=1"], r"delta=1.* in \(0, 1\)"),
    "no coverages": Bad([QUICKSTART, "--config.evaluation.coverages=()"], r"coverages=\(\)"),
    "coverage 101": Bad([QUICKSTART, "--config.evaluation.coverages=(101,)"], r"in \(0, 100\]"),
    "negative seed": Bad([QUICKSTART, "--config.seed=-1"], "config.seed=-1 must be between 0"),
    "batch too large": Bad(
        [QUICKSTART, "--config.train.batch_size=60000"],
        "train.batch_size=60000 is more than the 54000 training examples",
    ),
    "nothing to train on": Bad(
        [QUICKSTART, "--config.data.calibration_size=60000"],
        "calibration_size=60000: fashion_mnist has 60000 .* use 10 to 59990",
    ),
    "endless warm-up": Bad(
        [QUICKSTART, "--config.train.epochs=0.5"], "warmup_epochs=1 must be less"
    ),
    "named folder is missing": Bad(
        [QUICKSTART, "--config.data.source=nowhere", "--config.data.data_dir=new"],
        "data.source='nowhere'",
    ),
    "workdir is a file": Bad([QUICKSTART, "--workdir=configs/quickstart.py"], "is not a folder"),
    "workdir in a bucket": Bad(
        [QUICKSTART, "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path: .*mount the bucket, .*launch/README.md",
    ),
    "comparison in a bucket": Bad(
        ["--mode=compare", "--runs=x", "--workdir=gs://bucket/run"],
        "--workdir=gs://bucket/run must be a path",
    ),
    "runs in a bucket": Bad(
        ["--mode=compare", "--runs=gs://bucket/runs/*"], "--runs=gs://bucket/runs/. must be a path"
    ),
    **{
        f"{field} in a bucket": Bad(
            [QUICKSTART, f"--config.{field}=gs://bucket/x"],
            f"config.{field}=gs://bucket/x must be a path: .*mount the bucket",
        )
        for field in ("data.data_dir", "data.source", "data.folder", "model.pretrained")
    },
    "nothing to compare": Bad(["--mode=compare"], "--runs is missing"),
    "an ensemble of nothing": Bad(["--mode=ensemble"], "--runs is missing"),
    "no runs": Bad(["--mode=compare", "--runs=runs/x-*"], "--runs=runs/x-. matches no folder"),
    "nothing to vary": Bad([QUICKSTART, "--mode=sweep"], "--vary is missing"),
    "vary what": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=metod=ce"],
        "no field 'metod' .did you mean 'method'",
    ),
    "vary to what": Bad([QUICKSTART, "--mode=sweep", "--vary=seed="], "needs values"),
    "vary to another type": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=seed=0,x"],
        "'x' must be of type",
    ),
    "vary twice": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=seed=0", "--vary=seed=1"], "varied twice"
    ),
    "vary to the same": Bad([QUICKSTART, "--mode=sweep", "--vary=seed=1,1"], "names a value twice"),
    "vary to what is refused": Bad(
        [QUICKSTART, "--mode=sweep", "--vary=method=ce,sinc"],
        "config.method='sinc' is unknown",
    ),
    "vary without sweep": Bad([QUICKSTART, "--vary=seed=0,1"], "--vary belongs to --mode=sweep"),
    "runs without comparison": Bad([QUICKSTART, "--runs=x"], "--runs and --mixed belong to"),
    "nothing to evaluate": Bad(
        [QUICKSTART, "--mode=evaluate"],
        "runs/quickstart-sync-seed0/predictions_calibration.npz is missing",
    ),
    # The config file.
    "syntax": Bad(message="mine.py.*SyntaxError", **file("def get_config(:\n")),
    "no function": Bad(message="mine.py.*get_config", **file("x = 1\n")),
    "not a config": Bad(
        message="mine.py.*must return a ConfigDict", **file("def get_config():\n  return 3\n")
    ),
    "missing import": Bad(
        message="mine.py.*No module named 'nosuchmodule'", **file("import nosuchmodule\n")
    ),
    "an end of its own": Bad(message="mine.py.*SystemExit: 0", **file("raise SystemExit(0)\n")),
    "no text": Bad(message="mine.py cannot be used: .*null bytes", **file("x = 1\0")),
    "misspelt field": Bad(
        message="config.loss has no field 'alhpa' .did you mean 'alpha'",
        **changed("c.loss.alhpa = 1.0"),
    ),
    "wrong type": Bad(message="mine.py.*'seed'.*one", **changed("c.seed = 'one'")),
    "missing fields": Bad(
        message="is missing; begin with sync_jax.config.default_config",
        **file("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict()\n"),
    ),
    # Values.
    "a bool for an integer": Bad(
        message="config.seed=True must be of type int", **changed("c.seed = True")
    ),
    "None for a number": Bad(
        message="config.train.epochs=None must be of type float", **changed("c.train.epochs = None")
    ),
    "a number too large for a float": Bad(
        message="--config=mine.py: int too large to convert to float",
        **changed("c.loss.payoff = 10**400"),
    ),
    "a value that is required": Bad(
        message="mine.py cannot be used: RequiredValueError: None value found",
        **changed("c.seed = config_dict.required_placeholder(int)"),
    ),
    "a null character in a path": Bad(
        message=r"config.data.data_dir='a.x00b' can be no path",
        **changed("c.data.data_dir = 'a\\0b'"),
    ),
    "an endless list": Bad(
        message="evaluation.coverages has 5000 values; at most 1000 will do",
        **changed("c.evaluation.coverages = tuple(i / 50 for i in range(1, 5001))"),
    ),
    "a list for a number": Bad([QUICKSTART, "--config.train.epochs=[1,2]"], "train.epochs=.1,2."),
    "infinite epochs": Bad([QUICKSTART, "--config.train.epochs=inf"], "epochs=inf must be .*1e6"),
    "negative weight decay": Bad(
        [QUICKSTART, "--config.optimizer.weight_decay=-0.1"], "weight_decay=-0.1 .* at least 0"
    ),
    "more than float32 holds": Bad(
        [QUICKSTART, "--config.loss.prior_power=1e39"], r"prior_power=1e\+39 must be .*1e30 at most"
    ),
    "an absurd width": Bad(
        [QUICKSTART, "--config.model.width=1000000"], "width=1000000 must be between 0 and 1024"
    ),
    "an absurd feature vector": Bad(
        [QUICKSTART, "--config.model.features=10000000"], "features=10000000 must be between 0 and"
    ),
    "an absurd picture": Bad(
        [QUICKSTART, "--config.data.image_size=1000000"], "image_size=1000000 must be between 8"
    ),
    "a batch of none": Bad([QUICKSTART, "--config.train.batch_size=0"], "batch_size=0 .* least 1"),
    "a negative batch": Bad(
        [QUICKSTART, "--config.evaluation.batch_size=-8"], "evaluation.batch_size=-8 .* between 1"
    ),
    "a batch for other devices": Bad(
        [*TRAIN, "--workdir=new", "--config.train.batch_size=12"],
        "train.batch_size=12 cannot be split over 8 devices: 12 / 8 = 1.50; use 8 or 16",
    ),
    "negative coverage": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(-5,)"], r"coverages=\(-5,\) .* \(0, 100\]"
    ),
    "duplicate coverages": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(50, 90, 50)"],
        "50, 90, 50. names a value twice",
    ),
    "words for coverages": Bad(
        [QUICKSTART, "--config.evaluation.coverages=('half',)"], "coverages=.*list of percentages"
    ),
    "a risk above 1": Bad(
        [QUICKSTART, "--config.evaluation.target_risks=(2.0,)"], "target_risks=.*error rates in"
    ),
    "momentum of 1.5": Bad(
        [QUICKSTART, "--config.optimizer.momentum=1.5"], r"momentum=1.5 .* in \[0, 1\]"
    ),
    "unknown schedule": Bad(
        [QUICKSTART, "--config.optimizer.schedule=cosin"],
        "schedule='cosin' .*did you mean 'cosine'",
    ),
    "unknown network": Bad(
        [QUICKSTART, "--config.model.name=resnet19"],
        "model.name='resnet19' .*did you mean 'resnet1",
    ),
    "a payoff beyond the classes": Bad(
        [QUICKSTART, "--config.method=deep_gamblers", "--config.loss.payoff=11"],
        "payoff=11 must be at most the 10 classes",
    ),
    "more steps than can be counted": Bad(
        [QUICKSTART, "--config.train.epochs=1000000"], "epochs=1e.06 must be less than 39768"
    ),
    "a risk that nothing proves": Bad(
        [*EVALUATE, "--config.evaluation.target_risks=(1e-300,)"], "target_risks=.*from 1e-6"
    ),
    "a bracket too few": Bad(
        [QUICKSTART, "--config.evaluation.coverages=(50"], r"coverages=\('\(50',\) must be a list"
    ),
    "an argument of the config": Bad(
        ["--config=configs/quickstart.py:7"], "configs/quickstart.py:7: TypeError: get_config"
    ),
    "no value": Bad([QUICKSTART, "--config.seed="], "config.seed=: invalid literal for int"),
    # Folders for data, and the machine.
    "a network of more than the memory": Bad(
        [*TRAIN, "--workdir=new"],
        r"model.name='cnn' of width=4 and features=16 has .* parameters: the state takes",
        little_memory,
    ),
    "data_dir is empty": Bad([QUICKSTART, "--config.data.data_dir="], "data.data_dir is empty"),
    "data_dir is a file": Bad(
        [QUICKSTART, "--config.data.data_dir=notes.txt", "--workdir=new"],
        "notes.txt' is not a fold",
    ),
    "data_dir below a file": Bad(
        [QUICKSTART, "--config.data.data_dir=notes.txt/x/y", "--workdir=new"],
        "data.data_dir='.*notes.txt/x/y' cannot be used: Not a directory",
    ),
    "data_dir that cannot be made": Bad(
        [*NEW_ALBUM, "--config.data.data_dir=/proc/x"], "data_dir='/proc/x' cannot be used: No such"
    ),
    "data_dir of too long a name": Bad(
        [QUICKSTART, f"--config.data.data_dir={'x' * 300}"],
        "data_dir='.*x' cannot be used: File na",
    ),
    "no home folder": Bad([QUICKSTART], "'~/.cache/sync_jax' names a home folder that is", no_home),
    "weights in no home folder": Bad(
        [*RESNET, "--config.model.pretrained=~nobody-at-all/w.pth"], "pretrained=.* is no file"
    ),
    "no device": Bad(
        TRAIN, "JAX finds no device .JAX_PLATFORMS=tqu.: Unable .* JAX_PLATFORMS=cpu", no_device
    ),
    "a full disk": Bad(
        NEW_ALBUM, "needs 10.0 MB to prepare pictures-.*, 0.0 MB are free", full_disk
    ),
    "no network": Bad(
        [QUICKSTART, "--config.data.data_dir=new", "--workdir=run"],
        "fashion_mnist cannot be obtained: .*no apt-get .*say --config.data.source=FOLDER",
        no_network,
    ),
    # The folder of the run.
    "workdir below a file": Bad(
        [*TRAIN, "--workdir=notes.txt/run"],
        "workdir=notes.txt/run is below .*notes.txt, which is n",
    ),
    "workdir that cannot be made": Bad(
        [*TRAIN, "--workdir=/proc/run"], "workdir=/proc/run cannot be written: No such file"
    ),
    "workdir of too long a name": Bad(
        [*TRAIN, f"--workdir={'x' * 300}"], "workdir=x* cannot be used: File name too long"
    ),
    "workdir of another experiment": Bad(
        [*TRAIN, "--workdir=runs/two"],
        "holds another experiment: config.seed is 1 there and 0 here",
    ),
    "workdir of another experiment, evaluated": Bad(
        EVALUATE, "holds another experiment: config.seed is 5 there and 0 here", other_seed
    ),
    "workdir of an ensemble": Bad(
        DONE, "holds a report and no config.json, as an ensemble", remove("runs/done/config.json")
    ),
    "an ensemble's folder, evaluated": Bad(
        EVALUATE, "holds a report and no config.json", remove("runs/done/config.json")
    ),
    "checkpoints are a file": Bad(
        DONE, "done/checkpoints is not a folder; name another", write("runs/done/checkpoints", "")
    ),
    "tensorboard is a file": Bad(
        DONE, "done/tensorboard is not a folder; name another", write("runs/done/tensorboard", "")
    ),
    "config.json is a folder": Bad(DONE, "config.json cannot be read", folder("config.json")),
    "report.json is a folder": Bad(DONE, "report.json is damaged", folder("report.json")),
    "metrics.jsonl is a folder": Bad(DONE, "metrics.jsonl cannot be read", folder("metrics.jsonl")),
    "the lock is a folder": Bad(
        [*TRAIN, "--workdir=begun"],
        "workdir=begun cannot be written: Is a directory",
        lambda monkeypatch: os.makedirs("begun/.lock"),
    ),
    "workdir is a link to itself": Bad(
        [*TRAIN, "--workdir=loop"],
        "workdir=loop cannot be written: File exists",
        lambda monkeypatch: os.symlink("loop", "loop"),
    ),
    "config.json cut short": Bad(DONE, "config.json cannot be read", cut("runs/done/config.json")),
    "config.json of something else": Bad(
        DONE, "config.json cannot be read", write("runs/done/config.json", "[1, 2]")
    ),
    "config.json without end": Bad(
        DONE, "config.json cannot be read", write("runs/done/config.json", "[" * 100_000)
    ),
    "metrics of another program": Bad(
        DONE, "metrics.jsonl: line 1 is no entry", write("runs/done/metrics.jsonl", "loss 3\n")
    ),
    "metrics of another kind": Bad(
        EVALUATE,
        "metrics.jsonl: line 2 is no entry",
        write("runs/done/metrics.jsonl", '{"step": 1, "seconds": 2}\n[3]\n'),
    ),
    "metrics that are words": Bad(
        EVALUATE,
        "metrics.jsonl: line 1 is no entry",
        write("runs/done/metrics.jsonl", '{"step": "one", "seconds": 2}\n'),
    ),
    "metrics that are bytes": Bad(
        DONE, "metrics.jsonl: line 1 is no entry", write("runs/done/metrics.jsonl", b"\xff\0\n")
    ),
    "report cut short": Bad(DONE, "report.json is damaged", cut("runs/done/report.json")),
    "report of another schema": Bad(
        DONE, "report.json has schema 1, this version", report(lambda r: r.update(schema=1))
    ),
    "report without end": Bad(
        DONE, "report.json is damaged", write("runs/done/report.json", '{"schema":' * 50_000)
    ),
    "report without a field": Bad(
        DONE, "report.json is damaged .KeyError: 'brier'", report(lambda r: r["test"].pop("brier"))
    ),
    "report with a word for a number": Bad(
        COMPARE, "report.json is damaged", report(lambda r: r["test"].update(accuracy="high"))
    ),
    "report with an unknown score": Bad(
        DONE, "report.json is damaged .KeyError: 'param", report(lambda r: r["scores"].update(x={}))
    ),
    "report with a config of another type": Bad(
        COMPARE, "report.json is damaged", report(lambda r: r.update(config="none"))
    ),
    "predictions are missing": Bad(
        EVALUATE, "predictions_test.npz is missing", remove("runs/done/predictions_test.npz")
    ),
    "predictions cut short": Bad(
        EVALUATE, "predictions_test.npz is damaged", cut("runs/done/predictions_test.npz")
    ),
    "predictions with NaN": Bad(
        EVALUATE, "test.npz is damaged: logits holds a number that", predictions(logits=nan_first)
    ),
    "predictions with infinite selection": Bad(
        EVALUATE,
        "calibration.npz is damaged: selection_logits holds a number that is not finite",
        predictions("calibration", selection_logits=lambda x: x + np.inf),
    ),
    "predictions of another shape": Bad(
        EVALUATE,
        r"selection_logits is float32 \(70, 1\), no output",
        predictions(selection_logits=lambda x: x[:, None]),
    ),
    "predictions of no class": Bad(
        EVALUATE,
        "damaged: logits is float32 .70, 0., no",
        predictions(logits=lambda x: x[:, :0], auxiliary_logits=None),
    ),
    "predictions of no example": Bad(
        EVALUATE,
        "damaged: .* is float32 .0",
        predictions(
            **dict.fromkeys(
                ("logits", "selection_logits", "auxiliary_logits", "labels", "index"),
                lambda x: x[:0],
            )
        ),
    ),
    "predictions that are words": Bad(
        EVALUATE, "damaged: logits is <U", predictions(logits=lambda x: x.astype(str))
    ),
    "predictions of fractional labels": Bad(
        EVALUATE, "labels is float64", predictions(labels=lambda x: x + 0.5)
    ),
    "predictions of a label out of range": Bad(
        EVALUATE, "labels are 1 to 10, of 10 classes", predictions(labels=lambda x: x + 1)
    ),
    "predictions of a negative label": Bad(
        EVALUATE, "labels are -1 to 8", predictions(labels=lambda x: x - 1)
    ),
    "predictions without the score's": Bad(
        EVALUATE, "do not go with the score selection", predictions(selection_logits=None)
    ),
    "predictions of fewer classes": Bad(
        EVALUATE,
        "do not go with the score selection: .* of 11 classes and .* of 10 classes",
        predictions(
            "calibration",
            logits=lambda x: np.hstack([x, x[:, :1]]),
            auxiliary_logits=lambda x: np.hstack([x, x[:, :1]]),
        ),
    ),
    "predictions that expand": Bad(EVALUATE, "test.npz is damaged: it is compressed", compressed),
    # Many runs.
    "compare without predictions": Bad(
        COMPARE, "predictions_test.npz is missing", remove("runs/two/predictions_test.npz")
    ),
    "compare what is not finished": Bad(
        COMPARE, "runs/two holds no finished run", remove("runs/two/report.json")
    ),
    "compare other examples": Bad(
        COMPARE, "has other test examples than", predictions(index=lambda x: x + 1)
    ),
    "compare the same run": Bad(COMPARE, "are the same run: seed 0", report(same_seed, "two")),
    "compare other networks": Bad(
        COMPARE,
        "differ in more than method and seed: config.model.width is 4 in .*, or add --mixed",
        report(lambda r: r["config"]["model"].update(width=7), "two"),
    ),
    "compare report and predictions of two runs": Bad(
        COMPARE, "report.json is damaged, or not of the pred", predictions(selection_logits=None)
    ),
    "compare into a file": Bad(
        [*COMPARE[:2], "--workdir=notes.txt"], "workdir=notes.txt cannot be written: File exists"
    ),
    "compare into too long a name": Bad(
        [*COMPARE[:2], f"--workdir={'x' * 300}"], "workdir=x* cannot be written: File name too long"
    ),
    "compare a file": Bad(
        ["--mode=compare", "--runs=notes.txt"], "runs=notes.txt matches no folder"
    ),
    "an ensemble of one": Bad(["--mode=ensemble", "--runs=runs/two"], "takes two runs or more"),
    "an ensemble into a run": Bad(
        ["--mode=ensemble", "--runs=runs/*", "--workdir=runs/two"], "holds a run of its own"
    ),
    "an ensemble into too long a name": Bad(
        ["--mode=ensemble", "--runs=runs/*", f"--workdir={'x' * 300}"], "cannot be .*name too long"
    ),
    "an ensemble with damaged calibration": Bad(
        ["--mode=ensemble", "--runs=runs/*", "--workdir=new"],
        "calibration.npz is damaged",
        cut("runs/two/predictions_calibration.npz"),
    ),
    "a sweep into another experiment": Bad(
        [*TRAIN, "--mode=sweep", "--vary=seed=3,0", "--workdir=sweep"],
        "workdir=sweep/quickstart-sync-seed0 holds another experiment: config.seed is 1 there",
        lambda monkeypatch: shutil.copytree("runs/two", "sweep/quickstart-sync-seed0"),
    ),
    "a sweep of what changes nothing": Bad(
        [*TRAIN, "--mode=sweep", "--vary=data.source=../a,../b", "--workdir=sweep"],
        "vary=data.source=../a,../b: data.source changes no training",
    ),
    "a sweep of folders of one name": Bad(
        [*TRAIN, "--mode=sweep", "--vary=data.folder=a/b,a-b", "--workdir=sweep"],
        "two runs would have the same folder",
    ),
    "a sweep over a list": Bad(
        [*TRAIN, "--mode=sweep", "--vary=data.flip=1,2"], "data.flip=1,2: '1' must be of type bool"
    ),
    "a sweep into a file": Bad(
        [*TRAIN, "--mode=sweep", "--vary=seed=0,1", "--workdir=notes.txt"],
        "workdir=notes.txt/quickstart-sync-seed0 is below .*notes.txt, which is no folder",
    ),
    "a sweep over batches for other devices": Bad(
        [*TRAIN, "--mode=sweep", "--vary=train.batch_size=16,12", "--workdir=sweep"],
        "train.batch_size=12 cannot be split over 8 devices",
    ),
    # Pictures.
    "pictures nowhere": Bad([*NEW_ALBUM, "--config.data.folder=x"], "folder='.*x' does not exist"),
    "pictures of too long a name": Bad(
        [*NEW_ALBUM, f"--config.data.folder={'x' * 300}"], "data.folder='.*x' does not exist"
    ),
    "a source of too long a name": Bad(
        [*prepare("food101"), f"--config.data.source={'x' * 300}"], "source='x*' does not exist"
    ),
    "a source of clothes of too long a name": Bad(
        [*prepare("fashion_mnist"), f"--config.data.source={'x' * 300}"], "source='x*': .* does not"
    ),
    "pictures are a file": Bad(
        [*NEW_ALBUM, "--config.data.folder=notes.txt"], "folder='.*notes.txt' is not a folder"
    ),
    "pictures of no folder": Bad(
        ["--config=configs/image_folder.py"],
        "data.folder is empty; say --config.data.folder=FOLDER",
    ),
    "pictures of no class": Bad(
        NEW_ALBUM, "has 0 folders of pictures; it must hold one", album({})
    ),
    "pictures of one class": Bad(NEW_ALBUM, "has 1 folder of pictures", album({"ant": 20})),
    "pictures beside each other": Bad(NEW_ALBUM, "has 9 pictures directly in it", album({".": 9})),
    "an empty class": Bad(
        NEW_ALBUM, "train has no picture of 'bee'; known are .jpg", album({"ant": 20, "bee": 0})
    ),
    "pictures that are pipes and links to nothing": Bad(
        NEW_ALBUM, "train has no picture of 'bee'", no_files
    ),
    "a class of too few": Bad(NEW_ALBUM, "a class has 4 pictures", album({"ant": 20, "bee": 4})),
    "a class of test alone": Bad(
        NEW_ALBUM,
        "train has no picture of 'bee'",
        album({"train/ant": 9, "train/cat": 9, "test/ant": 9, "test/cat": 9, "test/bee": 9}),
    ),
    "a batch of more than the pictures": Bad(
        [*ALBUM, "--config.data.data_dir=new", "--config.train.batch_size=64", "--workdir=run"],
        "train.batch_size=64 is more than the 17 training examples",
    ),
    "a calibration split of more than the pictures": Bad(
        [*PREPARED, "--config.data.calibration_size=18"],
        "calibration_size=18: image_folder has 20 training examples of 3 classes",
    ),
    "a class of broken pictures": Bad(
        NEW_ALBUM, "no readable picture of 'bee'; .*bee/.*no picture of a known", broken("bee/*")
    ),
    "broken pictures": Bad(NEW_ALBUM, "train has no readable picture of 'ant'", broken("*/*")),
    "empty pictures": Bad(NEW_ALBUM, "no readable picture of 'bee'", broken("bee/*", b"")),
    "a class of NaN pixels": Bad(
        NEW_ALBUM, "no readable picture of 'ant'; .*tiff: its pixels are floating-po", nan_pictures
    ),
    "pictures that changed": Bad(
        PREPARED, "have changed since they were prep", broken("ant/001.png")
    ),
    "prepared pictures without records": Bad(
        PREPARED, "cannot be read .*delete it and prepare again", remove("album/**/*.array_record*")
    ),
    "prepared pictures cut short": Bad(
        PREPARED, "cannot be read .*delete it and prepare", cut("album/**/*-train.array_record*")
    ),
    "prepared labels cut short": Bad(
        PREPARED, "cannot be read .*delete it and prepare", cut("album/**/labels_train.npy")
    ),
    "prepared labels out of range": Bad(
        PREPARED,
        "is damaged: train has labels beyond its classes",
        lambda monkeypatch: np.save(
            next(Path("album").rglob("labels_train.npy")), np.full(20, 3, np.int32)
        ),
    ),
    "prepared description damaged": Bad(
        PREPARED, "sync_jax.json is damaged", cut("album/**/sync_jax.json")
    ),
    "squares cut short": Bad(
        PREPARED,
        "squares_12_12/train.npy is damaged .*; delete it",
        lambda monkeypatch: (squares(), cut("album/**/train.npy")(monkeypatch)),
    ),
    # Published files.
    "CIFAR is another file": Bad(
        prepare("cifar100"),
        "is not the published file, or is damaged: its MD5 sum is",
        cifar100(lambda members: None, after=lambda path: path.write_bytes(b"x")),
    ),
    "CIFAR with a label out of range": Bad(
        prepare("cifar100"), "train has labels .* to 100, expected 0 to 99", cifar100(label_100)
    ),
    "CIFAR cut short within": Bad(
        prepare("cifar100"),
        "train.bin has 92213 bytes, expected a multiple of 3074",
        cifar100(lambda members: members.update({"train.bin": members["train.bin"][:-7]})),
    ),
    "CIFAR without test": Bad(
        prepare("cifar100"), "does not hold test", cifar100(lambda members: members.pop("test.bin"))
    ),
    "CIFAR with NaN pixels": Bad(
        prepare("cifar100"),
        "train cannot be read: it has an array of other elements than bytes",
        cifar100(pickled(data=np.full((30, 3072), np.nan)), form="python"),
    ),
    "CIFAR with labels in words": Bad(
        prepare("cifar100"),
        "train does not hold the arrays that it should",
        cifar100(pickled(fine_labels=["cat"] * 30), form="python"),
    ),
    "CIFAR with fewer labels": Bad(
        prepare("cifar100"),
        "train has 29 labels for 30 images",
        cifar100(pickled(fine_labels=[1] * 29), form="python"),
    ),
    "SVHN with label 11": Bad(
        prepare("svhn"), "labels other than 1 to 10", street_numbers(y=np.full((20, 1), 11))
    ),
    "SVHN with label 0": Bad(
        prepare("svhn"), "labels other than 1 to 10", street_numbers(y=np.zeros((20, 1)))
    ),
    "SVHN with a label of NaN": Bad(
        prepare("svhn"), "labels other than 1 to 10", street_numbers(y=np.full((20, 1), np.nan))
    ),
    "SVHN with half a label": Bad(
        prepare("svhn"), "labels other than 1 to 10", street_numbers(y=np.full((20, 1), 1.5))
    ),
    "SVHN with NaN pixels": Bad(
        prepare("svhn"),
        "expected 32 x 32 x 3 x n bytes",
        street_numbers(X=np.full((32, 32, 3, 20), np.nan)),
    ),
    "SVHN of another size": Bad(
        prepare("svhn"),
        r"X of shape \(28, 28, 3, 20\), expected 32 x 32",
        street_numbers(X=np.zeros((28, 28, 3, 20), np.uint8)),
    ),
    "SVHN is not there": Bad(
        prepare("svhn"),
        "does not hold train_32x32.mat and test_32x32.mat",
        lambda monkeypatch: Path("published").mkdir(),
    ),
    "an IDX file cut short": Bad(
        prepare("fashion_mnist"),
        "train-labels-idx1-ubyte has 38 bytes once decompressed, expected 48",
        clothes(lambda path: path.write_bytes(path.read_bytes()[:-10])),
    ),
    "an IDX file of another kind": Bad(
        prepare("fashion_mnist"),
        "is not the IDX file that it should be: it starts with 0x00000d01",
        clothes(lambda path: path.write_bytes(b"\0\0\x0d\1" + path.read_bytes()[4:])),
    ),
    "an IDX file with label 10": Bad(
        prepare("fashion_mnist"),
        "train has labels 0 to 10, expected 0 to 9",
        clothes(
            lambda contents: contents["train-labels-idx1-ubyte"].__setitem__(0, 10),
            upstream_too=True,
        ),
    ),
    "prepared clothes without description": Bad(
        [*TRAIN, "--workdir=new"], "cannot be read .*delete it", cut("data/*/*/dataset_info.json")
    ),
    "prepared clothes without features": Bad(
        [*TRAIN, "--workdir=new"],
        "cannot be read .*delete it and prepare again",
        remove("data/**/*train.array_record*"),
    ),
    "prepared clothes cut short": Bad(
        [*TRAIN, "--workdir=new"],
        "cannot be read .*delete it and prepare again",
        cut("data/**/*train.array_record*"),
    ),
    "cars with damaged annotations": Bad(
        prepare("stanford_cars"),
        "cars_train_annos.mat cannot be read as annotations",
        cars(lambda f: (f / "devkit/cars_train_annos.mat").write_bytes(b"MATLAB 5.0 MAT-file" * 9)),
    ),
    "cars without names": Bad(
        prepare("stanford_cars"),
        "cars_meta.mat cannot be read as class_names",
        cars(lambda f: scipy.io.savemat(f / "devkit/cars_meta.mat", {"x": 1})),
    ),
    "food cut short": Bad(prepare("food101"), "is damaged or truncated", cut_food),
    "food without a picture": Bad(
        prepare("food101"),
        "food-101.tar has no images/apple_pie/1000000.jpg",
        food(lambda members: members.pop("food-101/images/apple_pie/1000000.jpg")),
    ),
    "food with classes that are paths": Bad(
        prepare("food101"),
        "meta/classes.txt of .* is no list of classes",
        food(lambda members: members.update({"food-101/meta/classes.txt": b".. apple_pie"})),
    ),
    "ImageNet of other classes": Bad(
        prepare("imagenet100"),
        "train has no picture of 100 of the 100 classes",
        imagenet(tar({"n00000000.tar": b""})),
    ),
    "ImageNet cut short": Bad(
        prepare("imagenet100"),
        "ILSVRC2012_img_train.tar (is truncated|cannot be read as a tar)",
        imagenet(tar({"n00000000.tar": bytes(5000)})[:3000]),
    ),
    "ImageNet is no archive": Bad(
        prepare("imagenet100"), "cannot be read as a tar archive", imagenet(b"<html>" * 200)
    ),
    # Weights.
    "weights of the cnn": Bad(
        [QUICKSTART, "--config.model.pretrained=w.pth"], "torchvision has no weights for cnn"
    ),
    "weights of another kind": Bad(
        [*RESNET, "--config.model.pretrained=w.h5"], "must end in .safetensors, .pth or .pt"
    ),
    "weights are a folder": Bad(
        [*RESNET, "--config.model.pretrained=w.pth"],
        "pretrained='w.pth' is no file",
        lambda monkeypatch: Path("w.pth").mkdir(),
    ),
    "weights are damaged": Bad(
        [*RESNET, "--config.model.pretrained=w.safetensors"],
        "w.safetensors cannot be read: ",
        write("w.safetensors", b"\xff" * 99),
    ),
    "weights are an old file of PyTorch": Bad(
        [*RESNET, "--config.model.pretrained=w.pth"],
        "w.pth is no file of torch.save in its format since 2020",
        write("w.pth", pickle.dumps({"a": 1})),
    ),
    "weights with NaN": Bad(
        [*RESNET, "--config.model.pretrained=w.safetensors"],
        "bn1.bias holds a number that is not finite",
        weights(bn1__bias=np.asarray([1, np.nan], np.float32)),
    ),
    "weights of another network": Bad(
        [*RESNET, "--config.model.pretrained=w.safetensors"],
        "no name and shape fits this network; it holds blocks.0.weight",
        weights(blocks__0__weight=np.ones(3, np.float32)),
    ),
}


def squares() -> None:
    """The prepared pictures as squares; made here, for few cases need them."""
    arguments = [*PREPARED, "--mode=prepare"]
    assert run(*arguments) == 0


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of everything, and a copy of it; prepared pictures know their path and times."""
    root = tmp_path_factory.mktemp("bad")
    world, copy = root / "world", root / "copy"
    world.mkdir()
    (world / "configs").symlink_to(ROOT / "configs")
    (world / "notes.txt").write_text("notes")
    tiny.prepare(world)
    shutil.rmtree(world / "files")
    write_pictures(world / "pictures", {"": 8})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(world)
        config = runpy.run_path("configs/quickstart.py")["get_config"]()
        config.update_from_flattened_dict(tiny.OVERRIDES)
        config.data.data_dir = "data"
        config.evaluation.coverages, config.evaluation.target_risks = (100, 50), (0.1,)
        section = config.data.copy_and_resolve_references()
        section.name, section.folder, section.data_dir = "image_folder", "pictures", "album"
        pictures.prepare(section, str)
        for seed, name in enumerate(("done", "two")):
            config.seed = seed
            finished_run(config, Path("runs", name))
    shutil.copytree(world, copy, symlinks=True)
    return world, copy


def finished_run(config, folder: Path) -> None:
    """As a training leaves it."""
    folder.mkdir(parents=True)
    parts = []
    for split, n in (("calibration", tiny.NUM_CALIBRATION), ("test", tiny.NUM_TEST)):
        rng = np.random.default_rng(config.seed)
        labels = np.arange(n, dtype=np.int32) % 10
        logits = (rng.normal(size=(n, 10)) + 2 * np.eye(10)[labels]).astype(np.float32)
        outputs = {
            "logits": logits,
            "selection_logits": logits.max(axis=1),
            "auxiliary_logits": logits,
        }
        parts.append(Predictions(outputs, labels, np.arange(n)))
        parts[-1].save(folder / f"predictions_{split}.npz")
    record = evaluation_record(*parts, config, score="selection")
    record["training"] = {"steps": 36, "seconds": 2.0}
    write_report(record, parts[1], config, folder)
    (folder / "config.json").write_text(to_json(config))
    (folder / "metrics.jsonl").write_text('{"step": 36, "part": "train", "seconds": 2.0}\n')


@pytest.fixture
def world(template, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: an untouched one of everything."""
    world, copy = template
    shutil.rmtree(world)
    shutil.copytree(copy, world, symlinks=True)
    monkeypatch.chdir(world)
    return world


def contents(folder: Path) -> dict[str, object]:
    """Every path below, with what files hold and when they were changed; no config's bytecode."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", BAD)
def test_one_line_exit_2_nothing_written_and_nothing_lost(name, world, monkeypatch, capsys):
    arguments, message, spoil = BAD[name]
    if spoil is not None:
        spoil(monkeypatch)
        capsys.readouterr()
    before = contents(world)
    assert run(*arguments) == 2
    output = capsys.readouterr()
    assert re.fullmatch(r"sync_jax: [^\n]+\n", output.err), output.err
    assert re.search(message, output.err), output.err
    # Preparing may have said what it was about to do.
    assert re.fullmatch(r"(\w+: .+\n)*", output.out)
    after = contents(world)
    assert after.keys() == before.keys()
    assert after == before


def test_the_command_lines_are_good_where_nothing_is_spoilt(world, capsys):
    """Or the cases above would fail for another reason than theirs."""
    assert run(*EVALUATE) == 0
    assert run(*DONE, "--config.evaluation.delta=0.1") == 0
    assert run(*COMPARE) == 0
    assert run(*NEW_ALBUM) == 0
    assert capsys.readouterr().err == ""


def test_pictures_of_odd_sizes_are_good(world, capsys):
    sizes = [(1, 1), (1, 2), (3, 2000), (2000, 3), (7, 5), (1, 9000), (12, 12), (13, 640)]
    for number, path in enumerate(sorted(Path("pictures/bee").iterdir())):
        Image.fromarray(pixels(number, *sizes[number])).save(path)
    assert run(*NEW_ALBUM) == 0
    assert "left out" not in capsys.readouterr().out
    assert not list(world.rglob("bad_files.txt"))
    shapes = [np.load(path).shape for path in sorted(Path("new").rglob("t*.npy"))]
    assert shapes == [(4, 12, 12, 3), (20, 12, 12, 3)]


def test_there_are_more_than_sixty_different_ones():
    assert len({(*bad.arguments, bad.message, bad.spoil) for bad in BAD.values()}) == len(BAD) > 60
