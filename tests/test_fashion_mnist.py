"""On the real dataset a method learns, and its score tells right answers from wrong."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from configs.quickstart import get_config
from sync_jax.data import registry
from sync_jax.errors import InputError
from sync_jax.evaluation.report import read_report
from sync_jax.methods import METHODS

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_short_training(tmp_path):
    """By the command line, on one device and with the usual optimisations.

    One that abstains by a class of its own. `.ci/run` trains sync, with SelectiveNet's heads, and
    `tests/test_train.py` every method on a tiny dataset.
    """
    method = "deep_gamblers"
    try:
        registry.dataset(get_config().data).prepare(print)
    except InputError as error:
        pytest.skip(f"Fashion-MNIST cannot be had: {error}")
    changes = {
        "method": method,
        "train.epochs": 1.2,
        "optimizer.warmup_epochs": 0.2,
    }
    subprocess.run(
        [sys.executable, "-m", "sync_jax.main", "--config=configs/quickstart.py"]
        + [f"--workdir={tmp_path}"]
        + [f"--config.{field}={value}" for field, value in changes.items()],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
        check=True,
        capture_output=True,
    )
    report = read_report(tmp_path)
    assert report["test"]["accuracy"] > 0.7  # chance is 0.1
    for score in {METHODS[method].score, "softmax_response"}:
        assert report["scores"][score]["failure_auroc"] > 0.8, score
