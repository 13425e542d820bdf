"""Conformal risk control against its definition."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sync_jax.guarantees import conformal_risk_control
from tests.guarantees.examples import check_counts


@given(
    st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=40),
    st.floats(0.01, 0.99),
)
def test_conformal_risk_control_by_its_definition(data, alpha):
    confidence, correct = (np.array(column) for column in zip(*data, strict=True))
    n = confidence.size
    certificate = conformal_risk_control(confidence, correct, alpha=alpha)
    check_counts(certificate, confidence, correct)
    meets = [
        t
        for t in np.unique(confidence)
        if (((confidence >= t) & ~correct).sum() + 1) / (n + 1) <= alpha
    ]
    assert certificate.threshold == (min(meets) if meets else None)
    assert certificate.delta is None
    if certificate.feasible:
        assert certificate.bound == (certificate.n_errors + 1) / (n + 1)


def test_conformal_risk_control_says_how_many_examples_it_needs():
    certificate = conformal_risk_control(np.arange(98), np.ones(98), alpha=0.01)
    assert not certificate.feasible
    assert "at least 99" in certificate.reason
    assert conformal_risk_control(np.arange(99), np.ones(99), alpha=0.01).feasible
    wrong_on_top = conformal_risk_control(np.arange(150), np.arange(150) < 149, alpha=0.01)
    assert "most confident" in wrong_on_top.reason
