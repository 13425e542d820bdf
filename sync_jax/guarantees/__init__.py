"""Thresholds that come with a proof: selective risk bounded from a calibration split.

Each method looks at `confidence` [n] (higher = more confident; infinities allowed) and `correct`
[n] (0/1) of a calibration split that nothing else has seen, and returns a `Certificate`: accept
confidence >= threshold, and the promise that goes with it. Where no threshold meets the target the
certificate says `feasible=False` and why; it never carries a threshold whose bound exceeds it.

| method                            | promise                        | assumes   |
|-----------------------------------|--------------------------------|-----------|
| `sgr`                             | P(risk > bound) <= delta       | see there |
| `learn_then_test`, bonferroni     | P(risk > bound) <= delta       | nothing   |
| `learn_then_test`, fixed_sequence | P(risk > target) <= delta      | see there |
| `conformal_risk_control`          | P(accepted and wrong) <= alpha | nothing   |

"Nothing" beyond what all assume: that calibration examples are independent draws from the
distribution that the promise is about (for conformal risk control: exchangeable with the new
example). `risk` is the selective risk on that distribution: the share of errors among the accepted.
The probability is over the draw of the calibration split, in conformal risk control over that of
the new example too. Neither JAX nor the rest of sync_jax is needed:
`from sync_jax.guarantees import sgr`.
"""

from sync_jax.guarantees.binomial import clopper_pearson_upper
from sync_jax.guarantees.certificate import Certificate
from sync_jax.guarantees.methods import (
    conformal_risk_control,
    group_certificates,
    learn_then_test,
    sgr,
)
from sync_jax.guarantees.planner import CalibrationPlan, calibration_size

__all__ = [
    "CalibrationPlan",
    "Certificate",
    "calibration_size",
    "clopper_pearson_upper",
    "conformal_risk_control",
    "group_certificates",
    "learn_then_test",
    "sgr",
]
