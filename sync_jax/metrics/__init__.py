"""Metrics of selective classification, in NumPy and float64.

A selective classifier answers where its `confidence` is high enough and abstains elsewhere. The
metrics take `confidence` [n] (higher = more confident; infinities allowed, NaN refused) and `loss`
[n] (the 0/1 error, or any finite non-negative loss), or `correct` [n] (0/1) where only right and
wrong make sense; those of probabilities take `probabilities` [n, classes] and `labels` [n]. What
comes from confidence doesn't depend on the order of the input (to the last bit); where no threshold
is involved, nor does it on strictly increasing transforms of confidence. Everything is O(n log n).

**Ties.** Examples of equal confidence have no order. Rank-based metrics take the expected value
over a random order of each tie, which is what a user who broke ties at random would get on average;
`risk_coverage_curve`, `fpr_at_tpr`, `deployed` and `threshold_table` accept a tie together, as a
threshold does.

**Undefined values** (an AUROC without errors, the risk of nothing) are NaN and never raise; invalid
input raises ValueError and names the argument.

In all docstrings, e_k is the (expected) mean loss of the k most confident of n examples: the
selective risk at coverage k/n. Neither JAX nor the rest of sync_jax is needed:
`from sync_jax.metrics import aurc`.
"""

from sync_jax.metrics.bootstrap import (
    Interval,
    bootstrap_interval,
    bootstrap_values,
    paired_bootstrap_interval,
    percentile_interval,
)
from sync_jax.metrics.probabilities import (
    CalibrationError,
    accuracy,
    brier,
    expected_calibration_error,
    negative_log_likelihood,
)
from sync_jax.metrics.selection import (
    Convention,
    Deployed,
    RiskCoverageCurve,
    ThresholdTable,
    augrc,
    aurc,
    coverage_at_risk,
    deployed,
    excess_augrc,
    excess_aurc,
    failure_auroc,
    fpr_at_tpr,
    normalised_aurc,
    risk_coverage_curve,
    selective_risk,
    threshold_for_coverage,
    threshold_table,
)

__all__ = [
    "CalibrationError",
    "Convention",
    "Deployed",
    "Interval",
    "RiskCoverageCurve",
    "ThresholdTable",
    "accuracy",
    "augrc",
    "aurc",
    "bootstrap_interval",
    "bootstrap_values",
    "brier",
    "coverage_at_risk",
    "deployed",
    "excess_augrc",
    "excess_aurc",
    "expected_calibration_error",
    "failure_auroc",
    "fpr_at_tpr",
    "negative_log_likelihood",
    "normalised_aurc",
    "paired_bootstrap_interval",
    "percentile_interval",
    "risk_coverage_curve",
    "selective_risk",
    "threshold_for_coverage",
    "threshold_table",
]
