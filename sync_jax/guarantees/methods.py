"""The methods, and certificates of one of them for every group at once."""

import dataclasses
import decimal
import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.guarantees.binomial import clopper_pearson_upper, fewest_accepted
from sync_jax.guarantees.calibration import calibration_split, probability
from sync_jax.guarantees.certificate import Certificate, certificate
from sync_jax.metrics.arguments import by_keyword

_SEARCHED = ", by a union bound that takes the thresholds visited for fixed in advance"
_STEPPED = ", by a step-down that takes the thresholds tested for fixed in advance"
_MONOTONE = ", provided that errors are no likelier where confidence is higher"


@by_keyword
def sgr(
    confidence: ArrayLike, correct: ArrayLike, *, target_risk: float, delta: float
) -> Certificate:
    """Selection with guaranteed risk (Geifman & El-Yaniv 2017, Algorithm 1).

    A binary search for the largest coverage whose Clopper-Pearson bound at delta / K meets the
    target; K = ceil(log2(n + 1)) bounds its steps. (The paper's ceil(log2 n) is one less where n is
    a power of 2, and leaves full coverage untested.) A threshold accepts one of the confidences
    and ties with it, which are counted.

    The paper's proof is a union bound over the K thresholds visited as though they were fixed in
    advance, while they are calibration confidences on a path that the errors steer. The simulations
    in the tests find no violation; where that isn't enough, Bonferroni needs no such step.
    """
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    data = calibration_split(confidence, correct)
    result = functools.partial(certificate, "sgr", data.n, target_risk=target_risk, delta=delta)
    share = delta / data.n.bit_length()
    best: tuple[int, float] | None = None
    smallest = 1.0
    low, high = 1, data.n  # ranks still to decide on
    while low <= high:
        threshold = data.confidence[(low + high) // 2 - 1]
        n_accepted = int(data.accepted(threshold))
        bound = clopper_pearson_upper(int(data.errors[n_accepted]), n_accepted, share)
        smallest = min(smallest, bound)
        if bound <= target_risk:
            best = (n_accepted, bound)
            low = n_accepted + 1
        else:
            high = int(np.searchsorted(-data.confidence, -threshold, side="left"))
    if best is None:
        return result(
            reason=f"no threshold visited has a bound of at most {target_risk:g}: the smallest is "
            f"{smallest:.4g}; {_least(target_risk, share)}"
        )
    n_accepted, bound = best
    return result(
        threshold=data.threshold(n_accepted),
        n_accepted=n_accepted,
        n_errors=data.errors[n_accepted],
        bound=bound,
        promise=_risk_promise(bound, delta, _SEARCHED),
    )


@by_keyword
def learn_then_test(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    target_risk: float,
    delta: float,
    procedure: Literal["bonferroni", "holm", "fixed_sequence"] = "bonferroni",
    thresholds: ArrayLike | None = None,
    candidates: int = 50,
    slack: int = 3,
) -> Certificate:
    """Tests "the risk exceeds the target" at several thresholds (Angelopoulos et al. 2021).

    The p-value of a threshold that accepts n' examples with k errors is P(Binomial(n', target) <=
    k). The result is the rejected threshold of largest coverage. Choose procedure, thresholds and
    candidates before looking at the calibration split, or split delta between what you try.

    Args:
        confidence: [n].
        correct: [n].
        target_risk: selective risk to stay below.
        delta: chance of failing to.
        procedure: "bonferroni" splits delta evenly between the candidates and assumes nothing.
            "holm" (1979) splits it between the candidates that are not rejected yet: never the
            smaller coverage, at a promise of the target alone instead of a smaller bound. It
            assumes nothing with `thresholds`; else its proof takes them for fixed.
            "fixed_sequence" tests each at delta, from the most confident down, and stops at the
            first that fails: mostly the larger coverage, but valid only where the chance of an
            error doesn't rise with confidence.
        thresholds: [thresholds], fixed without this data. None takes `candidates` evenly spaced
            ranks and accepts what strictly exceeds the next confidence: from the first float32
            above it, or for a fixed sequence from midway to the lowest accepted.
        candidates: at least 1; unused with thresholds.
        slack: a fixed sequence starts where enough examples are accepted to pass with this many
            errors, or fewer if that takes more than half of the examples. At 0 it may start
            soonest, and a single error among the most confident ends it.
    """
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    if procedure not in ("bonferroni", "holm", "fixed_sequence"):
        raise ValueError(f"procedure {procedure!r} is none of bonferroni, holm, fixed_sequence")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    if slack < 0:
        raise ValueError(f"slack must not be negative, got {slack}")
    data = calibration_split(confidence, correct)
    method = f"learn_then_test/{procedure}"
    result = functools.partial(certificate, method, data.n, target_risk=target_risk, delta=delta)
    sequence = procedure == "fixed_sequence"
    if not sequence:  # a candidate that accepts fewer cannot pass, whatever the data
        fewest = fewest_accepted(target_risk, delta / candidates)
    else:
        fewest = _start(data.n, target_risk, delta, slack)
    if thresholds is None:
        ranks = np.unique(np.linspace(min(fewest, data.n), data.n, candidates).astype(np.int64))
        n_accepted = data.strictly_above(ranks)
    else:
        given = -np.unique(-np.asarray(thresholds, dtype=np.float64).reshape(-1))
        if given.size == 0 or np.isnan(given).any():
            raise ValueError("thresholds is empty or contains NaN")
        n_accepted = data.accepted(given)
    tests = n_accepted.size
    share = delta if sequence else delta / tests
    bound = clopper_pearson_upper(data.errors[n_accepted], n_accepted, share)
    passed = bound <= target_risk  # the p-value is at most `share` exactly there
    failure = f"the smallest bound among {tests} candidates is {bound.min():.4g}"
    if procedure == "holm":
        passed = _holm(data.errors[n_accepted], n_accepted, target_risk, delta)
    if sequence:
        tested = n_accepted >= fewest
        passed = tested & np.logical_and.accumulate(passed | ~tested)
        if tested.any():
            failure = f"the first in the sequence has a bound of {bound[tested][0]:.4g}"
        else:
            failure = f"none accepts the {fewest} examples that the sequence starts from"
    if not passed.any():
        return result(
            reason=f"no threshold was certified at {target_risk:g}: {failure}; "
            f"{_least(target_risk, share)}"
        )
    chosen = int(np.flatnonzero(passed)[-1])  # thresholds descend, so coverage grows
    if thresholds is not None:
        threshold = given[chosen]
    else:  # where nothing is assumed, the accepted may not move the threshold
        threshold = (data.threshold if sequence else data.first_above)(n_accepted[chosen])
    # What Holm or a fixed sequence rejects is "risk > target"; their bounds aren't simultaneous.
    promised = float(bound[chosen]) if procedure == "bonferroni" else target_risk
    stepped = procedure == "holm" and thresholds is None
    return result(
        threshold=threshold,
        n_accepted=n_accepted[chosen],
        n_errors=data.errors[n_accepted[chosen]],
        bound=promised,
        promise=_risk_promise(
            promised, delta, _MONOTONE if sequence else _STEPPED if stepped else ""
        ),
    )


@by_keyword
def sgr_fixed_sequence(
    confidence: ArrayLike, correct: ArrayLike, *, target_risk: float, delta: float
) -> Certificate:
    """The larger coverage of `sgr` and of a fixed sequence, each at half of delta (a union bound).

    The search finds a large coverage where many examples may be accepted, the sequence (of the
    default slack) a small one that the search steps over. Both methods' assumptions are needed.
    """
    method, half = "sgr_fixed_sequence", probability(delta, "delta") / 2
    search = sgr(confidence, correct=correct, target_risk=target_risk, delta=half)
    sequence = learn_then_test(
        confidence, correct=correct, target_risk=target_risk, delta=half, procedure="fixed_sequence"
    )
    best = max(search, sequence, key=lambda each: each.coverage)  # SGR's bound, if they tie
    if best.bound is None:
        reason = f"SGR: {search.reason}; fixed sequence: {sequence.reason}"
        return dataclasses.replace(best, method=method, delta=2 * half, reason=reason)
    promise = _risk_promise(best.bound, 2 * half, _SEARCHED + _MONOTONE)
    return dataclasses.replace(best, method=method, delta=2 * half, promise=promise)


@by_keyword
def conformal_risk_control(
    confidence: ArrayLike, correct: ArrayLike, *, alpha: float
) -> Certificate:
    """Bounds the expected joint risk, P(accepted and wrong), by alpha (Angelopoulos et al. 2022).

    The smallest calibration confidence with (n R + 1) / (n + 1) <= alpha, R the share of the
    calibration examples that it accepts and that are wrong. Selective risk isn't monotone in the
    threshold, which this method requires; the joint risk is. Selective risk is the joint risk over
    the coverage, and larger.
    """
    alpha = probability(alpha, "alpha")
    data = calibration_split(confidence, correct)
    result = functools.partial(
        certificate, "conformal_risk_control", data.n, target_risk=alpha, delta=None
    )
    n_accepted = data.accepted(data.confidence)
    bound = (data.errors[n_accepted] + 1) / (data.n + 1)  # non-decreasing along the ranks
    met = np.flatnonzero(bound <= alpha)
    if 1 / (data.n + 1) > alpha:
        needed = math.ceil(1 / alpha) - 1
        return result(reason=f"{data.n} calibration examples are too few: at least {needed} needed")
    if met.size == 0:
        return result(reason=f"the most confident examples alone have a bound of {bound[0]:.4g}")
    last = met[-1]
    return result(
        threshold=data.threshold(n_accepted[last]),
        n_accepted=n_accepted[last],
        n_errors=data.errors[n_accepted[last]],
        bound=bound[last],
        promise=f"On average over draws of the calibration split and a new example, that example "
        f"is accepted and wrong with probability at most {alpha:g}.",
    )


@by_keyword
def group_certificates(
    method: Callable[..., Certificate],
    confidence: ArrayLike,
    correct: ArrayLike,
    groups: ArrayLike,
    *,
    target_risk: float,
    delta: float,
    names: Sequence[Hashable] | None = None,
    **options: Any,
) -> dict[Any, Certificate]:
    """One certificate per group, all promises together with probability at least 1 - delta.

    Each of G groups gets delta / G (Bonferroni). A group is whatever is known when the threshold is
    applied: the predicted class, a camera, a region; not the true class.

    `method` is `sgr`, `learn_then_test` or `sgr_fixed_sequence`, `options` are its other arguments.
    `groups` [n] are integers or strings. `names` are all groups that may occur, fixed without this
    data, and those without an example get an infeasible certificate; None takes the groups that
    occur here. The result has the order of names, or is sorted.
    """
    if method is conformal_risk_control:
        raise ValueError("conformal_risk_control promises an average: it has no delta to divide")
    target_risk, delta = probability(target_risk, "target_risk"), probability(delta, "delta")
    calibration_split(confidence, correct)  # errors here name the whole, not a group's part
    scores, right, group = np.asarray(confidence), np.asarray(correct), np.asarray(groups)
    if group.shape != scores.shape:
        raise ValueError(f"groups has shape {group.shape} but confidence {scores.shape}")
    if (group != group).any():  # NaN equals nothing, and would be a group without a member
        raise ValueError("groups contains NaN")
    present = np.unique(group).tolist()
    wanted = present if names is None else list(dict.fromkeys(names))
    if unknown := [name for name in present if name not in wanted]:
        raise ValueError(f"groups holds {unknown[:5]}, which names lacks")
    options |= {"target_risk": target_risk, "delta": delta / len(wanted)}
    found = {
        name: method(scores[group == name], correct=right[group == name], **options)
        for name in present
    }
    without_example = certificate(
        found[present[0]].method,
        0,
        target_risk=target_risk,
        delta=delta / len(wanted),
        reason="the group has no calibration example",
    )
    return {name: found.get(name, without_example) for name in wanted}


def _start(n: int, target_risk: float, delta: float, slack: int) -> int:
    """The number of accepted examples that a fixed sequence starts from."""
    starts = [fewest_accepted(target_risk, delta, errors) for errors in range(slack, -1, -1)]
    return next((start for start in starts if 2 * start <= n), starts[-1])


def _holm(errors: Any, n_accepted: Any, target_risk: float, delta: float) -> Any:
    """Which candidates Holm's step-down rejects: those left share delta after every rejection."""
    before, left = 0, n_accepted.size
    while left != before:  # a step that rejects no other is the last
        rejected = clopper_pearson_upper(errors, n_accepted, delta / left) <= target_risk
        before, left = left, max(1, np.count_nonzero(~rejected))
    return rejected


def _risk_promise(bound: float, delta: float, proviso: str) -> str:
    return (
        f"With probability at least 1 - {_rounded_up(delta)} over the draw of the calibration "
        f"split, the selective risk on its distribution is at most {_rounded_up(bound)}{proviso}."
    )


def _rounded_up(value: float) -> str:
    """Six significant digits, never less than the value: what is promised must hold."""
    digits = decimal.Context(prec=6, rounding=decimal.ROUND_CEILING)
    return f"{digits.create_decimal(repr(value)).normalize():g}"


def _least(target_risk: float, delta: float) -> str:
    needed = fewest_accepted(target_risk, delta)
    return f"even without an error, {needed} accepted examples are needed"
