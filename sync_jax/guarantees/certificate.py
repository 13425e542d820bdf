"""The result of every method."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A threshold with its promise, or the reason why there is none."""

    method: str  # the function's name; of learn-then-test "learn_then_test/PROCEDURE"
    feasible: bool  # a threshold meets the target
    threshold: float | None  # compared in the dtype of the confidences given; None: abstain always
    coverage: float  # n_accepted / n_calibration
    target_risk: float  # the risk asked for (alpha in conformal risk control)
    delta: float | None  # chance that the promise fails; None where it is an average
    # The risk that is promised, at most target_risk; None where infeasible. Conformal risk control
    # promises target_risk; its bound is what it compares with that, (n_errors + 1) /
    # (n_calibration + 1).
    bound: float | None
    n_calibration: int
    n_accepted: int  # calibration examples with confidence >= threshold
    n_errors: int  # accepted and wrong
    promise: str  # what holds, and over what randomness, in one sentence
    reason: str  # why there is no threshold; "" where there is one

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
