"""The rule by which a classifier answers or abstains. It needs NumPy alone, and SciPy to change it.

A `Decision` does not care which framework made the logits:

    decision = Decision.load("decision.json")
    label, confidence, accepted, probabilities = decision(logits)
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.errors import InputError
from sync_jax.scores import SCORES, deployed_confidence, softmax

SCHEMA = 1
CONFIDENCE = "confidence"  # in place of a score's name: what the user gives


class Prediction(NamedTuple):
    """Answers for n examples."""

    label: np.ndarray | None  # [n], the most probable class; None where only confidence is known
    confidence: np.ndarray  # [n], higher is more confident: what the threshold is compared with
    accepted: np.ndarray  # [n] bool, False: abstain
    probabilities: np.ndarray | None  # [n, classes] float64


@dataclasses.dataclass(frozen=True, eq=False)
class Decision:
    """Accept where the confidence is at least a threshold, as chosen on a calibration split."""

    score: str  # a name in `scores.SCORES`, or CONFIDENCE
    threshold: float
    confidence: np.ndarray  # [n], of the calibration split
    correct: np.ndarray  # [n] bool, likewise
    groups: np.ndarray | None = None  # [n] integers, see `guarantees.one_per_group`
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the score
    classes: np.ndarray | None = None  # [classes], their names; None: 0, 1, ...
    temperature: float = 1.0  # of the probabilities that are shown; no decision depends on it
    # What the threshold was chosen by: {"coverage": c}, {"cost": [error, look]}, or the fields of
    # a `guarantees.Certificate`.
    chosen_by: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, outputs: ArrayLike | Mapping[str, ArrayLike]) -> Prediction:
        """Prediction or abstains, for each of n examples.

        Args:
            outputs: logits `[n, classes]`, or a mapping of all that the score reads by name, such
                as "logits" and "selection_logits"; of a decision on CONFIDENCE, that, `[n]`.

        Raises:
            ValueError: an output is missing, of another shape, or not finite.
        """
        first = CONFIDENCE if self.score == CONFIDENCE else "logits"
        named = outputs if isinstance(outputs, Mapping) else {first: outputs}
        arrays = {name: np.asarray(x) for name, x in named.items()}
        if first not in arrays or arrays[first].ndim != (1 if first == CONFIDENCE else 2):
            raise ValueError(f"outputs must hold {first} of {1 + (first != CONFIDENCE)} dimensions")
        if bad := [name for name, x in arrays.items() if not np.isfinite(x).all()]:
            raise ValueError(f"{', '.join(bad)}: not finite")
        if self.score == CONFIDENCE:
            confidence = arrays[CONFIDENCE].astype(np.float64)
            return Prediction(None, confidence, confidence >= self.threshold, None)
        if missing := {*SCORES[self.score].needs} - arrays.keys():
            raise ValueError(f"the score {self.score} also needs {', '.join(sorted(missing))}")
        logits = arrays["logits"]
        if self.classes is not None and logits.shape[1] != len(self.classes):
            raise ValueError(f"logits are of {logits.shape[1]} classes, not {len(self.classes)}")
        confidence = deployed_confidence(SCORES[self.score], arrays, **self.parameters)
        predicted = logits.argmax(axis=-1)
        return Prediction(
            predicted if self.classes is None else self.classes[predicted],
            confidence,
            confidence >= self.threshold,
            softmax(logits.astype(np.float64) / self.temperature),
        )

    def with_threshold(
        self,
        *,
        coverage: float | None = None,
        risk: float | None = None,
        delta: float = 0.05,
        cost: tuple[float, float] | None = None,
    ) -> "Decision":
        """The same with another threshold, chosen on the calibration split by one of these.

        Args:
            coverage: share of the calibration examples that is accepted, in (0, 1].
            risk: error rate of the answers that is not to be passed, in (0, 1), with confidence
                1 - delta (`guarantees.sgr_fixed_sequence`).
            delta: chance that this promise fails.
            cost: price of a wrong answer, and price of an abstention, such as of a human look; the
                mean cost is least.

        Raises:
            ValueError: none or several of them are given, one is out of range, or no threshold
                meets the risk; says why.
        """
        asked = {"coverage": coverage, "risk": risk, "cost": cost}
        if sum(x is not None for x in asked.values()) != 1:
            raise ValueError("give one of coverage, risk and cost")
        if coverage is not None:
            from sync_jax import metrics

            threshold = metrics.threshold_for_coverage(self.confidence, coverage=coverage)
            return self._at(threshold, {"coverage": coverage})
        if risk is not None:
            from sync_jax import guarantees

            rows = slice(None) if self.groups is None else guarantees.one_per_group(self.groups)
            found = guarantees.sgr_fixed_sequence(
                self.confidence[rows], correct=self.correct[rows], target_risk=risk, delta=delta
            )
            if found.threshold is None:
                raise ValueError(f"no threshold is certified for a risk of {risk}: {found.reason}")
            return self._at(found.threshold, found.to_dict())
        assert cost is not None
        return self._at(self._cheapest(*cost), {"cost": [float(x) for x in cost]})

    def recalibrated(
        self, confidence: ArrayLike, correct: ArrayLike, groups: ArrayLike | None = None
    ) -> "Decision":
        """The same choice of a threshold on other examples, such as those of the last weeks.

        Args:
            confidence: `[n]`, of `__call__`.
            correct: `[n]`, True where the answer was right, or would have been.
            groups: `[n]`, see `guarantees.one_per_group`.

        Raises:
            ValueError: an array does not fit, or no threshold meets the risk.
        """
        scores, right = np.asarray(confidence), np.asarray(correct).astype(bool)
        if scores.ndim != 1 or right.shape != scores.shape or not scores.size:
            raise ValueError(
                f"confidence and correct must be [n], got {scores.shape}, {right.shape}"
            )
        numbers = None if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
        fresh = dataclasses.replace(self, confidence=scores, correct=right, groups=numbers)
        chosen = self.chosen_by
        if "promise" in chosen:
            return fresh.with_threshold(risk=chosen["target_risk"], delta=chosen["delta"])
        if "cost" in chosen:
            error, look = chosen["cost"]
            return fresh.with_threshold(cost=(error, look))
        return fresh.with_threshold(coverage=chosen["coverage"])

    def _cheapest(self, error: float, look: float) -> float:
        """The threshold of the least mean cost; the largest coverage of several."""
        if not (0 < error < np.inf and 0 < look < np.inf):
            raise ValueError(f"cost must be two positive numbers, got {error} and {look}")
        from sync_jax import metrics

        table = metrics.threshold_table(self.confidence, loss=1.0 - self.correct)
        costs = error * table.risk * table.coverage + look * (1 - table.coverage)
        best = int(np.flatnonzero(costs == costs.min())[-1])
        if costs[best] >= look:  # abstaining always is cheaper
            return float("inf")
        coverage = float(table.coverage[best])
        return metrics.threshold_for_coverage(self.confidence, coverage=coverage)

    def _at(self, threshold: float, chosen_by: Mapping[str, Any]) -> "Decision":
        return dataclasses.replace(self, threshold=float(threshold), chosen_by=chosen_by)

    def describe(self) -> str:
        """One line on when it answers, and what that is worth."""
        known = SCORES.get(self.score)
        label = self.score if known is None else (known.unsaturated or known).label
        name = f"the {label} {'are' if label == 'log odds' else 'is'}"
        line = f"answers when {name} at least {self.threshold:.7g}"
        if "promise" in self.chosen_by:
            bound, delta = self.chosen_by["bound"], self.chosen_by["delta"]
            return (
                f"{line}: at most {100 * bound:.3g} % wrong with {100 * (1 - delta):g} % confidence"
            )
        if "cost" in self.chosen_by:
            error, look = self.chosen_by["cost"]
            return f"{line}: cheapest where an error costs {error:g} and an abstention {look:g}"
        share = float((self.confidence >= self.threshold).mean())
        return f"{line}: {100 * share:.3g} % of the calibration examples"

    @property
    def certificate(self) -> str:
        """The name of the certificate behind the threshold, a digest of its fields; '' of none."""
        if "promise" not in self.chosen_by:
            return ""
        text = json.dumps(self.chosen_by, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def calibration_digest(self) -> str:
        """Digest of the calibration split's confidences and of what was right."""
        digest = hashlib.sha256(self.confidence.astype(np.float64).tobytes())
        digest.update(self.correct.astype(np.uint8).tobytes())
        return digest.hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes an equal decision."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = ("confidence", "correct", "groups", "classes")
        plain = {name: None if fields[name] is None else fields[name].tolist() for name in arrays}
        threshold = self.threshold if np.isfinite(self.threshold) else str(self.threshold)
        return {
            "schema": SCHEMA,
            **fields,
            **plain,
            "dtype": str(self.confidence.dtype),
            "threshold": threshold,
            "parameters": dict(self.parameters),
            "chosen_by": dict(self.chosen_by),
            "certificate": self.certificate,
            "calibration_digest": self.calibration_digest,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Decision":
        """Inverse of `to_json`; InputError where the fields are of no decision."""
        try:
            if fields["schema"] != SCHEMA:
                raise ValueError(f"its schema is {fields['schema']}, this version reads {SCHEMA}")
            known = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
            groups, classes = known["groups"], known["classes"]
            made = cls(
                **known
                | {
                    "threshold": float(known["threshold"]),
                    "confidence": np.asarray(known["confidence"], np.dtype(fields["dtype"])),
                    "correct": np.asarray(known["correct"], bool),
                    "groups": None if groups is None else np.asarray(groups, np.int64),
                    "classes": None if classes is None else np.asarray(classes),
                }
            )
            if made.score not in (*SCORES, CONFIDENCE):
                raise ValueError(f"the score {made.score!r} is of another package")
            if made.calibration_digest != fields["calibration_digest"]:
                raise ValueError("its calibration examples were changed")
            if made.certificate != fields["certificate"]:
                raise ValueError("its certificate was changed")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"this is no decision, or damaged: {error}") from error
        return made

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> "Decision":
        """Reads what `save` wrote; InputError where that cannot be done."""
        try:
            return cls.from_json(json.loads(Path(path).read_text()))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood (Guo et al., 2017), in [1/20, 20]."""
    from scipy.optimize import minimize_scalar

    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels]

    def likelihood(log_temperature: float) -> float:
        scale = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(shifted * scale).sum(axis=-1)) - own * scale))

    bounds = (-np.log(20), np.log(20))
    return float(np.exp(minimize_scalar(likelihood, bounds=bounds, method="bounded").x))
