"""Thresholds that come with a proof: selective risk bounded from a calibration split.

Each method takes `confidence` [n] (higher = more confident; infinities allowed) and `correct=` [n]
(1 where the prediction is right, 0 where it is wrong) of a calibration split that nothing else has
seen, and a risk to stay below; `target_risk`, `alpha` and `delta`, the chance that the promise
fails, are in (0, 1). It returns a `Certificate`: accept confidence >= threshold, and the promise
that goes with it. Where no threshold meets the target the certificate says `feasible=False` and
why; it never carries a threshold whose bound exceeds it. Invalid arguments raise ValueError, which
names them.

A threshold lies above the next confidence that is not accepted, at most at the lowest accepted one,
and is a float32 (a float16, of float16 confidences) wherever one lies there: float32 confidences
are accepted alike in float32 and float64. Thresholds that you give stay as they are.

| method                            | promise                        | assumes   |
|-----------------------------------|--------------------------------|-----------|
| `sgr`                             | P(risk > bound) <= delta       | see there |
| `learn_then_test`, bonferroni     | P(risk > bound) <= delta       | nothing   |
| `learn_then_test`, holm           | P(risk > target) <= delta      | see there |
| `learn_then_test`, fixed_sequence | P(risk > target) <= delta      | see there |
| `sgr_fixed_sequence`              | P(risk > bound) <= delta       | see there |
| `conformal_risk_control`          | P(accepted and wrong) <= alpha | nothing   |

"Nothing" beyond what all assume: that calibration examples are independent draws from the
distribution that the promise is about (for conformal risk control: exchangeable with the new
example). Pictures of one patient or video are not: give the methods one of each group, which
`one_per_group` draws. `risk` is the selective risk on that distribution: the share of errors among
the accepted. The probability is over the draw of the calibration split, in conformal risk control
over that of the new example too. Neither JAX nor the rest of sync_jax is needed:
`from sync_jax.guarantees import sgr`.
"""

from sync_jax.guarantees.binomial import clopper_pearson_upper as clopper_pearson_upper
from sync_jax.guarantees.calibration import one_per_group as one_per_group
from sync_jax.guarantees.certificate import Certificate as Certificate
from sync_jax.guarantees.methods import conformal_risk_control as conformal_risk_control
from sync_jax.guarantees.methods import group_certificates as group_certificates
from sync_jax.guarantees.methods import learn_then_test as learn_then_test
from sync_jax.guarantees.methods import sgr as sgr
from sync_jax.guarantees.methods import sgr_fixed_sequence as sgr_fixed_sequence
from sync_jax.guarantees.planner import CalibrationPlan as CalibrationPlan
from sync_jax.guarantees.planner import calibration_size as calibration_size
