"""Predictions on a split, thresholds from the calibration split, and the evaluation record."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from sync_jax import guarantees, metrics
from sync_jax.data.splits import Part
from sync_jax.errors import InputError
from sync_jax.runtime.files import write_atomically
from sync_jax.scores import SCORES, available

# A class has few calibration examples and a share of delta: fifty candidates would divide it so far
# that no class can be certified.
CLASS_CANDIDATES = 5

PNORMS = range(1, 11)  # orders that max_logit_pnorm chooses from, beside its fallback


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A network's outputs on a split, a row per example.

    Attributes:
        outputs: by name: logits `[n, classes]`, and with the heads selection_logits `[n]`,
            auxiliary_logits `[n, classes]`, abstention_logits `[n]`, or with
            dropout samples expected_entropy `[n]`; float32.
        labels: `[n]` int32.
        index: `[n]` int64, positions in the official split.
    """

    outputs: dict[str, np.ndarray]
    labels: np.ndarray
    index: np.ndarray

    @property
    def predicted(self) -> np.ndarray:
        """`[n]` integers, the most probable class."""
        return np.argmax(self.outputs["logits"], axis=-1)

    @property
    def wrong(self) -> np.ndarray:
        """`[n]` float64, 1 where the prediction is not the label."""
        return (self.predicted != self.labels).astype(np.float64)

    @property
    def probabilities(self) -> np.ndarray:
        """`[n, classes]` float64: in float32 a confident mistake would have probability 0."""
        logits = self.outputs["logits"].astype(np.float64)
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def confidence(self, score: str, **parameters: Any) -> np.ndarray:
        """`[n]` float64, by a name in `scores.SCORES` and the score's own arguments.

        Float64 keeps confident examples apart.
        """
        outputs = {name: output.astype(np.float64) for name, output in self.outputs.items()}
        return SCORES[score](outputs, **parameters)

    @property
    def mean_selection(self) -> float | None:
        """Mean of the selection function g; None without a selection head."""
        if "selection_logits" not in self.outputs:
            return None
        return float(self.confidence("selection").mean())

    def save(self, path: Path) -> None:
        """Writes an .npz file, complete or not at all."""
        outputs = {f"outputs/{name}": output for name, output in self.outputs.items()}
        arrays: dict[str, Any] = {"labels": self.labels, "index": self.index, **outputs}
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """Reads what `save` wrote.

        Raises:
            InputError: there is no such file, or it is damaged.
        """
        try:
            contents = io.BytesIO(path.read_bytes())  # np.load would leave a damaged file open
            with np.load(contents, allow_pickle=False) as file:
                if any(member.compress_size < member.file_size for member in file.zip.infolist()):
                    raise ValueError("it is compressed")  # it could expand without end
                arrays = dict(file)
            outputs = {
                name.removeprefix("outputs/"): array
                for name, array in arrays.items()
                if name.startswith("outputs/")
            }
            if "logits" not in outputs or len({len(array) for array in arrays.values()}) > 1:
                raise ValueError("arrays are missing or of different lengths")
            _check(outputs, arrays["labels"], arrays["index"])
            return cls(outputs, arrays["labels"], arrays["index"])
        except FileNotFoundError:
            raise InputError(f"{path} is missing: train the run to its end first") from None
        except Exception as error:  # zipfile and NumPy raise almost anything on a damaged file
            raise InputError(f"{path} is damaged: {error}") from error


def _check(outputs: dict[str, np.ndarray], labels: np.ndarray, index: np.ndarray) -> None:
    """Raises ValueError where these can be no `Predictions`."""
    classes = outputs["logits"].shape[-1]
    for name, output in outputs.items():
        shape = (len(labels), classes) if name in ("logits", "auxiliary_logits") else (len(labels),)
        if output.dtype.kind != "f" or output.shape != shape or not output.size:
            raise ValueError(f"{name} is {output.dtype} {output.shape}, no output of a network")
        if not np.all(np.isfinite(output)):
            raise ValueError(f"{name} holds a number that is not finite")
    for name, array in {"labels": labels, "index": index}.items():
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, expected integers [n]")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels are {labels.min()} to {labels.max()}, of {classes} classes")


