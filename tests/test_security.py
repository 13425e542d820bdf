"""Nothing that is loaded runs code, leads out of its folder, expands, or is shown as it is.

Each file here is a real one that would make a marker; where that is cheap, a negative control shows
that it would have. scipy's reader of .mat files, safetensors and ArrayRecord know no code at all.
"""

import copyreg
import csv
import gzip
import importlib
import io
import json
import os
import pickle
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from safetensors.numpy import save_file

from sync_jax.data.datasets.svhn import Svhn
from sync_jax.data.images import decode
from sync_jax.errors import InputError
from sync_jax.evaluation import comparison as compare
from sync_jax.evaluation.report import read_report, show_report
from sync_jax.models.pretrained import load_pretrained, read_weights
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.console import printable
from sync_jax.runtime.workdir import prepare_workdir
from tests import tiny
from tests.bad_input.case import COMPARE, NEW_ALBUM, PREPARED, prepare
from tests.bad_input.spoil import cifar100
from tests.command_line import ROOT, run
from tests.data import idx_files, test_archives
from tests.data.pictures import pixels, write_pictures
from tests.data.test_published_pictures import food_members, write_food
from tests.runtime import test_checkpoint
from tests.test_bad_input import finished_run

MARKER = "marker"
# Would clear a terminal, and what a table, a page, a spreadsheet and a plot would take for theirs.
HOSTILE = "=1+1\x1b[2J\x07\n|\u202e[red]<script>`*$\\frac$[a](javascript:b)\udcff"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with configs/ and a module that makes the marker when it is imported."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "hostile.py").write_text(f"import os\nos.mkdir({MARKER!r})\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hostile", raising=False)
    return tmp_path


def refused(capsys, *arguments: str) -> str:
    """The one line of a command that must not do what a file asks for."""
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"sync_jax: [^\n]+\n", error), error
    assert not Path(MARKER).exists()
    return error


# --- Pickles --------------------------------------------------------------------------------------


class Trap:
    """Makes the marker in the way that it is asked to."""

    def __new__(cls, *arguments: str, **named: str):
        if arguments or named:
            os.mkdir(MARKER)
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        os.mkdir(MARKER)


class Reduced:
    def __reduce__(self):
        return os.mkdir, (MARKER,)


_TRAP = b"ctests.test_security\nTrap\n"
_NAME = f"S'{MARKER}'\n".encode()
copyreg.add_extension("os", "mkdir", 200)
PICKLES = {
    **{f"REDUCE of protocol {p}": pickle.dumps(Reduced(), protocol=p) for p in (0, 2, 4)},
    "GLOBAL": b"cposix\nmkdir\n(" + _NAME + b"tR.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c\x06marker\x85R.",
    "INST": b"(" + _NAME + b"iposix\nmkdir\n.",
    "OBJ": b"(cposix\nmkdir\n" + _NAME + b"o.",
    "NEWOBJ": b"\x80\x02" + _TRAP + b"(" + _NAME + b"t\x81.",
    "NEWOBJ_EX": b"\x80\x04" + _TRAP + b")}\x8c\x01a" + _NAME + b"s\x92.",
    "BUILD": b"\x80\x02" + _TRAP + b")\x81}b.",
    "EXT": b"\x80\x02\x82\xc8(" + _NAME + b"tR.",
    "an attribute": b"\x80\x04\x8c\x05posix\x8c\x0emkdir.__call__\x93\x8c\x06marker\x85R.",
    "an import": b"chostile\nx\n.",
    "within an allowed name": b"\x80\x04\x8c\x05numpy\x8c\x0dctypeslib.sys\x93.",
    "eval": b'cbuiltins\neval\n(S\'__import__("os").mkdir("marker")\'\ntR.',
}
HARMLESS = ("within an allowed name",)


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_cifar_are_not_executed(name, capsys, monkeypatch):
    cifar100(lambda members: members.update(train=PICKLES[name]), form="python")(monkeypatch)
    assert "train cannot be read: " in refused(capsys, *prepare("cifar100"))


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_of_weights_are_not_executed(name):
    with zipfile.ZipFile("w.pth", "w") as archive:
        archive.writestr("archive/data.pkl", PICKLES[name])
    with pytest.raises(InputError, match=r"w\.pth (holds something else|cannot be read)"):
        read_weights(Path("w.pth"))
    assert not Path(MARKER).exists()


