"""Thresholds that come with a proof: selective risk bounded from a calibration split.

Each method looks at `confidence` [n] (higher = more confident; infinities allowed) and `correct`
[n] (0/1) of a calibration split that nothing else has seen, and returns a `Certificate`: accept
confidence >= threshold, and the promise that goes with it. Where no threshold meets the target the
certificate says `feasible=False` and why; it never carries a threshold whose bound exceeds it.

| method                            | promise                     | assumes      |
|-----------------------------------|-----------------------------|--------------|
| `sgr`                             | P(risk > bound) <= delta    | see there    |
| `learn_then_test`, bonferroni     | P(risk > bound) <= delta    | nothing      |
| `learn_then_test`, fixed_sequence | P(risk > target) <= delta   | see there    |
| `conformal_risk_control`          | E[accepted, wrong] <= alpha | nothing      |

All assume that calibration examples are independent draws from the distribution that the promise is
about (for conformal risk control: exchangeable with the new example), and no more where it says so.
`risk` is the selective risk: the share of errors among the accepted, on the distribution that the
calibration split was drawn from. The probability is over the draw of that split. Neither JAX nor
the rest of sync_jax is needed: `from sync_jax.guarantees import sgr`.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, betainccinv

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """A threshold with its promise, or the reason why there is none.

    Attributes:
        method: "sgr", "learn_then_test/bonferroni", "learn_then_test/fixed_sequence" or
            "conformal_risk_control".
        feasible: whether a threshold meets the target.
        threshold: accept confidence >= threshold, compared in the dtype of the confidences given;
            None where infeasible: abstain always.
        coverage: n_accepted / n_calibration.
        target_risk: the risk asked for (alpha in conformal risk control).
        delta: chance that the promise fails, for this certificate (a group's share of it in
            `group_certificates`); None where the promise is an expectation.
        bound: what is promised of the risk, at most target_risk; None where infeasible. In
            conformal risk control, (n_errors + 1) / (n_calibration + 1).
        n_calibration: calibration examples.
        n_accepted: those with confidence >= threshold.
        n_errors: those of them that are wrong.
        promise: what holds, and over what randomness, in one sentence.
        reason: why there is no threshold; "" where there is one.
    """

    method: str
    feasible: bool
    threshold: float | None
    coverage: float
    target_risk: float
    delta: float | None
    bound: float | None
    n_calibration: int
    n_accepted: int
    n_errors: int
    promise: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Fields for strict JSON: an infinite threshold becomes "Infinity" or "-Infinity"."""
        fields = dataclasses.asdict(self)
        if self.threshold is not None and math.isinf(self.threshold):
            fields["threshold"] = "Infinity" if self.threshold > 0 else "-Infinity"
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Certificate":
        """Inverse of `to_dict`."""
        threshold = fields["threshold"]
        return cls(**{**fields, "threshold": None if threshold is None else float(threshold)})


# --- Input and counts -----------------------------------------------------------------------------


def _probability(value: float, name: str) -> float:
    if not 0 < value < 1:  # NaN fails too
        raise ValueError(f"{name} must lie in (0, 1), got {value}")
    return float(value)


@dataclasses.dataclass(frozen=True, eq=False)
class _Calibration:
    """Calibration examples in descending order of confidence.

    Counts are integers throughout: a count recovered from a rate can truncate to one error less,
    and the bound is then none.
    """

    confidence: FloatArray  # [n], descending
    errors: IntArray  # [n + 1], errors among the k first
    dtype: Any  # floating dtype of the confidences as given

    @property
    def n(self) -> int:
        return self.confidence.size

    def accepted(self, threshold: ArrayLike) -> IntArray:
        """How many have confidence >= threshold; they are the first ones."""
        return np.searchsorted(-self.confidence, -np.asarray(threshold), side="right")

    def strictly_above(self, rank: IntArray) -> tuple[FloatArray, IntArray]:
        """Thresholds that accept what exceeds the (rank + 1)-th largest confidence, and how many.

        The rank + 1-th example only places the threshold and isn't counted, so the accepted are
        independent draws from the accepted part of the distribution, whatever ties there are.
        """
        below = np.append(self.confidence, -np.inf)[rank]
        with np.errstate(over="ignore"):  # the successor of the largest float is infinity
            up = np.nextafter(below.astype(self.dtype), np.array(np.inf, self.dtype))
        return up.astype(np.float64), np.searchsorted(-self.confidence, -below, side="left")


