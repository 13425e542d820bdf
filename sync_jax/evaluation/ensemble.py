"""Deep ensembles (Lakshminarayanan et al., 2017): finished runs evaluated together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sync_jax.errors import InputError
from sync_jax.evaluation.comparison import differing_fields, load_runs
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.evaluation.report import show_report, write_report


def ensemble(
    patterns: Sequence[str], out: Path, *, mixed: bool = False, scores: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluates the mean of finished runs' class probabilities; nothing is trained.

    `out` becomes a finished run of the method "ensemble", with predictions and a report, which
    `compare` takes like any other. Its `members` names the runs; its training time is theirs
    together.

    Arguments as of `comparison.compare`; the patterns name two runs at least.

    Returns:
        The report.

    Raises:
        InputError: as `comparison.compare`; fewer than two runs; `out` holds another run.
    """
    runs = load_runs(patterns, scores)
    if len(runs) < 2:
        raise InputError(f"an ensemble takes two runs or more, and --runs names {len(runs)}")
    try:
        own = (out / "config.json").exists()
    except OSError as error:  # a name too long
        raise InputError(f"--workdir={out} cannot be written: {error.strerror}") from error
    if own or out.resolve() in {run.workdir.resolve() for run in runs}:
        raise InputError(f"--workdir={out} holds a run of its own; name another")
    differing = differing_fields(runs)
    if differing and not mixed:
        raise InputError(f"these runs differ: {'; '.join(differing)}; --mixed combines them too")
    test = combine([run.test for run in runs])
    paths = [run.workdir / "predictions_calibration.npz" for run in runs]
    calibration = combine([Predictions.load(path) for path in paths])
    config = ConfigDict(runs[0].report["config"])
    config.method = "ensemble"
    config.evaluation.scores = tuple(scores)
    record = evaluation_record(calibration, test, config, score="softmax_response")
    training = [run.report["training"] for run in runs]
    record["training"] = {
        name: None if None in (values := [entry[name] for entry in training]) else sum(values)
        for name in ("steps", "seconds")
    }
    record["members"] = [str(run.workdir) for run in runs]
    try:
        out.mkdir(parents=True, exist_ok=True)
        calibration.save(out / "predictions_calibration.npz")
        test.save(out / "predictions_test.npz")
        report = write_report(record, test, config, out)
    except OSError as error:
        raise InputError(f"--workdir={out} cannot be written: {error.strerror}") from error
    show_report(report, out)
    return report


def combine(members: Sequence[Predictions]) -> Predictions:
    """The members' mean probabilities, as logits, and the mean of their entropies.

    The logits `[n, classes]` are logarithms of the mean probabilities, so that the softmax response
    is that of the mean and the negative entropy minus the predictive entropy; expected_entropy
    `[n]` is for the mutual information.

    Raises:
        InputError: their examples or classes differ.
    """
    first = members[0]
    for other in members[1:]:
        shapes = {each.outputs["logits"].shape for each in (other, first)}
        if not other.same_examples(first) or len(shapes) > 1:
            raise InputError("the runs have other examples or classes than one another")
    # A mean probability is 0 only where all are; its logarithm is kept finite.
    mean = np.mean([member.probabilities for member in members], axis=0)
    logits = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    entropies = [-member.confidence("negative_entropy") for member in members]
    return Predictions(
        {"logits": logits, "expected_entropy": np.mean(entropies, axis=0)},
        first.labels,
        first.index,
    )