@pytest.mark.parametrize("name", [name for name in PICKLES if name not in HARMLESS])
def test_the_pickles_would_have_been_executed(name):
    try:
        pickle.loads(PICKLES[name])
    except AttributeError:
        assert name == "an import"
    assert Path(MARKER).exists()


def test_a_pickle_cannot_change_what_reads_the_next(capsys, monkeypatch):
    """BUILD on the reader's own functions; and a persistent id, which is no storage."""
    for content in (
        b"c_codecs\nencode\n(N}S'__defaults__'\n(S'x'\ntstb.",
        b"cnumpy\ndtype\n(N}S'__kwdefaults__'\n}stb.",
        b"\x80\x02}Q.",
    ):
        cifar100(lambda members, c=content: members.update(train=c), form="python")(monkeypatch)
        refused(capsys, *prepare("cifar100"))
        shutil.rmtree("published")
    cifar100(lambda members: None, form="python")(monkeypatch)
    assert run(*prepare("cifar100")) == 0


def test_a_pickle_cannot_have_numpy_follow_addresses(capsys, monkeypatch):
    """An array of objects given as raw bytes; no control, which would crash."""
    dtype = b"cnumpy\ndtype\n(S'%s'\nI0\nI1\ntR(I3\nS'|'\nNNNI%d\nI1\nI%d\ntb"
    state = b"(I1\n(I1\nt%sI00\nC\x08\x41\x41\x41\x41\x41\x41\x41\x41tb."
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    for kind in (b"O8", b"V8", b"i8"):
        content = b"\x80\x03" + array + state % (dtype % (kind, 8, 0x3F))
        cifar100(lambda members, c=content: members.update(train=c), form="python")(monkeypatch)
        assert "an array of other elements than bytes" in refused(capsys, *prepare("cifar100"))
        shutil.rmtree("published")


def test_arrays_of_objects_are_not_unpickled(capsys):
    hostile = np.asarray([Reduced()], object)
    prepare_workdir(tiny.config(Path("data")), Path("run"))
    for name in ("calibration", "test"):
        np.savez(f"run/predictions_{name}.npz", labels=hostile, index=hostile)
    arguments = ("--workdir=run", "--mode=evaluate")
    assert "allow_pickle=False" in refused(capsys, *arguments)
    write_pictures(Path("pictures"), {"": 8})
    album = [x.replace("=album", "=new") for x in PREPARED]
    assert run(*NEW_ALBUM) == 0
    for name in ("squares_12_12/train", "labels_train"):
        path = next(Path("new").rglob(f"{name}.npy"))
        np.save(path, np.asarray([Reduced()] * 20, object))
        refused(capsys, *album)
    np.load(path, allow_pickle=True)
    assert Path(MARKER).exists()


def test_other_names_for_a_pickle(capsys, monkeypatch):
    """What looks at a file's content and not at its name would unpickle these."""
    content = PICKLES["REDUCE of protocol 2"]
    Path("published").mkdir()
    names = ("train_32x32.mat", "test_32x32.mat")
    for name in names:
        Path("published", name).write_bytes(content)
    upstream = test_archives.published(Path("published"), names)
    monkeypatch.setattr(Svhn, "UPSTREAM", upstream)
    assert "train_32x32.mat cannot be read" in refused(capsys, *prepare("svhn"))
    for name in ("w.safetensors", "w.pth", "w.pt"):
        Path(name).write_bytes(content)
        with pytest.raises(InputError):
            read_weights(Path(name))
    assert not Path(MARKER).exists()


# --- Names of modules and programs ----------------------------------------------------------------


def test_a_prepared_folder_names_modules_in_vain():
    """TFDS imports what features.json names."""
    write_pictures(Path("pictures"), {"": 8})
    assert run(*NEW_ALBUM) == 0
    tiny.prepare(Path("clothes"))
    for path in (*Path().rglob("features.json"), *Path().rglob("dataset_info.json")):
        text = re.sub(r"tensorflow_datasets\.[\w.]+\.(\w+)", r"hostile.\1", path.read_text())
        path.write_text(re.sub(r'("moduleName": )"[^"]+"', r'\1"hostile"', text))
    for path in Path().rglob("digests.json"):  # which would tell
        path.unlink()
    shutil.rmtree(next(Path("new").rglob("squares_12_12")))
    assert run(*NEW_ALBUM) == 0
    assert len(list(Path("new").rglob("squares_12_12/*.npy"))) == 1
    idx_files.dataset("clothes/data").load("train")
    assert not Path(MARKER).exists()
    prepared = next(Path("new").rglob("features.json")).parent
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="hostile"):
        tfds.builder_from_directory(prepared)
    assert Path(MARKER).exists()


