"""The evaluation record: metrics and thresholds by both protocols, for every score."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from sync_jax import guarantees, metrics
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions, Ranked
from sync_jax.options import find
from sync_jax.scores import SCORES, Score

# A class has few calibration examples and a share of delta: fifty candidates would divide it so far
# that no class can be certified.
CLASS_CANDIDATES = 5


def known_scores(config: ConfigDict, *own: str) -> dict[str, Score]:
    """The built-in scores, those in `own` and in `config.evaluation.scores`, by name."""
    names = dict.fromkeys((*SCORES, *own, *config.evaluation.scores))
    return {name: find(name, SCORES, Score, "config.evaluation.scores") for name in names}


def summary(predictions: Predictions) -> dict[str, Any]:
    """Metrics of the classifier as a whole, apart from any confidence score."""
    labels = predictions.labels
    if "logits" not in predictions.outputs:  # a user's confidences
        return {"n": len(labels), "accuracy": float(1 - predictions.wrong.mean())}
    probabilities = predictions.probabilities
    record: dict[str, Any] = {
        "n": len(labels),
        "accuracy": metrics.accuracy(probabilities, labels),
        "negative_log_likelihood": metrics.negative_log_likelihood(
            probabilities, labels, floor=np.finfo(np.float64).tiny
        ),
        "brier": metrics.brier(probabilities, labels),
    }
    for binning in ("width", "mass"):
        error = metrics.expected_calibration_error(probabilities, labels, binning=binning)
        record[f"ece_{error.bins}_bins_of_equal_{binning}"] = error.value
    if predictions.mean_selection is not None:
        record["mean_selection"] = predictions.mean_selection
    return record


@metrics.unchecked()  # the errors are those of the predictions, however they are ranked
def calibration_metrics(predictions: Predictions) -> dict[str, float]:
    """The metrics of the calibration split that are logged while training."""
    values = summary(predictions)
    values["aurc"] = metrics.aurc(
        predictions.confidence("softmax_response"), loss=predictions.wrong
    )
    names = ("accuracy", "negative_log_likelihood", "aurc", "mean_selection")
    return {name: values[name] for name in names if name in values}


@metrics.unchecked()
def evaluation_record(
    calibration: Predictions,
    test: Predictions,
    config: ConfigDict,
    *,
    score: str,
    scores: Mapping[str, Score] | None = None,
) -> dict[str, Any]:
    """Both protocols for every score that the outputs allow; its fields are in docs/report.md.

    Thresholds and the scores' parameters come from `calibration`; `score` is the method's own.
    `scores` are by default those of `known_scores`. Which certificate is recommended does not
    depend on the data (docs/report.md).
    """
    chosen = known_scores(config, score) if scores is None else scores
    known = {k: s for k, s in chosen.items() if s.applies(test.outputs)}
    reference = "softmax_response" if "softmax_response" in known else score
    shapes = [
        {name: output.shape[1:] for name, output in part.outputs.items()}
        for part in (calibration, test)
    ]
    differ = any(shapes[0].get(name) != shape for name, shape in shapes[1].items())
    if score not in known or differ:
        found = " and ".join(
            f"{', '.join(s)} of {s['logits'][0] if 'logits' in s else 0} classes" for s in shapes
        )
        raise InputError(
            f"the predictions do not go with the score {score}: calibration and test have {found}"
        )
    record: dict[str, Any] = {
        # First in the file, and filled in below.
        "recommended": {"score": "log_odds" if reference == "softmax_response" else reference},
        "calibration": summary(calibration),
        "test": summary(test),
        "method_score": score,
        "scores": {n: ranking_record(calibration, test, config, score=s) for n, s in known.items()},
    }
    ranked = {}
    for name in {reference, score}:
        entry, own = record["scores"][name], known[name]
        parameters = entry["parameters"]
        ranked[name] = test.ranked(own, **parameters)
        entry["bootstrap_95"] = bootstrap_intervals(ranked[name])
        entry["thresholds_on"] = (own.unsaturated or own).label
        held_out, decided = (part.decided(own, **parameters) for part in (calibration, test))
        entry |= threshold_record(held_out, decided, config)
    best = record["scores"][reference]["certificates"][0]
    held_out = calibration.decided(known[reference]).independent()
    plan = None if best["feasible"] else enough(held_out, config)
    record["recommended"] |= best | {"calibration_plan": plan}
    if calibration.groups is not None:  # each certificate's n_calibration is their number
        record["calibration"]["groups"] = len(np.unique(calibration.groups))
    if score != reference:
        difference = metrics.paired_bootstrap_interval(
            metrics.aurc,
            confidence_a=ranked[score].confidence,
            loss_a=ranked[score].wrong,
            confidence_b=ranked[reference].confidence,
            loss_b=ranked[reference].wrong,
        )
        record["aurc_minus_softmax_response"] = dataclasses.asdict(difference)
    return record


def ranking_record(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: Score
) -> dict[str, Any]:
    """The part of the record that every score has; arguments as of `evaluation_record`."""
    parameters = fit_parameters(calibration, score=score)
    confidence, wrong = test.ranked(score, **parameters)[:2]
    return {
        "label": score.label,
        "parameters": parameters,
        "aurc": {
            convention: metrics.aurc(confidence, loss=wrong, convention=convention)
            for convention in ("mean", "fd_shifts", "torch_uncertainty")
        },
        "excess_aurc": {
            convention: metrics.excess_aurc(confidence, loss=wrong, convention=convention)
            for convention in ("mean", "fd_shifts")
        },
        "normalised_aurc": metrics.normalised_aurc(confidence, loss=wrong),
        "augrc": metrics.augrc(confidence, loss=wrong),
        "excess_augrc": metrics.excess_augrc(confidence, loss=wrong),
        "failure_auroc": metrics.failure_auroc(confidence, correct=1 - wrong),
        "fpr_at_95_tpr": metrics.fpr_at_tpr(confidence, correct=1 - wrong),
        "rank_based": [
            {
                "coverage": coverage,
                "selective_risk": metrics.selective_risk(confidence, loss=wrong, coverage=coverage),
            }
            for coverage in _coverages(config)
        ],
        "coverage_at_risk": [
            {"risk": risk, "coverage": metrics.coverage_at_risk(confidence, loss=wrong, risk=risk)}
            for risk in config.evaluation.target_risks
        ],
    }


def fit_parameters(calibration: Predictions, *, score: Score) -> dict[str, Any]:
    """The score's arguments with the least AURC on the calibration split, the first of several."""

    def area(parameters: Mapping[str, Any]) -> float:
        return metrics.aurc(calibration.confidence(score, **parameters), loss=calibration.wrong)

    best = min(score.choices, key=area) if len(score.choices) > 1 else score.choices[0]
    return dict(best)


