"""Runs of version 0.1: `run_0_1.tar.gz` holds one, as its command line left it.

It was made from `tests.tiny`'s data and options with model.width=1, model.features=4,
checkpoint.keep=2 and checkpoint.keep_best=0: 18 steps, checkpoints after steps 12 and 18. Only its
picture and TensorBoard events were left out.
"""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report, show_report
from sync_jax.runtime import sharding
from tests import tiny
from tests.command_line import QUICKSTART, run

OPTIONS = {"model.width": 1, "model.features": 4, "checkpoint.keep": 2, "checkpoint.keep_best": 0}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder of the run, and the command line that it is of."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    with tarfile.open(Path(__file__).with_name("run_0_1.tar.gz")) as archive:
        archive.extractall(tmp_path, filter="data")
    values = tiny.OVERRIDES | OPTIONS | {"data.data_dir": tiny.prepare(tmp_path)}
    options = [f"--config.{path}={value}" for path, value in values.items()]
    return tmp_path / "run_0_1", [QUICKSTART, *options, f"--workdir={tmp_path / 'run_0_1'}"]


def test_it_is_evaluated_anew(old, capsys):
    folder, command = old
    before = read_report(folder)
    assert "label" not in before["scores"]["selection"]
    capsys.readouterr()
    show_report(before, folder)
    assert "An older report, with thresholds for float64 alone" in capsys.readouterr().out
    assert run(*command, "--mode=evaluate", "--config.evaluation.delta=0.1") == 0
    after = read_report(folder)
    assert after["config"]["evaluation"]["delta"] == 0.1
    assert after["scores"]["selection"]["label"] == "g"
    for name in ("aurc", "rank_based"):
        assert after["scores"]["selection"][name] == before["scores"]["selection"][name]
    # Its threshold was a calibration confidence, g; now it lies below its logit.
    now, then = (x["scores"]["selection"]["operating_point"] for x in (after, before))
    assert now["threshold"] <= np.log(then["threshold"] / (1 - then["threshold"]))
    assert now["n_accepted"] >= then["n_accepted"]


def test_another_experiment_is_refused_there(old, capsys):
    _, command = old
    assert run(*command, "--config.model.width=2") == 2
    assert "config.model.width is 1 there and 2 here" in capsys.readouterr().err


@pytest.mark.slow
def test_it_goes_on_from_its_checkpoint_and_is_compared_with_a_run_of_today(old, tmp_path, capsys):
    folder, command = old
    table = [f"--runs={folder},{tmp_path / 'new'}", f"--workdir={tmp_path / 'table'}"]
    assert run(*command[:-1], f"--workdir={tmp_path / 'new'}", "--config.seed=1") == 0
    assert run("--mode=compare", *table) == 0
    rows = json.loads((tmp_path / "table" / "compare.json").read_text())["rows"]
    assert {(row["label"], tuple(row["seeds"])) for row in rows} == {
        ("sync, SR", (0, 1)), ("sync, g", (0, 1)),
    }  # fmt: skip
    expected = Predictions.load(folder / "predictions_test.npz")
    for name in ("report.json", "predictions_calibration.npz", "predictions_test.npz"):
        (folder / name).unlink()
    (folder / "checkpoints" / "18").rename(folder / "checkpoints" / "17")
    capsys.readouterr()
    assert run(*command) == 0
    shown = capsys.readouterr().out
    assert "17.damaged: it holds the state after step 18\nresuming at step 12 of 18" in shown
    found = Predictions.load(folder / "predictions_test.npz")
    np.testing.assert_array_equal(found.index, expected.index)
    # Six more steps, compiled by another version: the same up to rounding.
    np.testing.assert_allclose(
        found.outputs["logits"], expected.outputs["logits"], rtol=1e-3, atol=1e-3
    )