def test_a_checkpoint_names_modules_in_vain():
    with Checkpoints(Path("c"), keep=2) as checkpoints:
        checkpoints.save(test_checkpoint.state(1), 1)
    changed = 0
    for path in Path("c").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            hostile = re.sub(rb"orbax\.checkpoint\.[\w.]+\.(\w+)", rb"hostile.\1", data)
            changed += hostile != data
            path.write_bytes(hostile)
    assert changed
    with Checkpoints(Path("c"), keep=2) as checkpoints:
        restored = checkpoints.restore(test_checkpoint.state(0))
    assert restored is not None
    assert not Path(MARKER).exists()


def test_postscript_is_no_picture(capsys, monkeypatch):
    """Pillow would have Ghostscript execute it."""
    program = Path("bin/gs")
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nmkdir -p {Path(MARKER).absolute()}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent.absolute()), prepend=os.pathsep)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n"
    write_pictures(Path("pictures"), {"": 8})
    for path in Path("pictures/bee").iterdir():
        path.write_bytes(postscript)
    assert "it is no picture of a known kind" in refused(capsys, *NEW_ALBUM)
    with pytest.raises(OSError, match=r"."), Image.open(io.BytesIO(postscript)) as image:
        image.load()
    assert Path(MARKER).exists()


# --- Archives -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [
    ("../outside.JPEG", tarfile.REGTYPE),
    ("/tmp/outside.JPEG", tarfile.REGTYPE),
    ("food-101/images/apple_pie/1.jpg", tarfile.SYMTYPE),
    ("food-101/images/apple_pie/1.jpg", tarfile.LNKTYPE),
    ("food-101/images/apple_pie/1.jpg", tarfile.FIFOTYPE),
])  # fmt: skip
def test_members_that_lead_out_of_an_archive(name, kind, folder, capsys):
    for config, path in (
        ("food101", "food-101.tar"),
        ("imagenet100", "ILSVRC2012_img_train.tar"),
    ):
        Path("published").mkdir(exist_ok=True)
        with tarfile.open(Path("published", path), "w") as archive:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", 0
            archive.addfile(member)
        shutil.copy(Path("published", path), "published/ILSVRC2012_img_val.tar")
        assert f"{path} is unsafe: " in refused(capsys, *prepare(config))
    assert not list(folder.parent.glob("outside*"))
    assert not Path("new").exists()


def test_of_two_members_of_a_name_nothing_is_written_outside(folder):
    members, _ = food_members()
    write_food(Path("published"), members, "tar")
    with tarfile.open("published/food-101.tar", "a") as archive:
        member = tarfile.TarInfo("food-101/meta/classes.txt")
        archive.addfile(member)  # the last counts, as when it is unpacked: it is empty
    assert run(*prepare("food101")) == 2
    assert {path.name for path in folder.iterdir()} == {"configs", "hostile.py", "published"}


def test_what_would_expand(capsys, monkeypatch):
    with zipfile.ZipFile("w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    with pytest.raises(InputError, match="its members are compressed, which torch"):
        read_weights(Path("w.pth"))
    Path("published").mkdir()
    with gzip.open("published/food-101.tar.gz", "wb") as archive:
        archive.write(bytes(20_000_000))
    assert "expands to more than photographs do" in refused(capsys, *prepare("food101"))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**13,)}
    )
    prepare_workdir(tiny.config(Path("data")), Path("run"))
    for name in ("calibration", "test"):
        with zipfile.ZipFile(f"run/predictions_{name}.npz", "w") as archive:
            archive.writestr("labels.npy", header.getvalue())
    arguments = ("--workdir=run", "--mode=evaluate")
    assert "predictions_calibration.npz is damaged" in refused(capsys, *arguments)


def test_a_picture_that_would_expand():
    huge = io.BytesIO()
    Image.new("1", (20_000, 10_000)).save(huge, "PNG")
    with pytest.raises(Exception, match="pixels"):
        decode(huge.getvalue())


# --- What is shown --------------------------------------------------------------------------------


def assert_plain(text: str) -> None:
    assert all(character.isprintable() for line in text.splitlines() for character in line)