def predict(
    part: Part,
    outputs_of: Callable[[np.ndarray], dict[str, Array]],
    batch_size: int,
    *,
    share: slice | None = None,
) -> Predictions:
    """Outputs for every example exactly once, whatever the batch size.

    Args:
        part: n examples.
        outputs_of: images `[batch_size, height, width, channels]` uint8 to a dict of arrays
            `[batch_size, ...]`. It is always given whole batches: the last is filled up with zeros,
            whose outputs are dropped.
        batch_size: examples at a time.
        share: which rows of each batch `outputs_of` is given, by each of several processes; it
            returns the outputs of all.

    Raises:
        InputError: no examples.
    """
    size = len(part.labels)
    if size == 0:
        raise InputError("there are no examples to predict")
    rows: list[dict[str, np.ndarray]] = []
    pending: dict[str, Array] | None = None
    first, last, _ = (share or slice(None)).indices(batch_size)
    for start in range(0, size, batch_size):
        images = part.images[min(start + first, size) : min(start + last, size)]
        padding = last - first - len(images)
        if padding:
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        following = outputs_of(images)
        if pending is not None:  # fetched while the device works on the next
            rows.append(jax.device_get(pending))
        pending = following
    rows.append(jax.device_get(pending))
    outputs = {
        name: np.concatenate([row[name] for row in rows])[:size].astype(np.float32)
        for name in rows[0]
    }
    return Predictions(outputs, part.labels, part.index)


def summary(predictions: Predictions) -> dict[str, Any]:
    """What concerns the classifier as a whole, apart from any confidence score."""
    probabilities, labels = predictions.probabilities, predictions.labels
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


def evaluation_record(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: str
) -> dict[str, Any]:
    """Both protocols for every score that the outputs allow; see `report` for the schema.

    Args:
        calibration: where thresholds come from.
        test: where they are judged.
        config: target_coverage and the `evaluation` section: coverages, target_risks, delta.
        score: the method's own score.

    Returns:
        Plain dicts, lists and numbers; undefined values are NaN.

    Raises:
        InputError: those of calibration are others, or the score's are missing.
    """
    names = available(test.outputs)
    shapes = [
        {name: output.shape[1:] for name, output in part.outputs.items()}
        for part in (calibration, test)
    ]
    differ = any(shapes[0].get(name) != shape for name, shape in shapes[1].items())
    if score not in names or differ:
        found = " and ".join(f"{', '.join(s)} of {s['logits'][0]} classes" for s in shapes)
        raise InputError(
            f"the predictions do not go with the score {score}: calibration and test have {found}"
        )
    record: dict[str, Any] = {
        "calibration": summary(calibration),
        "test": summary(test),
        "method_score": score,
        "scores": {name: ranking_record(calibration, test, config, score=name) for name in names},
    }
    for name in {"softmax_response", score}:
        record["scores"][name] |= guarantee_record(calibration, test, config, score=name)
    if score != "softmax_response":
        difference = metrics.paired_bootstrap_interval(
            metrics.aurc,
            test.confidence(score),
            test.wrong,
            test.confidence("softmax_response"),
            test.wrong,
        )
        record["aurc_minus_softmax_response"] = dataclasses.asdict(difference)
    return record


def ranking_record(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: str
) -> dict[str, Any]:
    """What is recorded of every score.

    Args:
        calibration: where thresholds and the score's parameters come from.
        test: where they are judged.
        config: as in `evaluation_record`.
        score: a name in `scores.SCORES`.
    """
    parameters = fit_parameters(calibration, score=score)
    held_out = calibration.confidence(score, **parameters)
    confidence, wrong = test.confidence(score, **parameters), test.wrong

    def rank_based(coverage: float) -> dict[str, float]:
        risk = metrics.selective_risk(confidence, wrong, coverage=coverage)
        return {"coverage": coverage, "selective_risk": risk}

    def calibrated(coverage: float) -> dict[str, Any]:
        threshold = metrics.threshold_for_coverage(held_out, coverage=coverage)
        return {"target_coverage": coverage, **_on_test(confidence, wrong, threshold)}

    coverages = [percent / 100 for percent in config.evaluation.coverages]
    return {
        "parameters": parameters,
        "aurc": {
            convention: metrics.aurc(confidence, wrong, convention=convention)
            for convention in ("mean", "fd_shifts", "torch_uncertainty")
        },
        "excess_aurc": {
            convention: metrics.excess_aurc(confidence, wrong, convention=convention)
            for convention in ("mean", "fd_shifts")
        },
        "normalised_aurc": metrics.normalised_aurc(confidence, wrong),
        "augrc": metrics.augrc(confidence, wrong),
        "excess_augrc": metrics.excess_augrc(confidence, wrong),
        "failure_auroc": metrics.failure_auroc(confidence, 1 - wrong),
        "fpr_at_95_tpr": metrics.fpr_at_tpr(confidence, 1 - wrong),
        "rank_based": [rank_based(coverage) for coverage in coverages],
        "coverage_at_risk": [
            {"risk": risk, "coverage": metrics.coverage_at_risk(confidence, wrong, risk=risk)}
            for risk in config.evaluation.target_risks
        ],
        "deployed": [calibrated(coverage) for coverage in coverages],
        "operating_point": calibrated(config.target_coverage),
    }