def bootstrap_intervals(test: Ranked) -> dict[str, list[float]]:
    """95 % intervals. They cost time: the softmax response and the method's own score have them."""
    of: dict[str, tuple[Any, dict[str, Any]]] = {
        "aurc": (metrics.aurc, {"loss": test.wrong}),
        "augrc": (metrics.augrc, {"loss": test.wrong}),
        "failure_auroc": (metrics.failure_auroc, {"correct": 1 - test.wrong}),
    }
    intervals = {}
    for name, (metric, values) in of.items():
        interval = metrics.bootstrap_interval(metric, test.confidence, **values)
        intervals[name] = [interval.lower, interval.upper]
    return intervals


def threshold_record(calibration: Ranked, test: Ranked, config: ConfigDict) -> dict[str, Any]:
    """Thresholds of the softmax response and the method's own score, as `Predictions.decided`.

    Other scores have none: several saturate in float32, and of a dozen none could be chosen by its
    certificates. Where calibration examples have groups, certificates and plans are by one of each.
    """
    alone = calibration.independent()

    def calibrated(coverage: float) -> dict[str, Any]:
        threshold = metrics.threshold_for_coverage(calibration.confidence, coverage=coverage)
        return {"target_coverage": coverage, **_on_test(test.confidence, test.wrong, threshold)}

    return {
        "deployed": [calibrated(coverage) for coverage in _coverages(config)],
        "operating_point": calibrated(config.target_coverage),
        "certificates": certificates(alone, test, config),
        "class_certificates": class_certificates(alone, test, config),
        "calibration_plans": calibration_plans(alone, config),
    }


def _coverages(config: ConfigDict) -> list[float]:
    return [percent / 100 for percent in config.evaluation.coverages]


