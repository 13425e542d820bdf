import json

import jax
import numpy as np
import pytest

from sync_jax import sweep
from sync_jax.data.datasets.memory import MemoryDataset
from sync_jax.errors import InputError, NonFiniteError
from sync_jax.runtime import sharding
from tests import tiny

VARY = ["method=ce,sync", "target_coverage=0.7,0.8", "seed=0,1"]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tiny.prepare(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)


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


def test_options_of_either_network_of_auto_can_be_varied(data_dir):
    config = tiny.config(data_dir, model__name="auto")
    runs = sweep.combinations(config, ["model.stem=imagenet", "model.features=8,16"], name="x")
    assert [run.model.features for _, run in runs] == [8, 16]
    with pytest.raises(InputError, match=r"no field 'model.norm_first'"):
        sweep.combinations(config, ["model.norm_first=True"], name="x")


def test_values_take_the_type_of_their_field(data_dir):
    config = tiny.config(data_dir)
    ((_, run),) = sweep.combinations(
        config, ["target_coverage=1", "config.data.flip=False", "loss.divergence=mse"], name="tiny"
    )
    assert (run.target_coverage, run.data.flip, run.loss.divergence) == (1.0, False, "mse")
    assert type(run.target_coverage) is float
    assert config.data.flip is True  # and the given config stays


def test_a_sweep_skips_what_is_finished_names_what_diverges_and_compares(
    data_dir, tmp_path, monkeypatch, capsys
):
    config, vary = tiny.config(data_dir), ["method=ce,self_adaptive", "seed=0,1"]
    trained, train = [], sweep.train_and_evaluate
    errors = {2: KeyboardInterrupt, 4: NonFiniteError("step 3: loss=nan")}

    def fails_twice(config, workdir):
        trained.append(workdir.name)
        if len(trained) - 1 in errors:
            raise errors[len(trained) - 1]
        train(config, workdir)

    monkeypatch.setattr(sweep, "train_and_evaluate", fails_twice)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(config, vary, tmp_path, name="tiny")
    names = [f"tiny-{method}-seed{seed}" for seed in (0, 1) for method in ("ce", "self_adaptive")]
    assert trained == names[:3]
    assert "4 runs" in capsys.readouterr().out

    assert not sweep.sweep(config, vary, tmp_path, name="tiny")
    assert trained[3:] == names[2:]
    shown = capsys.readouterr().out
    assert "2 finished, 2 to do" in shown
    assert "=== run 3 of 4: tiny-ce-seed1" in shown
    assert "min left" in shown
    assert f"{names[3]} stopped at step 3: loss=nan" in shown
    assert f"{names[3]} diverged and is not in the table" in shown
    record = json.loads((tmp_path / "compare" / "compare.json").read_text())
    assert {row["label"]: row["seeds"] for row in record["rows"]} == {
        "ce, SR": [0, 1],
        "self_adaptive, SR": [0],
        "self_adaptive, -abstention": [0],
    }


def test_planted_label_errors_are_listed_by_networks_that_never_saw_them(tmp_path):
    """A tenth of the labels are moved on by one; of a random list a tenth would be right."""
    arrays, rng = tiny.contents(), np.random.default_rng(0)
    labels = arrays["train-labels-idx1-ubyte"].astype(np.int32)
    planted = rng.permutation(len(labels))[:23]
    noisy = labels.copy()
    noisy[planted] = (labels[planted] + 1) % 10
    names = tuple("abcdefghij")
    dataset = MemoryDataset(arrays["train-images-idx3-ubyte"][..., None], noisy, names)
    config = tiny.config(tmp_path, train__epochs=12.0, data__name="memory", method="ce")
    found = sweep.label_errors(config, tmp_path / "out", folds=2, dataset=dataset)
    assert np.isin(found.index, planted).mean() > 0.5
    assert np.isin(planted, found.index).mean() > 0.5
    assert (np.diff(found.quality) >= 0).all()
    lines = (tmp_path / "out" / "label_errors.csv").read_text().splitlines()
    assert lines[0] == "index,file,label,suggested,probability_of_label"
    first = int(found.index[0])
    suggested = names[found.suggested[0]]
    expected = f"{first},,{names[noisy[first]]},{suggested},{found.quality[0]:.6f}"
    assert lines[1:][0] == expected
    assert len(lines) == 1 + len(found.index)
    shown = (tmp_path / "out" / "label_errors.html").read_text()
    assert shown.count("<figure>") == len(found.index)
    assert f"suggested: {suggested}\nexample {first}</figcaption>" in shown
    for number in (1, 2):  # half of the examples, in turn
        saved = json.loads((tmp_path / "out" / f"fold-{number}" / "config.json").read_text())
        assert saved["data"]["fold"] == f"{number}/2"
