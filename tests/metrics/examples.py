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
HAND = ([0.9, 0.7, 0.4, 0.1], [0, 1, 0, 1])

# A tie of right and wrong in the middle: e_k = 0, 1/4, 1/3, 1/2 in expectation.
HAND_TIED = ([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1])

# Few distinct confidences, so that most examples tie; infinities and both zeros among them.
confidences = st.sampled_from([-math.inf, -2.0, -0.0, 0.0, 0.25, 0.5, 1.0, math.inf])
zero_one = st.sampled_from([0.0, 1.0])
any_loss = st.one_of(zero_one, st.floats(1e-3, 10))


def rows(loss, min_size=1, max_size=12):
    """Data sets as lists of (confidence, loss)."""
    return st.lists(st.tuples(confidences, loss), min_size=min_size, max_size=max_size)


def split(data):
    confidence, loss = (np.array(column) for column in zip(*data, strict=True))
    return confidence, loss


def example(n, seed=0, ties=False):
    """Confidence with some relation to the error."""
    rng = np.random.default_rng(seed)
    confidence = rng.random(n)
    error = (rng.random(n) > 0.5 + confidence / 2).astype(float)
    return (np.round(confidence, 1) if ties else confidence), error
