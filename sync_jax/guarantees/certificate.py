"""What every method returns: a threshold with its promise, or the reason why there is none."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A threshold with its promise, or the reason why there is none.

    Attributes:
        method: "sgr", "learn_then_test/bonferroni", "learn_then_test/fixed_sequence" or
            "conformal_risk_control".
        feasible: whether a threshold meets the target.
        threshold: accept confidence >= threshold, compared in the dtype of the confidences given;
            None where infeasible: abstain always.
        coverage: n_accepted / n_calibration.
        target_risk: the risk asked for (alpha in conformal risk control).
        delta: chance that the promise fails, for this certificate (a group's share of it in
            `group_certificates`); None where the promise is an expectation.
        bound: what is promised of the risk, at most target_risk; None where infeasible. Conformal
            risk control promises target_risk; its bound is what it compares with that,
            (n_errors + 1) / (n_calibration + 1).
        n_calibration: calibration examples.
        n_accepted: those with confidence >= threshold.
        n_errors: those of them that are wrong.
        promise: what holds, and over what randomness, in one sentence.
        reason: why there is no threshold; "" where there is one.
    """

    method: str
    feasible: bool
    threshold: float | None
    coverage: float
    target_risk: float
    delta: float | None
    bound: float | None
    n_calibration: int
    n_accepted: int
    n_errors: int
    promise: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Fields for strict JSON: an infinite threshold becomes "Infinity" or "-Infinity"."""
        fields = dataclasses.asdict(self)
        if self.threshold is not None and math.isinf(self.threshold):
            fields["threshold"] = "Infinity" if self.threshold > 0 else "-Infinity"
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Certificate":
        """Inverse of `to_dict`; other keys, as those of later versions, are ignored."""
        ours = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        threshold = ours["threshold"]
        return cls(**{**ours, "threshold": None if threshold is None else float(threshold)})


def certificate(
    method: str,
    n: int,
    *,
    target_risk: float,
    delta: float | None,
    threshold: float | None = None,
    n_accepted: int = 0,
    n_errors: int = 0,
    bound: float | None = None,
    promise: str = "Nothing is promised of any threshold; abstaining always makes no error.",
    reason: str = "",
) -> Certificate:
    """Makes the certificate of a threshold, or without one that of the reason."""
    return Certificate(
        method=method,
        feasible=threshold is not None,
        threshold=None if threshold is None else float(threshold),
        coverage=int(n_accepted) / n if n_accepted else 0.0,
        target_risk=target_risk,
        delta=delta,
        bound=None if bound is None else float(bound),
        n_calibration=n,
        n_accepted=int(n_accepted),
        n_errors=int(n_errors),
        promise=promise,
        reason=reason,
    )
