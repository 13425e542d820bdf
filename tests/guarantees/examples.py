"""Methods, data and checks that the tests of the guarantees share."""

import functools
import json

import numpy as np

from sync_jax.guarantees import learn_then_test, sgr, sgr_fixed_sequence
from tests.metrics.examples import check_threshold

LTT = {
    "bonferroni": learn_then_test,
    "holm": functools.partial(learn_then_test, procedure="holm"),
    "fixed_sequence": functools.partial(learn_then_test, procedure="fixed_sequence"),
}
METHODS = {"sgr": sgr, "sgr_fixed_sequence": sgr_fixed_sequence, **LTT}


def example(n=2000, seed=0, dtype=np.float64):
    """Errors fall from 30 % at confidence 0 to none at 1."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n).astype(dtype)
    return confidence, rng.random(n) >= 0.3 * (1 - confidence)


def check_counts(certificate, confidence, correct, *, thresholds_given=False):
    """The counts are what the threshold does on the split; the bound keeps the target."""
    confidence, correct = np.asarray(confidence), np.asarray(correct)
    assert certificate.n_calibration == confidence.size
    for count in (certificate.n_calibration, certificate.n_accepted, certificate.n_errors):
        assert type(count) is int
    if not certificate.feasible:
        assert (certificate.threshold, certificate.bound) == (None, None)
        assert (certificate.coverage, certificate.n_accepted, certificate.n_errors) == (0, 0, 0)
        assert certificate.reason
        return
    accepted = confidence >= certificate.threshold
    assert certificate.n_accepted == accepted.sum() > 0
    assert certificate.n_errors == (accepted & (correct == 0)).sum()
    assert certificate.coverage == certificate.n_accepted / confidence.size
    assert certificate.bound <= certificate.target_risk
    assert certificate.reason == ""
    if not thresholds_given:
        first = certificate.method in ("learn_then_test/bonferroni", "learn_then_test/holm")
        check_threshold(certificate.threshold, confidence, first=first)


def dumps(certificate):
    return json.dumps(certificate.to_dict(), allow_nan=False)