def _calibration(confidence: ArrayLike, correct: ArrayLike) -> _Calibration:
    given = np.asarray(confidence)
    try:
        scores, right = given.astype(np.float64), np.asarray(correct, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("confidence and correct must be arrays of real numbers") from error
    if scores.ndim != 1:
        raise ValueError(f"confidence must have shape [n], got {scores.shape}")
    if scores.size == 0:
        raise ValueError("confidence is empty")
    if np.isnan(scores).any():
        raise ValueError("confidence contains NaN")
    if right.shape != scores.shape:
        raise ValueError(f"correct has shape {right.shape} but confidence {scores.shape}")
    if not ((right == 0) | (right == 1)).all():  # NaN is neither
        raise ValueError("correct must hold only 0 and 1")
    order = np.argsort(-scores, kind="stable")
    errors = np.concatenate(([0], np.cumsum(right[order] == 0)))
    dtype = given.dtype if np.issubdtype(given.dtype, np.floating) else np.dtype(np.float64)
    return _Calibration(scores[order] + 0.0, errors, dtype)  # + 0.0: no -0.0 as a threshold


def _certify(
    method: str,
    data: _Calibration,
    threshold: float,
    n_accepted: int,
    *,
    target_risk: float,
    delta: float | None,
    bound: float,
    promise: str,
) -> Certificate:
    return Certificate(
        method=method,
        feasible=True,
        threshold=float(threshold),
        coverage=int(n_accepted) / data.n,
        target_risk=target_risk,
        delta=delta,
        bound=float(bound),
        n_calibration=data.n,
        n_accepted=int(n_accepted),
        n_errors=int(data.errors[n_accepted]),
        promise=promise,
        reason="",
    )


def _infeasible(
    method: str, n: int, *, target_risk: float, delta: float | None, reason: str
) -> Certificate:
    return Certificate(
        method=method,
        feasible=False,
        threshold=None,
        coverage=0.0,
        target_risk=target_risk,
        delta=delta,
        bound=None,
        n_calibration=n,
        n_accepted=0,
        n_errors=0,
        promise="Nothing is promised of any threshold; abstaining always makes no error.",
        reason=reason,
    )


# --- Bounds ---------------------------------------------------------------------------------------


def clopper_pearson_upper(errors: ArrayLike, n: ArrayLike, delta: ArrayLike) -> Any:
    """Upper confidence bound for an error rate (Clopper & Pearson 1934).

    The largest rate r with P(Binomial(n, r) <= errors) >= delta, so that a rate estimated from n
    independent examples exceeds it with probability at most delta. 1 where all n are errors, as
    where n = 0.

    Args:
        errors: integers in [0, n].
        n: non-negative integers.
        delta: in (0, 1). The three broadcast.

    Returns:
        A float, or an array of the broadcast shape.

    Raises:
        ValueError: counts not integers or out of range (a rate times n isn't a count: it may
            truncate); delta outside (0, 1).
    """
    k, m, d = np.broadcast_arrays(errors, n, np.asarray(delta, dtype=np.float64))
    for counts, name in ((k, "errors"), (m, "n")):
        if not np.issubdtype(counts.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {counts.dtype}")
    if (m < 0).any():
        raise ValueError("n must be non-negative")
    if ((k < 0) | (k > m)).any():
        raise ValueError("errors must lie in [0, n]")
    if not ((d > 0) & (d < 1)).all():
        raise ValueError(f"delta must lie in (0, 1), got {delta!r}")
    # beta.ppf(1 - delta, ...) without the cancellation in 1 - delta.
    bound = np.where(k < m, betainccinv(k + 1.0, np.maximum(m - k, 1.0), d), 1.0)
    return float(bound) if bound.ndim == 0 else bound


def _fewest(target_risk: float, delta: float, errors: int = 0) -> int:
    """The smallest n with P(Binomial(n, target_risk) <= errors) <= delta: errors it can afford.

    Without an error that is (1 - target_risk)^n <= delta.
    """
    low, high = errors, errors + 1
    while bdtr(errors, high, target_risk) > delta:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        enough = bdtr(errors, middle, target_risk) <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


# --- Methods --------------------------------------------------------------------------------------


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
    target_risk, delta = _probability(target_risk, "target_risk"), _probability(delta, "delta")
    data = _calibration(confidence, correct)
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
        return _infeasible("sgr", data.n, target_risk=target_risk, delta=delta, reason=reason)
    return _certify(
        "sgr",
        data,
        best[0],
        best[1],
        target_risk=target_risk,
        delta=delta,
        bound=best[2],
        promise=_risk_promise(best[2], delta),
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
        procedure: "bonferroni" tests each candidate at delta / candidates and assumes nothing.
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
    target_risk, delta = _probability(target_risk, "target_risk"), _probability(delta, "delta")
    if procedure not in ("bonferroni", "fixed_sequence"):
        raise ValueError(f"procedure {procedure!r} is neither 'bonferroni' nor 'fixed_sequence'")
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    if slack < 0:
        raise ValueError(f"slack must not be negative, got {slack}")
    method = f"learn_then_test/{procedure}"
    data = _calibration(confidence, correct)
    bonferroni = procedure == "bonferroni"
    if bonferroni:  # whoever accepts fewer cannot pass, whatever the data
        fewest = _fewest(target_risk, delta / candidates)
    else:
        starts = (_fewest(target_risk, delta, errors) for errors in range(slack, 0, -1))
        fewest = next((n for n in starts if 2 * n <= data.n), _fewest(target_risk, delta))
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
    if not bonferroni:
        tested = n_accepted >= fewest
        passed = tested & np.logical_and.accumulate(passed | ~tested)
    if not passed.any():
        reason = (
            f"no threshold was certified at {target_risk:g}: the smallest bound among "
            f"{threshold.size} candidates is {bound.min():.4g}; {_least(target_risk, share)}"
        )
        return _infeasible(method, data.n, target_risk=target_risk, delta=delta, reason=reason)
    chosen = int(np.flatnonzero(passed)[-1])  # thresholds descend, so coverage grows
    # A fixed sequence rejects "risk > target"; its last bound alone isn't simultaneous.
    promised = float(bound[chosen]) if bonferroni else target_risk
    return _certify(
        method,
        data,
        threshold[chosen],
        n_accepted[chosen],
        target_risk=target_risk,
        delta=delta,
        bound=promised,
        promise=_risk_promise(promised, delta),
    )


def conformal_risk_control(
    confidence: ArrayLike, correct: ArrayLike, *, alpha: float
) -> Certificate:
    """Bounds the expected joint risk, P(accepted and wrong) (Angelopoulos et al. 2022).

    The smallest calibration confidence with (n R + 1) / (n + 1) <= alpha, R the share of the
    calibration examples that it accepts and that are wrong. Selective risk isn't monotone in the
    threshold, which this method requires; the joint risk is. Selective risk is the joint risk over
    the coverage, and larger.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        alpha: joint risk to stay below on average, in (0, 1).

    Raises:
        ValueError: as `sgr`, for alpha.
    """
    alpha = _probability(alpha, "alpha")
    data = _calibration(confidence, correct)
    n_accepted = data.accepted(data.confidence)
    bound = (data.errors[n_accepted] + 1) / (data.n + 1)  # non-decreasing along the ranks
    met = np.flatnonzero(bound <= alpha)
    if met.size == 0:
        reason = (
            f"{data.n} calibration examples are too few: at least {math.ceil(1 / alpha) - 1} needed"
            if 1 / (data.n + 1) > alpha
            else f"the most confident examples alone have a bound of {bound[0]:.4g}"
        )
        return _infeasible(
            "conformal_risk_control", data.n, target_risk=alpha, delta=None, reason=reason
        )
    last = int(met[-1])
    return _certify(
        "conformal_risk_control",
        data,
        data.confidence[last],
        n_accepted[last],
        target_risk=alpha,
        delta=None,
        bound=bound[last],
        promise=(
            f"On average over draws of the calibration split and a new example, that example is "
            f"accepted and wrong with probability at most {alpha:g}."
        ),
    )


def _risk_promise(bound: float, delta: float) -> str:
    return (
        f"With probability at least {1 - delta:g} over the draw of the calibration split, the "
        f"selective risk on its distribution is at most {bound:.6g}."
    )


def _least(target_risk: float, delta: float) -> str:
    return f"even without an error, {_fewest(target_risk, delta)} accepted examples are needed"


# --- Groups and planning --------------------------------------------------------------------------


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

    Args:
        method: `sgr` or `learn_then_test`.
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.
        groups: [n], the group of each example, integers or strings.
        target_risk: selective risk of every group to stay below, in (0, 1).
        delta: chance that any of the promises fails, in (0, 1).
        names: all groups that may occur, fixed without this data; those without an example get an
            infeasible certificate. None takes the groups that occur here.
        **options: the method's other arguments, such as procedure="fixed_sequence".

    Returns:
        A certificate by group, in the order of names, or sorted.

    Raises:
        ValueError: as the method, and where groups has another shape, or values not in names.
    """
    target_risk, delta = _probability(target_risk, "target_risk"), _probability(delta, "delta")
    _calibration(confidence, correct)  # errors here name the whole, not a group's part
    scores, right, group = np.asarray(confidence), np.asarray(correct), np.asarray(groups)
    if group.shape != scores.shape:
        raise ValueError(f"groups has shape {group.shape} but confidence {scores.shape}")
    present = np.unique(group).tolist()
    wanted = present if names is None else list(dict.fromkeys(names))
    if unknown := [name for name in present if name not in wanted]:
        raise ValueError(f"groups holds {unknown[:5]}, which names lacks")
    share = delta / len(wanted)
    certificates: dict[Any, Certificate] = {}
    for name in wanted:
        if name in present:
            member = group == name
            certificates[name] = method(
                scores[member], right[member], target_risk=target_risk, delta=share, **options
            )
        else:
            certificates[name] = _infeasible(
                getattr(method, "__name__", str(method)),
                0,
                target_risk=target_risk,
                delta=share,
                reason="the group has no calibration example",
            )
    return certificates


@dataclasses.dataclass(frozen=True)
class CalibrationPlan:
    """How many calibration examples a certificate is likely to need.

    Attributes:
        n_calibration: examples to hold out: n_accepted over the coverage, rounded up.
        n_accepted: how many of them must be accepted.
        max_errors: with how many errors among them the certificate is still given.
        power: chance of at most max_errors at the expected risk; at least the one asked for. It
            falls a little while n_accepted grows, until max_errors can follow.
    """

    n_calibration: int
    n_accepted: int
    max_errors: int
    power: float


def calibration_size(
    *,
    target_risk: float,
    delta: float,
    expected_risk: float,
    coverage: float = 1.0,
    power: float = 0.8,
    tests: int = 1,
) -> CalibrationPlan:
    """How many calibration examples to hold out for a target risk.

    The smallest number of accepted examples for which the Clopper-Pearson bound meets the target
    with the chance `power`, if the accepted are wrong with probability expected_risk.

    Args:
        target_risk: selective risk to certify, in (0, 1).
        delta: chance that the certificate is wrong, in (0, 1).
        expected_risk: the selective risk that you expect there, in [0, target_risk).
        coverage: the coverage at which you expect it, in (0, 1].
        power: chance of getting the certificate, in (0, 1).
        tests: between how many tests delta is split: 1 for a fixed threshold or a fixed sequence,
            the number of candidates for Bonferroni, ceil(log2(n + 1)) for SGR, times the number of
            groups.

    Raises:
        ValueError: an argument out of range. At expected_risk = target_risk no number is enough.
    """
    target_risk, delta = _probability(target_risk, "target_risk"), _probability(delta, "delta")
    power = _probability(power, "power")
    if not 0 <= expected_risk < target_risk:
        raise ValueError(f"expected_risk must lie in [0, target_risk), got {expected_risk}")
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")
    if tests < 1:
        raise ValueError(f"tests must be at least 1, got {tests}")
    share = delta / tests

    def reached(errors: int) -> float:
        return float(bdtr(errors, _fewest(target_risk, share, errors), expected_risk))

    # The fewest examples that allow a number of errors are the likeliest to have no more of them,
    # so the answer is one of these sizes. Their power rises with that number, but for rounding,
    # which the last step looks through.
    low, high = -1, 0
    while reached(high) < power:
        low, high = high, 2 * high + 1
        if high > 10**7:
            raise ValueError("expected_risk is too close to target_risk to plan for")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) >= power else (middle, high)
    high = next(k for k in range(max(0, high - 1000), high + 1) if reached(k) >= power)
    n = _fewest(target_risk, share, high)
    return CalibrationPlan(math.ceil(n / coverage), n, high, reached(high))
