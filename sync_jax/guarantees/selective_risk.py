"""Methods that bound the selective risk, the share of errors among the accepted."""

import decimal
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.guarantees.binomial import clopper_pearson_upper, fewest_accepted
from sync_jax.guarantees.calibration import calibration_split, probability
from sync_jax.guarantees.certificate import Certificate, certified, infeasible


def sgr(
    confidence: ArrayLike, correct: ArrayLike, *, target_risk: float, delta: float
) -> Certificate:
    """Selection with guaranteed risk (Geifman & El-Yaniv 2017, Algorithm 1).

    A binary search for the largest coverage whose Clopper-Pearson bound at delta / K meets the
    target; K = ceil(log2(n + 1)) bounds its steps. (The paper's ceil(log2 n) is one less where n is
    a power of 2, and leaves full coverage untested.) A threshold is one of the confidences and
    accepts ties with it, which are counted.

    The paper's proof is a union bound over the K thresholds visited as though they were fixed in
    advance, while they are calibration confidences on a path that the errors steer. The simulations
    in the tests find no violation; where that isn't enough, `learn_then_test` needs no such step.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        target_risk: selective risk to stay below, in (0, 1).
        delta: chance of failing to, in (0, 1).

    Raises:
        ValueError: input empty, NaN or of different shapes; correct not 0/1; target_risk or delta
            outside (0, 1). The methods below raise the same.
    """
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    data = calibration_split(confidence, correct)
    share = delta / data.n.bit_length()
    best: tuple[float, int, float] | None = None
    smallest = 1.0
    low, high = 1, data.n  # ranks still to decide on
    while low <= high:
        threshold = data.confidence[(low + high) // 2 - 1]
        n_accepted = int(data.accepted(threshold))
        bound = clopper_pearson_upper(int(data.errors[n_accepted]), n_accepted, share)
        smallest = min(smallest, bound)
        if bound <= target_risk:
            best = (threshold, n_accepted, bound)
            low = n_accepted + 1
        else:
            high = int(np.searchsorted(-data.confidence, -threshold, side="left"))
    if best is None:
        reason = (
            f"no threshold visited has a bound of at most {target_risk:g}: the smallest is "
            f"{smallest:.4g}; {_least(target_risk, share)}"
        )
        return infeasible("sgr", data.n, target_risk=target_risk, delta=delta, reason=reason)
    return certified(
        "sgr",
        data,
        best[0],
        best[1],
        target_risk=target_risk,
        delta=delta,
        bound=best[2],
        promise=_risk_promise(
            best[2],
            delta,
            ", by a union bound that takes the thresholds visited for fixed in advance",
        ),
    )


def learn_then_test(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    target_risk: float,
    delta: float,
    procedure: Literal["bonferroni", "fixed_sequence"] = "bonferroni",
    thresholds: ArrayLike | None = None,
    candidates: int = 50,
    slack: int = 3,
) -> Certificate:
    """Tests "the risk exceeds the target" at several thresholds (Angelopoulos et al. 2021).

    The p-value of a threshold that accepts n' examples with k errors is P(Binomial(n', target) <=
    k). The result is the rejected threshold of largest coverage. Choose procedure, thresholds and
    candidates before looking at the calibration split, or split delta between what you try.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        target_risk: selective risk to stay below, in (0, 1).
        delta: chance of failing to, in (0, 1).
        procedure: "bonferroni" splits delta evenly between the candidates and assumes nothing.
            "fixed_sequence" tests each at delta, from the most confident down, and stops at the
            first that fails: mostly the larger coverage, but valid only where the chance of an
            error doesn't rise with confidence.
        thresholds: [thresholds], fixed without this data. None takes `candidates` evenly spaced
            ranks and accepts what strictly exceeds the next confidence: as a threshold, that
            confidence's successor in its own float dtype, so pass the dtype that you deploy.
        candidates: at least 1; unused with thresholds.
        slack: a fixed sequence starts where enough examples are accepted to pass with this many
            errors, or fewer if that takes more than half of the examples. At 0 it may start
            soonest, and a single error among the most confident ends it.

    Raises:
        ValueError: also for an unknown procedure, candidates below 1, slack below 0,
            thresholds empty or NaN.
    """
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    if procedure not in ("bonferroni", "fixed_sequence"):
        raise ValueError(f"procedure {procedure!r} is neither 'bonferroni' nor 'fixed_sequence'")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    if slack < 0:
        raise ValueError(f"slack must not be negative, got {slack}")
    method = f"learn_then_test/{procedure}"
    data = calibration_split(confidence, correct)
    bonferroni = procedure == "bonferroni"
    if bonferroni:  # a candidate that accepts fewer cannot pass, whatever the data
        fewest = fewest_accepted(target_risk, delta / candidates)
    else:
        fewest = _start_of_sequence(data.n, target_risk, delta, slack)
    if thresholds is None:
        ranks = np.unique(np.linspace(min(fewest, data.n), data.n, candidates).astype(np.int64))
        threshold, n_accepted = data.strictly_above(ranks)
    else:
        threshold = -np.unique(-np.asarray(thresholds, dtype=np.float64).reshape(-1))
        if threshold.size == 0 or np.isnan(threshold).any():
            raise ValueError("thresholds is empty or contains NaN")
        n_accepted = data.accepted(threshold)
    share = delta / threshold.size if bonferroni else delta
    bound = clopper_pearson_upper(data.errors[n_accepted], n_accepted, share)
    passed = bound <= target_risk  # the p-value is at most `share` exactly there
    failure = f"the smallest bound among {threshold.size} candidates is {bound.min():.4g}"
    if not bonferroni:
        tested = n_accepted >= fewest
        passed = tested & np.logical_and.accumulate(passed | ~tested)
        if tested.any():
            failure = f"the first in the sequence has a bound of {bound[tested][0]:.4g}"
        else:
            failure = f"none accepts the {fewest} examples that the sequence starts from"
    if not passed.any():
        reason = (
            f"no threshold was certified at {target_risk:g}: {failure}; "
            f"{_least(target_risk, share)}"
        )
        return infeasible(method, data.n, target_risk=target_risk, delta=delta, reason=reason)
    chosen = int(np.flatnonzero(passed)[-1])  # thresholds descend, so coverage grows
    # A fixed sequence rejects "risk > target"; its last bound alone isn't simultaneous.
    promised = float(bound[chosen]) if bonferroni else target_risk
    return certified(
        method,
        data,
        threshold[chosen],
        n_accepted[chosen],
        target_risk=target_risk,
        delta=delta,
        bound=promised,
        promise=_risk_promise(
            promised,
            delta,
            ""
            if bonferroni
            else ", provided that errors are no likelier where confidence is higher",
        ),
    )


def _start_of_sequence(n: int, target_risk: float, delta: float, slack: int) -> int:
    """How many of n examples the first threshold of a fixed sequence must accept: see `slack`."""
    for errors in range(slack, 0, -1):
        start = fewest_accepted(target_risk, delta, errors)
        if 2 * start <= n:
            return start
    return fewest_accepted(target_risk, delta)


def _risk_promise(bound: float, delta: float, provided: str = "") -> str:
    return (
        f"With probability at least 1 - {_rounded_up(delta)} over the draw of the calibration "
        f"split, the selective risk on its distribution is at most {_rounded_up(bound)}{provided}."
    )


def _rounded_up(value: float) -> str:
    """Six significant digits, never less than the value: what is promised must hold."""
    digits = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING)
    return f"{digits.create_decimal(repr(value)).normalize():g}"


def _least(target_risk: float, delta: float) -> str:
    return (
        f"even without an error, {fewest_accepted(target_risk, delta)} accepted examples are needed"
    )