def test_what_is_printable_stays_and_the_rest_is_spelt_out():
    assert printable("Ärger, 猫 & '\\n'") == "Ärger, 猫 & '\\n'"
    assert printable("a\x1b[2J\r\n\u202e\udcff\x9b") == "a\\x1b[2J\\r\\n\\u202e\\udcff\\x9b"
    assert printable(Path("a\tb")) == "a\\tb"


def test_names_of_pictures(capsys):
    """A name of any bytes, in the log, in bad_files.txt and as a class."""
    name = HOSTILE.replace("/", "")
    folder = Path("pictures", name)
    for path in (Path("pictures/ant"), folder):
        path.mkdir(parents=True)
        for i in range(8):
            Image.fromarray(pixels(i)).save(path / f"{i}.png")
    os.rename(folder / "7.png", folder / f"{name}.png")
    (folder / f"{name}.png").write_bytes(b"no picture")
    assert run(*NEW_ALBUM) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert_plain(shown.out)
    assert "left out: " in shown.out
    text = next(Path("new").rglob("bad_files.txt")).read_text()
    assert_plain(text)
    assert len(text.splitlines()) == 1
    assert "\\x1b[2J\\x07\\n|\\u202e[red]" in text
    shutil.rmtree("new")
    for path in folder.iterdir():
        path.write_bytes(b"no picture")
    assert_plain(refused(capsys, *NEW_ALBUM))


def test_error_lines(capsys):
    for arguments in (
        [f"--config={HOSTILE}"],
        ["--config=configs/quickstart.py", f"--config.method={HOSTILE}"],
        ["--mode=compare", f"--runs={HOSTILE.replace(',', '')}"],
        ["--config=configs/quickstart.py", f"--{HOSTILE}=1"],
    ):
        line = refused(capsys, *arguments)
        assert_plain(line)
        assert "\\x1b[2J" in line


def test_reports_of_others(capsys):
    """What a report and the name of its folder say, in every table that is made of them."""
    config = tiny.config(Path("data"), method="ce", evaluation__coverages=(100, 50))
    config.evaluation.target_risks = (0.001,)
    names = (HOSTILE.replace("/", ""), "two")
    for name in names:
        finished_run(config, Path("runs", name))
    path = Path("runs", names[0], "report.json")
    report = json.loads(path.read_text())
    report["config"]["method"] = report["config"]["loss"]["divergence"] = HOSTILE
    report["config"]["model"]["pretrained"] = HOSTILE
    for certificate in report["scores"]["softmax_response"]["certificates"]:
        certificate |= {"feasible": False, "reason": HOSTILE}
    path.write_text(json.dumps(report))
    show_report(read_report(path.parent), path.parent)
    shown = capsys.readouterr()
    assert_plain(shown.out)
    assert "=1+1\\x1b[2J" in shown.out
    assert_plain(refused(capsys, *COMPARE))  # they differ in model.pretrained
    assert run(*COMPARE, "--mixed") == 0
    shown = capsys.readouterr()
    assert (shown.err, Path(MARKER).exists()) == ("", False)
    assert_plain(shown.out)
    assert "=1+1\\x1b[2J" in shown.out
    text = Path("table/compare.md").read_text()
    assert_plain(text)
    assert "\\[red\\]\\<script\\>\\`\\*$" in text
    assert re.search(r"(?<!\\)(<|`|\]\()", text) is None
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    with Path("table/compare.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert_plain("".join(cells))
    assert not [cell for cell in cells if cell[:1] in "=+@" and cell]
    assert Path("table/compare.png").read_bytes().startswith(b"\x89PNG")
    json.loads(Path("table/compare.json").read_text(), parse_constant=pytest.fail)


def test_labels_of_plots_are_no_formulas():
    """Matplotlib would read `$` as mathematics, and raise where it is none."""
    config = tiny.config(Path("data"), method="ce", evaluation__coverages=(100, 50))
    finished_run(config, Path("runs/one"))
    path = Path("runs/one/report.json")
    path.write_text(path.read_text().replace('"method": "ce"', '"method": "$\\\\nonsense{$"'))
    record = compare.compare(["runs/one"], Path("table"))
    assert record["rows"][0]["label"] == "$\\nonsense{$, SR"


def test_names_in_weights():
    name = HOSTILE.encode("utf-8", "replace").decode()
    save_file({"bn1.bias": np.ones(2, np.float32), name: np.ones(1)}, "w.safetensors")
    params = {"backbone": {"bn1": {"bias": np.zeros(2, np.float32)}}}
    _, _, message = load_pretrained(Path("w.safetensors"), params, {})
    assert_plain(message)
