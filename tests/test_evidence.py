"""The statistics of the evidence: intervals, corrections, and what is kept of a run."""

import numpy as np
import pytest

from benchmarks import evidence
from sync_jax import metrics
from sync_jax.evaluation.predictions import Predictions


def kept_run(seed, *, gain=0.0):
    """Errors of 2,000 examples, and a confidence that knows of them, by `gain` more."""
    rng = np.random.default_rng(seed)
    wrong = (rng.random(2000) < 0.3).astype(float)
    ranks = np.argsort(np.argsort(rng.standard_normal(2000) - (1 + gain) * wrong))
    return evidence.Kept(wrong, {"softmax_response": ranks}, {"score": "softmax_response"})


def areas(gain, seeds=range(3)):
    return evidence._areas({x: kept_run(x, gain=gain) for x in seeds}, "softmax_response")


def test_a_difference_is_paired_and_knows_its_sign(monkeypatch):
    monkeypatch.setattr(evidence, "RESAMPLES", 300)
    same = evidence.difference(areas(0.0), areas(0.0))
    assert same == (0, 0, 0, 1)
    mean, low, high, p = evidence.difference(areas(1.0), areas(0.0))
    assert low < mean < high < 0
    assert p < 0.01
    # The pairs share seeds and examples: unpaired, the same gain would be lost in the noise.
    paired = evidence.difference(areas(0.1), areas(0.0))
    unpaired = evidence.difference(areas(0.1), dict(enumerate(areas(0.0, range(3, 6)).values())))
    assert paired[2] - paired[1] < 0.5 * (unpaired[2] - unpaired[1])
    reverse = evidence.difference(areas(0.0), areas(0.1))
    assert reverse[:3] == pytest.approx((-paired[0], -paired[2], -paired[1]))


def test_holm_by_hand():
    """0.01 x 4, then 0.02 x 3; 0.03 x 2 is no less than before; 0.9 stays below 1."""
    p = {"a": 0.03, "b": 0.01, "c": 0.9, "d": 0.02}
    expected = {"b": 0.04, "d": 0.06, "a": 0.06, "c": 0.9}
    assert evidence.holm(p) == pytest.approx(expected)


def test_what_is_kept_gives_the_same_numbers(tmp_path):
    rng = np.random.default_rng(0)
    outputs = {
        "logits": rng.standard_normal((501, 4)).astype(np.float32) * 30,  # many SR are 1
        "selection_logits": rng.standard_normal(501).astype(np.float32),
    }
    run = Predictions(outputs, rng.integers(0, 4, 501).astype(np.int32), np.arange(501))
    path = tmp_path / "run.npz"
    evidence.keep(path, run, {"score": "selection"})
    kept = evidence.Kept.read(path)
    np.testing.assert_array_equal(kept.wrong, run.wrong)
    for score in ("softmax_response", "selection"):
        expected = metrics.aurc(run.confidence(score), loss=run.wrong)
        assert metrics.aurc(kept.ranks[score], loss=kept.wrong) == pytest.approx(
            expected, rel=1e-12
        )


def test_cells_are_told_apart_by_what_is_trained():
    """No two cells of a stage share a file, and the trials of a row differ in their config."""
    for stage in evidence.STAGES:
        cells = evidence.cells(stage)
        assert len({cell.kept for cell in cells}) == len(cells)
    for row in evidence.ROWS:
        configs = [
            evidence.Cell("few-54", row, 0, trial).overrides()
            for trial in range(len(evidence.trials(row)))
        ]
        assert len({str(sorted(config.items())) for config in configs}) == len(configs) == 3
