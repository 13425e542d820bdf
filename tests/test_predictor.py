import re
from pathlib import Path

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

import sync_jax
from sync_jax.errors import InputError
from sync_jax.runtime import sharding

DIGITS = load_digits()
TRAIN = np.arange(len(DIGITS.target)) % 4 > 0


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


@pytest.mark.slow
def test_readmes_example_of_features(capsys):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(from sklearn.*?)```", readme, flags=re.DOTALL)
    assert len(code.splitlines()) <= 10
    names = {}
    exec(code, names)
    classifier, found, right = (names[x] for x in ("classifier", "prediction", "right"))
    features = DIGITS.data[1400:]
    assert right.mean() > 0.9
    assert right[found.accepted].mean() > right.mean()
    assert 0.6 < found.accepted.mean() < 0.95  # of a target of 0.8
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(found.label, found.probabilities.argmax(axis=1))
    np.testing.assert_array_equal(found.accepted, found.confidence >= classifier.threshold)
    # Neither the number of examples nor the company that one has changes its answer.
    alone = classifier.predict(features[7:8])
    np.testing.assert_array_equal(alone.confidence, found.confidence[7:8])
    with pytest.raises(ValueError, match=r"shape \(3, 5\), expected \[n, 64\]"):
        classifier.predict(np.zeros((3, 5)))
    assert capsys.readouterr().out.count("\n") == 1  # the example's own line


@pytest.mark.slow
def test_images_with_labels_that_are_words_in_a_folder_that_goes_on(tmp_path, capsys):
    images = (DIGITS.images[TRAIN] * 15).astype(np.uint8)[:200]
    words = np.array(["zero", "one", "two", "three", "four", *"56789"])[DIGITS.target[TRAIN][:200]]
    options = {"method": "ce", "epochs": 3, "model__width": 4, "features": 8, "batch_size": 32}
    with pytest.raises(
        InputError, match=r"batch_size could be any of evaluation.batch_size, train.b"
    ):
        sync_jax.fit(images, words, **options)
    options["train__batch_size"] = options.pop("batch_size")
    first = sync_jax.fit(images, words, workdir=tmp_path, verbose=True, **options)
    assert first.network.trainer.config.model.features == 8
    assert list(first.classes) == sorted(set(words))
    answers = first.predict(images[:50])
    assert set(answers.label) <= set(words)
    assert "resuming" not in capsys.readouterr().out
    again = sync_jax.fit(images, words, workdir=tmp_path, verbose=True, **options)
    assert "resuming at step" in capsys.readouterr().out
    np.testing.assert_array_equal(again.predict(images[:50]).confidence, answers.confidence)


@pytest.mark.parametrize(("arguments", "error", "message"), [
    ({"images_or_features": np.zeros((4, 8, 8))}, ValueError, "must be uint8"),
    ({"images_or_features": np.full((4, 2), np.nan)}, ValueError, "not finite"),
    ({"labels": [0, 1, 0]}, ValueError, "labels must be 4 integers or strings"),
    ({"labels": [0.5, 1, 0, 1]}, ValueError, "labels must be 4 integers or strings"),
    ({"labels": [1, 1, 1, 1]}, ValueError, "1 class; a classifier needs two"),
    ({"calibration": 1.0}, ValueError, "calibration must lie in"),
    ({"method": "snyc"}, InputError, "did you mean 'sync'"),
    ({"model": "cnn"}, InputError, "takes images, and the data are feature vectors; use mlp"),
    ({"epoch": 3}, InputError, r"epoch is no field of the config \(did you mean 'epochs'"),
    ({"epochs": "many"}, InputError, "config.train.epochs='many' must be of type float"),
    ({}, InputError, "calibration_size=1: memory has 4 training examples of 2 classes"),
])  # fmt: skip
def test_bad_arguments(arguments, error, message):
    good = {"images_or_features": np.eye(4), "labels": [0, 1, 0, 1]}
    with pytest.raises(error, match=message):
        sync_jax.fit(**good | arguments)
