"""Every method on the real dataset: it learns, and its score tells right answers from wrong."""

import jax
import pytest

from configs.quickstart import get_config
from sync_jax import sharding, train
from sync_jax.data.parts import Part
from sync_jax.errors import InputError
from sync_jax.methods import METHODS
from sync_jax.report import read_report


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_short_training(method, tmp_path, monkeypatch):
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    config = get_config()
    config.method = method
    config.data.calibration_size = 2000
    config.train.epochs = 0.8
    config.optimizer.warmup_epochs = 0.2
    config.log.calibration_every_epochs = config.checkpoint.every_epochs = 0.8
    test = train.load_test

    def part_of_test(section, *, decode):
        part = test(section, decode=decode)
        return Part(part.images[:3000], part.labels[:3000], part.index[:3000])

    monkeypatch.setattr(train, "load_test", part_of_test)
    try:
        train.prepare(config)
    except InputError as error:
        pytest.skip(f"Fashion-MNIST cannot be had: {error}")
    train.train_and_evaluate(config, tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report["test"]["accuracy"] > 0.7  # chance is 0.1
    for score in {METHODS[method].score, "softmax_response"}:
        assert report["scores"][score]["failure_auroc"] > 0.8, score
