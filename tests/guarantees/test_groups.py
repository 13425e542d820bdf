"""Certificates of groups: each alone, at its share of delta."""

import numpy as np
import pytest

from sync_jax.guarantees import conformal_risk_control, group_certificates, learn_then_test, sgr
from tests.guarantees.examples import METHODS, dumps, example


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_certified_alone_at_their_share_of_delta(method):
    confidence, correct = example(3000)
    groups = np.array(["cat", "dog", "eel"])[np.arange(3000) % 3]
    certificates = group_certificates(
        METHODS[method], confidence, correct, groups, target_risk=0.1, delta=0.1
    )
    assert list(certificates) == ["cat", "dog", "eel"]
    for name, certificate in certificates.items():
        inside = groups == name
        assert certificate == METHODS[method](
            confidence[inside], correct[inside], target_risk=0.1, delta=0.1 / 3
        )
        assert certificate.feasible


def test_groups_without_examples_pay_and_are_infeasible():
    confidence, correct = example(500)
    certificates = group_certificates(
        learn_then_test,
        confidence,
        correct,
        np.zeros(500, int),
        names=range(10),
        target_risk=0.2,
        delta=0.1,
        procedure="fixed_sequence",
    )
    assert list(certificates) == list(range(10))
    assert certificates[0].delta == pytest.approx(0.01)
    assert certificates[0].method == "learn_then_test/fixed_sequence"
    assert certificates[7].method == certificates[0].method
    assert certificates[7].feasible is False
    assert certificates[7].n_calibration == 0
    assert "no calibration example" in certificates[7].reason
    dumps(certificates[7])


def test_unknown_groups_and_shapes_are_refused():
    options = {"target_risk": 0.1, "delta": 0.1}
    with pytest.raises(ValueError, match=r"groups holds \[3\]"):
        group_certificates(sgr, [1, 2], [1, 1], [0, 3], names=[0, 1, 2], **options)
    with pytest.raises(ValueError, match="groups has shape"):
        group_certificates(sgr, [1, 2], [1, 1], [0], **options)
    with pytest.raises(ValueError, match="groups contains NaN"):
        group_certificates(sgr, [1, 2], [1, 1], [0, np.nan], **options)


def test_a_promise_on_average_has_no_delta_to_divide():
    with pytest.raises(ValueError, match="conformal_risk_control promises an average"):
        group_certificates(
            conformal_risk_control, [1, 2], [1, 1], [0, 1], target_risk=0.1, delta=0.1
        )
