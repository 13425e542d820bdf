import json

import numpy as np
import pytest

from sync_jax.errors import InputError
from sync_jax.evaluation.comparison import combine, compare, ensemble
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report
from tests.evaluation.test_comparison import make_run, predictions


def of(p, labels=(0,)):
    """Predictions with given probabilities [n, classes]."""
    p = np.asarray(p, np.float64)
    return Predictions({"logits": np.log(p)}, np.asarray(labels), np.arange(len(p)))


def test_probabilities_and_entropies_are_averaged_by_hand():
    combined = combine([of([[3 / 4, 1 / 4]]), of([[1 / 4, 3 / 4]])])
    np.testing.assert_allclose(combined.probabilities, [[1 / 2, 1 / 2]])
    entropy = 2 * np.log(2) - 3 / 4 * np.log(3)
    np.testing.assert_allclose(combined.outputs["expected_entropy"], [entropy])
    information = -combined.confidence("mutual_information")
    np.testing.assert_allclose(information, [np.log(2) - entropy])


def test_members_order_does_not_matter_and_disagreement_is_information():
    members = [predictions(seed, 2.0) for seed in range(3)]
    first, second = combine(members), combine(members[::-1])
    for name, output in first.outputs.items():
        np.testing.assert_allclose(second.outputs[name], output, rtol=1e-12)
    assert (first.confidence("mutual_information") < 0).all()
    equal = combine(members[:1] * 3)
    np.testing.assert_allclose(equal.probabilities, members[0].probabilities, rtol=1e-12)
    np.testing.assert_allclose(equal.confidence("mutual_information"), 0, atol=1e-12)


def test_certain_members_that_contradict_each_other_stay_finite():
    certain = [
        Predictions({"logits": np.array([[x, -x, 0.0]])}, np.array([0]), np.array([0]))
        for x in (1e4, -1e4)
    ]
    combined = combine(certain)
    assert np.isfinite(combined.outputs["logits"]).all()
    np.testing.assert_allclose(combined.probabilities, [[0.5, 0.5, 0.0]], atol=1e-300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        run = make_run(root / f"ce-{seed}", seed=seed, seconds=10.0 + seed)
        predictions(seed + 50, 2.0).save(run / "predictions_calibration.npz")
    make_run(root / "other-width", seed=4, model__width=7)
    return root


def test_an_ensemble_is_a_run_that_can_be_compared(folder, tmp_path):
    out = tmp_path / "ensemble"
    report = ensemble([f"{folder}/ce-*"], out)
    assert read_report(out) == report
    assert report["config"]["method"] == "ensemble"
    assert report["training"]["seconds"] == 33.0
    assert report["members"] == [f"{folder}/ce-{seed}" for seed in range(3)]
    of_probabilities = {"softmax_response", "log_odds", "margin", "negative_entropy"}
    assert set(report["scores"]) == of_probabilities | {"mutual_information"}
    single = [json.loads((folder / f"ce-{i}/report.json").read_text()) for i in range(3)]
    assert report["test"]["accuracy"] > max(r["test"]["accuracy"] for r in single)
    again = Predictions.load(out / "predictions_test.npz")
    assert again.outputs["logits"].shape == (150, 4)
    record = compare([f"{folder}/ce-*", str(out)], tmp_path / "compared")
    assert [row["label"] for row in record["rows"]] == ["ensemble, SR", "ce, SR"]


def test_what_cannot_be_combined_is_named(folder, tmp_path):
    with pytest.raises(InputError, match="takes two runs or more, and --runs names 1"):
        ensemble([f"{folder}/ce-0"], tmp_path / "out")
    with pytest.raises(InputError, match=r"these runs differ: config\.model\.width is"):
        ensemble([f"{folder}/ce-0", f"{folder}/other-width"], tmp_path / "out")
    with pytest.raises(InputError, match="holds a run of its own"):
        ensemble([f"{folder}/ce-*"], folder / "ce-1")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        ensemble([f"{folder}/ce-*"], tmp_path / "file")
    with pytest.raises(InputError, match="other examples or classes"):
        combine([of([[1 / 2, 1 / 2]]), of([[1 / 2, 1 / 2]], labels=(1,))])
