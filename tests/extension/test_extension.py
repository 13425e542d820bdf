"""Extension without a fork: what a user's own package and TFDS bring, from the command line."""

import json

import jax
import numpy as np
import pytest

from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report
from sync_jax.runtime import sharding
from tests import tiny
from tests.command_line import QUICKSTART, run
from tests.data.test_tfds import TinyPictures, written

MINE = "tests.extension.mine"
METHOD = (f"--config.method={MINE}:METHOD", "--config.loss.ceiling=3", "--config.loss.strength=0.5")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def options(data_dir, **changes):
    values = tiny.OVERRIDES | {"data.data_dir": data_dir} | changes
    return [QUICKSTART, *(f"--config.{path}={value}" for path, value in values.items())]


@pytest.mark.slow
def test_a_method_and_its_score_train_report_and_compare(data_dir, tmp_path, capsys):
    command = [*options(data_dir), *METHOD, f"--workdir={tmp_path / 'run'}"]
    assert run(*command) == 0
    report = read_report(tmp_path / "run")
    assert report["config"]["loss"]["ceiling"] == 3.0
    assert report["config"]["loss"]["strength"] == 0.5
    assert report["method_score"] == f"{MINE}:SCORE"
    own = report["scores"][f"{MINE}:SCORE"]
    assert own["label"] == "range"
    assert own["parameters"] == {"power": 1}  # the same ranking as power 2, and the first
    assert own["certificates"]
    assert "excess" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "AURC x1000 of range minus that of SR" in capsys.readouterr().out
    logits = Predictions.load(tmp_path / "run" / "predictions_test.npz").outputs["logits"]
    accepted = np.ptp(logits, axis=1) >= own["operating_point"]["threshold"]
    assert accepted.sum() == own["operating_point"]["n_accepted"]
    # The folder of a run is data: what it names is imported only when the user says so.
    compare = ["--mode=compare", f"--runs={tmp_path / 'run'}", f"--workdir={tmp_path / 'table'}"]
    assert run(*compare) == 2
    assert f"uses the score {MINE}:SCORE, which is not built in" in capsys.readouterr().err
    assert run(*compare, f"--scores={MINE}:SCORE") == 0
    rows = json.loads((tmp_path / "table" / "compare.json").read_text())["rows"]
    assert {row["label"] for row in rows} == {f"{MINE}:METHOD, SR", f"{MINE}:METHOD, range"}


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.loss.strength=2", "config.loss.strength=2.0 must be a finite number in [0, 1]"),
    ("--config.loss.celing=2", "config.loss.celing is no field (did you mean 'loss.ceiling'?)"),
])  # fmt: skip
def test_its_hyperparameters_are_checked(argument, message, data_dir, tmp_path, capsys):
    assert run(*options(data_dir), *METHOD, argument, f"--workdir={tmp_path / 'run'}") == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_backbone_and_a_score_of_any_method(data_dir, tmp_path):
    arguments = [x for x in options(data_dir, method="ce") if ".model." not in x]
    arguments += [f"--config.model.name={MINE}:BACKBONE", "--config.model.units=6"]
    arguments += [f"--config.evaluation.scores={MINE}:SCORE", f"--workdir={tmp_path}"]
    assert run(*arguments) == 0
    report = read_report(tmp_path)
    assert report["config"]["model"]["units"] == 6
    assert report["scores"][f"{MINE}:SCORE"]["label"] == "range"
    assert "certificates" not in report["scores"][f"{MINE}:SCORE"]


@pytest.mark.slow
def test_a_dataset_of_tfds(tmp_path, capsys):
    written(TinyPictures, tmp_path / "data")
    small = {
        "data.name": "tfds:tiny_pictures", "data.image_size": 8, "data.calibration_size": 3,
        "train.batch_size": 4, "evaluation.batch_size": 4, "method": "ce",
    }  # fmt: skip
    assert run(*options(tmp_path / "data", **small), f"--workdir={tmp_path / 'run'}") == 0
    assert read_report(tmp_path / "run")["test"]["n"] == TinyPictures.SPLITS["test"]
    assert "ce on tfds:tiny_pictures: 12 training and 3 calibration" in capsys.readouterr().out