def certificates(calibration: Ranked, test: Ranked, config: ConfigDict) -> list[dict[str, Any]]:
    """A certificate of every method at every target risk, and what its threshold gives on test.

    Each holds by itself: the best of several has not the confidence of one. The first is that of
    the hybrid, which is feasible most often, at the first target.
    """
    split: dict[str, Any] = {"confidence": calibration.confidence, "correct": 1 - calibration.wrong}
    found = []
    for risk in config.evaluation.target_risks:
        asked = {"target_risk": risk, "delta": config.evaluation.delta}
        found.append(guarantees.sgr_fixed_sequence(**split, **asked))
        found.append(guarantees.sgr(**split, **asked))
        for procedure in ("bonferroni", "holm", "fixed_sequence"):
            found.append(guarantees.learn_then_test(**split, **asked, procedure=procedure))
        found.append(guarantees.conformal_risk_control(**split, alpha=risk))
    return [
        {**each.to_dict(), "test": _on_test(test.confidence, test.wrong, each.threshold)}
        for each in found
    ]


def class_certificates(
    calibration: Ranked, test: Ranked, config: ConfigDict
) -> list[dict[str, Any]]:
    """Certificates by predicted class, all together at delta, by learn-then-test (Bonferroni)."""
    rows: list[dict[str, Any]] = []
    for risk in config.evaluation.target_risks if test.num_classes else ():
        found = guarantees.group_certificates(
            guarantees.learn_then_test,
            calibration.confidence,
            correct=1 - calibration.wrong,
            groups=calibration.predicted,
            target_risk=risk,
            delta=config.evaluation.delta,
            names=range(test.num_classes),
            candidates=CLASS_CANDIDATES,
        )
        for name, each in found.items():
            row: dict[str, Any] = {"predicted_class": name, **each.to_dict()}
            member = test.predicted == name
            if member.any():
                row["test"] = _on_test(test.confidence[member], test.wrong[member], each.threshold)
            rows.append(row)
    return rows


def calibration_plans(calibration: Ranked, config: ConfigDict) -> list[dict[str, Any]]:
    """Calibration examples that the target coverage needs at each target risk."""
    risks = config.evaluation.target_risks
    return [_plan(calibration, config, risk, config.target_coverage) for risk in risks]


def enough(calibration: Ranked, config: ConfigDict) -> dict[str, Any] | None:
    """The calibration examples that the first target risk needs at a smaller coverage.

    It is the largest coverage with at most half the target risk on the calibration split; None if
    there is no such coverage, or no number is enough.
    """
    risk = config.evaluation.target_risks[0]
    confidence, wrong = calibration[:2]
    coverage = metrics.coverage_at_risk(confidence, loss=wrong, risk=risk / 2)
    plan = _plan(calibration, config, risk, coverage) if coverage else {"n_calibration": None}
    return None if plan["n_calibration"] is None else plan


def _plan(calibration: Ranked, config: ConfigDict, risk: float, coverage: float) -> dict[str, Any]:
    """Calibration examples for the hybrid's fixed sequence to pass the threshold of a coverage.

    There the expected risk is what is seen on the calibration split.
    """
    confidence, wrong = calibration[:2]
    threshold = metrics.threshold_for_coverage(confidence, coverage=coverage)
    seen = {
        "coverage": coverage,
        "expected_risk": metrics.deployed(confidence, loss=wrong, threshold=threshold).risk,
    }
    row: dict[str, Any] = {"target_risk": risk, **seen, "n_calibration": None, "power": None}
    # The expected risk may not, or hardly, be below the target.
    with contextlib.suppress(ValueError):
        asked = {"target_risk": risk, "delta": config.evaluation.delta, **seen}
        plan = guarantees.calibration_size(**asked, tests=2)
        row |= {"n_calibration": plan.n_calibration, "power": plan.power}
    return row


def _on_test(confidence: np.ndarray, wrong: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """Coverage, risk and counts of accepting confidence >= threshold; None accepts nothing."""
    result = metrics.deployed(confidence, loss=wrong, threshold=threshold)
    return {
        "threshold": result.threshold,
        "coverage": result.coverage,
        "selective_risk": result.risk,
        "n_accepted": result.n_accepted,
        "n_errors": result.n_errors,
        "n_rejected": result.n - result.n_accepted,
        "n_rejected_errors": int(wrong.sum()) - result.n_errors,
    }
