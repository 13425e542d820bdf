import json

import pytest

from sync_jax import sweep
from sync_jax.errors import NonFiniteError
from sync_jax.evaluation.report import read_report
from tests import tiny

VARY = ["method=ce,sync", "target_coverage=0.7,0.8", "seed=0,1"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("dataset"))


def test_every_combination_the_last_field_slowest(data_dir):
    runs = sweep.combinations(tiny.config(data_dir), VARY, name="tiny")
    assert [folder for folder, _ in runs] == [
        f"tiny-{method}-seed{seed}-target_coverage={coverage}"
        for seed in (0, 1)
        for coverage in (0.7, 0.8)
        for method in ("ce", "sync")
    ]
    values = [(run.method, run.target_coverage, run.seed) for _, run in runs]
    assert len(set(values)) == 8
    assert values[1] == ("sync", 0.7, 0)
    for _, run in runs:
        assert run.model.width == 4  # the rest is the config's


def test_values_take_the_type_of_their_field(data_dir):
    config = tiny.config(data_dir)
    ((_, run),) = sweep.combinations(
        config, ["target_coverage=1", "config.data.flip=False", "loss.divergence=mse"], name="tiny"
    )
    assert (run.target_coverage, run.data.flip, run.loss.divergence) == (1.0, False, "mse")
    assert type(run.target_coverage) is float
    assert config.data.flip is True  # and the given config stays


def test_a_sweep_trains_skips_what_is_finished_resumes_and_compares(
    data_dir, tmp_path, monkeypatch, capsys
):
    config = tiny.config(data_dir)
    vary = ["method=ce,self_adaptive", "seed=0,1"]
    trained = []
    train = sweep.train_and_evaluate

    def stopped_at_the_third(config, workdir):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(workdir.name)
        train(config, workdir)

    monkeypatch.setattr(sweep, "train_and_evaluate", stopped_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(config, vary, tmp_path / "runs", name="tiny")
    assert trained == ["tiny-ce-seed0", "tiny-self_adaptive-seed0"]
    assert "4 runs" in capsys.readouterr().out

    def recorded(config, workdir):
        trained.append(workdir.name)
        train(config, workdir)

    monkeypatch.setattr(sweep, "train_and_evaluate", recorded)
    assert sweep.sweep(config, vary, tmp_path / "runs", name="tiny")
    assert trained[2:] == ["tiny-ce-seed1", "tiny-self_adaptive-seed1"]
    shown = capsys.readouterr().out
    assert "2 finished, 2 to do" in shown
    assert "=== run 3 of 4: tiny-ce-seed1" in shown
    assert "min left" in shown
    record = json.loads((tmp_path / "runs" / "compare" / "compare.json").read_text())
    assert {row["label"]: row["seeds"] for row in record["rows"]} == {
        "ce, SR": [0, 1],
        "self_adaptive, SR": [0, 1],
        "self_adaptive, -abstention": [0, 1],
    }


def test_a_run_that_diverges_is_named_and_the_others_go_on(data_dir, tmp_path, monkeypatch, capsys):
    train = sweep.train_and_evaluate

    def diverging(config, workdir):
        if config.seed == 0:
            raise NonFiniteError("step 3: loss=nan")
        train(config, workdir)

    monkeypatch.setattr(sweep, "train_and_evaluate", diverging)
    config = tiny.config(data_dir, method="ce")
    assert not sweep.sweep(config, ["seed=0,1"], tmp_path, name="tiny")
    assert read_report(tmp_path / "tiny-ce-seed1") is not None
    shown = capsys.readouterr().out
    assert "tiny-ce-seed0 stopped at step 3: loss=nan" in shown
    assert "tiny-ce-seed0 diverged and is not in the table" in shown