def fit_parameters(calibration: Predictions, *, score: str) -> dict[str, Any]:
    """The arguments that a score takes, chosen on the calibration split; {} for most.

    The order p of max_logit_pnorm is the one with the smallest AURC, the smallest of several, and
    None, the softmax response, where no order is better than that.
    """
    if score != "max_logit_pnorm":
        return {}

    def area(p: int | None) -> float:
        return metrics.aurc(calibration.confidence(score, p=p), calibration.wrong)

    return {"p": min((None, *PNORMS), key=area)}  # min keeps the first among equals


def guarantee_record(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: str
) -> dict[str, Any]:
    """What is recorded beside that of the softmax response and of the method's own score.

    Intervals and certificates cost time, and of a dozen scores none could be chosen by them.
    """
    confidence, wrong = test.confidence(score), test.wrong

    def interval(metric: Callable[..., float], values: np.ndarray) -> list[float]:
        result = metrics.bootstrap_interval(metric, confidence, values)
        return [result.lower, result.upper]

    return {
        "bootstrap_95": {
            "aurc": interval(metrics.aurc, wrong),
            "augrc": interval(metrics.augrc, wrong),
            "failure_auroc": interval(metrics.failure_auroc, 1 - wrong),
        },
        "certificates": certificates(calibration, test, config, score=score),
        "class_certificates": class_certificates(calibration, test, config, score=score),
        "calibration_plans": calibration_plans(calibration, config, score=score),
    }


def certificates(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: str
) -> list[dict[str, Any]]:
    """A certificate of every method at every target risk, and what its threshold gives on test.

    Each holds by itself. Which method to trust must be chosen before looking at them: the best of
    several has not the confidence of one.
    """
    confidence, correct = calibration.confidence(score), 1 - calibration.wrong
    delta = config.evaluation.delta
    rows = []
    for risk in config.evaluation.target_risks:
        found = [guarantees.sgr(confidence, correct, target_risk=risk, delta=delta)]
        for procedure in ("bonferroni", "fixed_sequence"):
            found.append(
                guarantees.learn_then_test(
                    confidence, correct, target_risk=risk, delta=delta, procedure=procedure
                )
            )
        found.append(guarantees.conformal_risk_control(confidence, correct, alpha=risk))
        rows += [
            {
                **certificate.to_dict(),
                "test": _on_test(test.confidence(score), test.wrong, certificate.threshold),
            }
            for certificate in found
        ]
    return rows


def class_certificates(
    calibration: Predictions, test: Predictions, config: ConfigDict, *, score: str
) -> list[dict[str, Any]]:
    """Certificates by predicted class, all together at delta, by learn-then-test (Bonferroni)."""
    classes = range(calibration.outputs["logits"].shape[-1])
    confidence, wrong, predicted = test.confidence(score), test.wrong, test.predicted
    rows = []
    for risk in config.evaluation.target_risks:
        found = guarantees.group_certificates(
            guarantees.learn_then_test,
            calibration.confidence(score),
            1 - calibration.wrong,
            calibration.predicted,
            target_risk=risk,
            delta=config.evaluation.delta,
            names=list(classes),
            candidates=CLASS_CANDIDATES,
        )
        for name, certificate in found.items():
            member = predicted == name
            row = {"predicted_class": name, **certificate.to_dict()}
            if member.any():
                row["test"] = _on_test(confidence[member], wrong[member], certificate.threshold)
            rows.append(row)
    return rows


def calibration_plans(
    calibration: Predictions, config: ConfigDict, *, score: str
) -> list[dict[str, Any]]:
    """How many calibration examples a certificate at config.target_coverage needs, per target risk.

    For one threshold, fixed beforehand, that accepts this coverage with the error rate seen on the
    calibration split; a search among thresholds needs more.
    """
    confidence, wrong = calibration.confidence(score), calibration.wrong
    coverage = config.target_coverage
    threshold = metrics.threshold_for_coverage(confidence, coverage=coverage)
    seen = metrics.deployed(confidence, wrong, threshold=threshold)
    rows = []
    for risk in config.evaluation.target_risks:
        row = {"target_risk": risk, "coverage": coverage, "expected_risk": seen.risk}
        try:
            plan = guarantees.calibration_size(
                target_risk=risk,
                delta=config.evaluation.delta,
                expected_risk=seen.risk,
                coverage=coverage,
            )
        except ValueError:  # the expected risk is not, or hardly, below the target
            rows.append({**row, "n_calibration": None, "power": None})
        else:
            rows.append({**row, "n_calibration": plan.n_calibration, "power": plan.power})
    return rows


def _on_test(confidence: np.ndarray, wrong: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """Coverage, risk and counts of accepting confidence >= threshold; None accepts nothing."""
    result = metrics.deployed(confidence, wrong, threshold=threshold)
    return {
        "threshold": result.threshold,
        "coverage": result.coverage,
        "selective_risk": result.risk,
        "n_accepted": result.n_accepted,
        "n_errors": result.n_errors,
        "n_rejected": result.n - result.n_accepted,
        "n_rejected_errors": int(wrong.sum()) - result.n_errors,
    }
