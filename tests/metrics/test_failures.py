"""Failure detection against hand-computed values, the oracles and scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from sync_jax import metrics
from tests.metrics import oracles
from tests.metrics.examples import rows, split, zero_one


def test_failure_detection_by_hand():
    confidence, correct = [4, 3, 2, 1, 0], [1, 0, 1, 1, 0]
    assert metrics.failure_auroc(confidence, correct) == pytest.approx(4 / 6)
    assert metrics.fpr_at_tpr(confidence, correct) == 1 / 2  # needs all three correct ones
    assert metrics.fpr_at_tpr(confidence, correct, tpr=1 / 3) == 0
    assert metrics.fpr_at_tpr(confidence, correct, tpr=0.5) == 1 / 2


@given(rows(zero_one, max_size=30), st.sampled_from([0.05, 0.5, 0.8, 0.95, 1.0]))
def test_failure_detection_matches_the_oracles_and_scikit_learn(data, tpr):
    confidence, correct = split(data)
    auroc = metrics.failure_auroc(confidence, correct)
    assert auroc == pytest.approx(oracles.failure_auroc(confidence, correct), nan_ok=True)
    assert metrics.fpr_at_tpr(confidence, correct, tpr=tpr) == pytest.approx(
        oracles.fpr_at_tpr(confidence, correct, tpr), nan_ok=True
    )
    if 0 < correct.mean() < 1:
        finite = np.clip(confidence, -5, 5)  # scikit-learn refuses infinities
        assert auroc == pytest.approx(sklearn.metrics.roc_auc_score(correct, finite))
