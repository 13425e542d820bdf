"""Data and strategies that the tests of the metrics share."""

import math

import numpy as np
from hypothesis import strategies as st

from sync_jax import metrics

CONVENTIONS = ("mean", "fd_shifts", "torch_uncertainty")
LOSS_METRICS = (
    metrics.aurc,
    metrics.excess_aurc,
    metrics.normalised_aurc,
    metrics.augrc,
    metrics.excess_augrc,
)
CORRECT_METRICS = (metrics.failure_auroc, metrics.fpr_at_tpr)

# Most confident first: right, wrong, right, wrong; e_k = 0, 1/2, 1/3, 1/2.
HAND = {"confidence": [0.9, 0.7, 0.4, 0.1], "loss": [0, 1, 0, 1]}

# A tie of right and wrong in the middle: e_k = 0, 1/4, 1/3, 1/2 in expectation.
HAND_TIED = {"confidence": [0.9, 0.5, 0.5, 0.1], "loss": [0, 1, 0, 1]}

# Few distinct confidences, so that most examples tie; infinities and both zeros among them.
confidences = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0, math.inf])
zero_one = st.sampled_from([0.0, 1.0])
any_loss = st.one_of(zero_one, st.floats(1e-3, 10))


def rows(loss, min_size=1, max_size=12):
    """Data sets as lists of (confidence, loss)."""
    return st.lists(st.tuples(confidences, loss), min_size=min_size, max_size=max_size)


def check_threshold(threshold, confidence, *, first=False):
    """It separates neighbours, in float32 if one can; `first`: the first one above the lower."""
    dtype = np.float16 if np.asarray(confidence).dtype == np.float16 else np.float32
    confidence = np.asarray(confidence, np.float64)
    accepted = confidence >= threshold
    lowest, below = confidence[accepted].min(), confidence[~accepted].max(initial=-math.inf)
    with np.errstate(over="ignore"):
        single = np.float32(lowest)
        if single > lowest:
            single = np.nextafter(single, np.float32(-math.inf))
        if single > below:
            assert np.float32(threshold) == threshold
            assert not first or np.nextafter(dtype(threshold), dtype(-math.inf)) <= below
        else:
            assert threshold in (lowest, -math.inf, np.nextafter(below, math.inf))
    if accepted.all() and not first:
        assert threshold == single


def split(data):
    confidence, loss = (np.array(column) for column in zip(*data, strict=True))
    return confidence, loss


def example(n, seed=0, ties=False):
    """Confidence with some relation to the error."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    error = (rng.random(n) > 0.5 + confidence / 2).astype(float)
    return (np.round(confidence, 1) if ties else confidence), error
