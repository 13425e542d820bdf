"""Metrics of selective classification, in NumPy and float64.

A selective classifier answers where its confidence is high enough and abstains elsewhere. In all
functions

- `confidence` [n]: higher = more confident; infinities allowed,
- `loss` [n]: the 0/1 error, or any finite non-negative loss,
- `correct` [n]: 1 where the prediction is right, 0 where it is wrong,
- `probabilities` [n, classes]: in [0, 1], each row summing to 1 (within 1e-3),
- `labels` [n]: integers in [0, classes),
- `coverage`: share of the examples that are accepted; as an argument in (0, 1],
- `risk`: mean loss of the accepted.

A loss and correctness are easily exchanged, so pass them as `loss=` and `correct=`; by position is
deprecated. Where the confidence clearly ranks errors first, a UserWarning says so, but not inside
`with unchecked():`.

**Invalid input** (empty, NaN, of different shapes, out of range) raises ValueError, which names the
argument. **Undefined values** (an AUROC without errors, the risk of nothing) are NaN and never
raise.

What comes from confidence doesn't depend on the order of the input (to the last bit); where no
threshold is involved, nor does it on strictly increasing transforms of confidence. Everything is
O(n log n).

**Ties.** Examples of equal confidence have no order. Rank-based metrics take the expected value
over a random order of each tie, which is what a user who broke ties at random would get on average;
`risk_coverage_curve`, `fpr_at_tpr`, `deployed` and `threshold_table` accept a tie together, as a
threshold does.

In all docstrings, e_k is the (expected) mean loss of the k most confident of n examples: the
selective risk at coverage k/n. Neither JAX nor the rest of sync_jax is needed:
`from sync_jax.metrics import aurc`.
"""

from sync_jax.metrics.arguments import unchecked as unchecked
from sync_jax.metrics.bootstrap import Interval as Interval
from sync_jax.metrics.bootstrap import bootstrap_interval as bootstrap_interval
from sync_jax.metrics.bootstrap import bootstrap_values as bootstrap_values
from sync_jax.metrics.bootstrap import paired_bootstrap_interval as paired_bootstrap_interval
from sync_jax.metrics.bootstrap import percentile_interval as percentile_interval
from sync_jax.metrics.probabilities import CalibrationError as CalibrationError
from sync_jax.metrics.probabilities import accuracy as accuracy
from sync_jax.metrics.probabilities import brier as brier
from sync_jax.metrics.probabilities import expected_calibration_error as expected_calibration_error
from sync_jax.metrics.probabilities import negative_log_likelihood as negative_log_likelihood
from sync_jax.metrics.selection import Convention as Convention
from sync_jax.metrics.selection import Deployed as Deployed
from sync_jax.metrics.selection import RiskCoverageCurve as RiskCoverageCurve
from sync_jax.metrics.selection import ThresholdTable as ThresholdTable
from sync_jax.metrics.selection import augrc as augrc
from sync_jax.metrics.selection import aurc as aurc
from sync_jax.metrics.selection import coverage_at_risk as coverage_at_risk
from sync_jax.metrics.selection import deployed as deployed
from sync_jax.metrics.selection import excess_augrc as excess_augrc
from sync_jax.metrics.selection import excess_aurc as excess_aurc
from sync_jax.metrics.selection import failure_auroc as failure_auroc
from sync_jax.metrics.selection import fpr_at_tpr as fpr_at_tpr
from sync_jax.metrics.selection import normalised_aurc as normalised_aurc
from sync_jax.metrics.selection import risk_coverage_curve as risk_coverage_curve
from sync_jax.metrics.selection import selective_risk as selective_risk
from sync_jax.metrics.selection import threshold_for_coverage as threshold_for_coverage
from sync_jax.metrics.selection import threshold_table as threshold_table
