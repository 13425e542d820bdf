"""What users get wrong: one line, exit 2, nothing written and nothing lost.

Root may write everywhere, so what cannot be written is here below a regular file or in /proc, where
not even root makes a folder.
"""

import re
import runpy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sync_jax.config import to_json
from sync_jax.data import registry
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.evaluation.report import write_report
from tests import tiny
from tests.bad_input import command_line, data, runs
from tests.bad_input.case import COMPARE, DONE, EVALUATE, NEW_ALBUM
from tests.command_line import ROOT, run
from tests.data.pictures import pixels, write_pictures

BAD = command_line.CASES | runs.CASES | data.CASES


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
        registry.dataset(section).prepare(str)
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


@pytest.fixture
def limit() -> Iterator[None]:
    """A minute, after which a test that hangs fails."""

    def ring(number: int, frame: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, object]:
    """Every path below, with what files hold and when they were changed; no config's bytecode."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        if path.is_file()
        else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.usefixtures("limit")
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
    assert re.fullmatch(r"([\w.=]+: .+\n)*", output.out)
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
    assert shapes == [(24, 12, 12, 3)]  # test is a part of them, held out when they are read


def test_there_are_more_than_sixty_different_ones():
    assert sum(len(x.CASES) for x in (command_line, data, runs)) == len(BAD)
    assert len({(*bad.arguments, bad.message, bad.spoil) for bad in BAD.values()}) == len(BAD) > 60
