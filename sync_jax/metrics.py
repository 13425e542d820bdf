"""Metrics of selective classification, in NumPy and float64.

A selective classifier answers where its `confidence` is high enough and abstains elsewhere. Every
metric takes `confidence` [n] (higher = more confident; infinities allowed, NaN refused) and `loss`
[n] (the 0/1 error, or any finite non-negative loss), or `correct` [n] (0/1) where only right and
wrong make sense. Results depend on the ranking alone: not on the order of the input (to the last
bit), nor on strictly increasing transforms of confidence. Everything is O(n log n).

**Ties.** Examples of equal confidence have no order. Rank-based metrics take the expected value
over a random order of each tie, which is what a user who broke ties at random would get on average;
`risk_coverage_curve`, `deployed` and `threshold_table` accept a tie together, as a threshold does.

**Undefined values** (an AUROC without errors, the risk of nothing) are NaN and never raise; invalid
input raises ValueError and names the argument.

Below, e_k is the (expected) mean loss of the k most confident of n examples: the selective risk at
coverage k/n. Neither JAX nor the rest of sync_jax is needed: `from sync_jax.metrics import aurc`.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Convention = Literal["mean", "fd_shifts", "torch_uncertainty"]

# Resamples are evaluated in blocks of about this many examples: some ten arrays of 8 MB at a time.
_BLOCK = 1_000_000


# --- Input ----------------------------------------------------------------------------------------


def _vector(value: ArrayLike, name: str) -> FloatArray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be an array of real numbers") from error
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape [n], got {array.shape}")
    if array.size == 0:
        raise ValueError(f"{name} is empty")
    if np.isnan(array).any():
        raise ValueError(f"{name} contains NaN")
    return array + 0.0  # -0.0 becomes 0.0: they tie, and must not differ in the output


@dataclasses.dataclass(frozen=True, eq=False)
class _Sample:
    """Checked input, with multiplicities.

    `counts` says how often each example occurs (None: once). Its leading axes are independent data
    sets, which a metric keeps: so the bootstrap evaluates many resamples at once.
    """

    confidence: FloatArray  # [n]
    loss: FloatArray  # [n], or correct
    counts: IntArray | None = None  # [..., n]

    def best(self) -> "_Sample":
        """The same losses ranked perfectly."""
        return dataclasses.replace(self, confidence=-self.loss)


def _loss_sample(confidence: ArrayLike, loss: ArrayLike) -> _Sample:
    sample = _sample(confidence, loss, "loss")
    if sample.loss.min() < 0 or np.isinf(sample.loss.max()):
        raise ValueError("loss must be finite and non-negative")
    return sample


def _correct_sample(confidence: ArrayLike, correct: ArrayLike) -> _Sample:
    sample = _sample(confidence, correct, "correct")
    if not _is_binary(sample.loss):
        raise ValueError("correct must hold only 0 and 1")
    return sample


def _sample(confidence: ArrayLike, values: ArrayLike, name: str) -> _Sample:
    confidence, values = _vector(confidence, "confidence"), _vector(values, name)
    if values.shape != confidence.shape:
        raise ValueError(f"{name} has shape {values.shape} but confidence {confidence.shape}")
    return _Sample(confidence, values)


def _is_binary(array: FloatArray) -> bool:
    return bool(((array == 0) | (array == 1)).all())


def _ceil(value: FloatArray) -> IntArray:
    """Ceiling that forgives rounding: 0.07 * 100 is 7.000000000000001 and means 7."""
    nearest = np.rint(value)
    close = np.abs(value - nearest) <= 1e-9 * np.maximum(1.0, np.abs(nearest))
    return np.where(close, nearest, np.ceil(value)).astype(np.int64)


def _rank(coverage: ArrayLike, n: int) -> IntArray:
    """How many of n examples a coverage in (0, 1] accepts: the smallest k with k/n >= coverage."""
    values = np.asarray(coverage, dtype=np.float64)
    if not ((values > 0) & (values <= 1)).all():  # NaN fails both comparisons
        raise ValueError(f"coverage must lie in (0, 1], got {values}")
    return np.clip(_ceil(values * n), 1, n)


# --- Ties and ranks -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class _Groups:
    """Examples grouped by equal confidence, most confident group first."""

    threshold: FloatArray  # [groups]
    count: IntArray  # [..., groups]
    loss_sum: FloatArray  # [..., groups]


def _group(sample: _Sample) -> _Groups:
    # Loss is the second key because float sums depend on their order: sorted by both keys, any
    # permutation of the input arrives here as the same array.
    order = np.lexsort((sample.loss, -sample.confidence))
    confidence, loss = sample.confidence[order], sample.loss[order]
    start = np.flatnonzero(np.concatenate(([True], confidence[1:] != confidence[:-1])))
    if sample.counts is None:
        count = np.diff(start, append=confidence.size)
        loss_sum = np.add.reduceat(loss, start)
    else:
        counts = sample.counts[..., order]
        count = np.add.reduceat(counts, start, axis=-1)
        loss_sum = np.add.reduceat(counts * loss, start, axis=-1)
    return _Groups(confidence[start], count, loss_sum)


def _before(cumulative: Any) -> Any:
    """Shifts cumulative sums [..., groups] by one group: what comes before each."""
    return np.concatenate((np.zeros_like(cumulative[..., :1]), cumulative[..., :-1]), axis=-1)


def _expected_total(groups: _Groups) -> FloatArray:
    """Expected total loss of the k most confident, k = 1..n: [..., n].

    Inside a tie of m examples with loss s the first j have loss s * j / m on average.
    """
    count = groups.count.reshape(-1)
    n_before = _before(np.cumsum(groups.count, axis=-1))
    loss_before = _before(np.cumsum(groups.loss_sum, axis=-1))
    n = int(groups.count.sum(axis=-1).flat[0])
    group = np.repeat(np.arange(count.size), count)
    rank = np.tile(np.arange(1, n + 1), count.size // groups.threshold.size)
    within = rank - n_before.reshape(-1)[group]
    total = groups.loss_sum.reshape(-1)[group] * within / count[group]
    total += loss_before.reshape(-1)[group]
    return total.reshape(*groups.count.shape[:-1], n)


def _risks(groups: _Groups) -> FloatArray:
    """e_k for k = 1..n: [..., n]."""
    total = _expected_total(groups)
    return total / np.arange(1, total.shape[-1] + 1)


# --- The curve ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RiskCoverageCurve:
    """One point per distinct confidence, from the most to the least confident; arrays [points].

    Attributes:
        coverage: share of the examples with confidence >= threshold; the last one is 1.
        risk: their mean loss (selective risk).
        threshold: the distinct confidences, descending.
        n_accepted: number of the examples with confidence >= threshold.
        loss_sum: their total loss; the number of errors where the loss is 0/1.
    """

    coverage: FloatArray
    risk: FloatArray
    threshold: FloatArray
    n_accepted: IntArray
    loss_sum: FloatArray


def risk_coverage_curve(confidence: ArrayLike, loss: ArrayLike) -> RiskCoverageCurve:
    """Risk-coverage curve at every distinct confidence (El-Yaniv & Wiener 2010).

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.

    Raises:
        ValueError: input empty, NaN or of different shapes; loss negative or infinite. All
            functions below that take these two arguments raise the same.
    """
    groups = _group(_loss_sample(confidence, loss))
    n_accepted, loss_sum = np.cumsum(groups.count), np.cumsum(groups.loss_sum)
    return RiskCoverageCurve(
        coverage=n_accepted / n_accepted[-1],
        risk=loss_sum / n_accepted,
        threshold=groups.threshold,
        n_accepted=n_accepted,
        loss_sum=loss_sum,
    )


@overload
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: float) -> float: ...
@overload
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: ArrayLike) -> Any: ...
def selective_risk(confidence: ArrayLike, loss: ArrayLike, *, coverage: ArrayLike) -> Any:
    """Mean loss e_k of the k = ceil(n * coverage) most confident examples.

    This imposes the coverage on the ranking at hand, as published tables do. `deployed` gives what
    a threshold chosen elsewhere really does.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        coverage: one coverage in (0, 1], or an array of them.

    Returns:
        A float, or an array of the shape of `coverage`.

    Raises:
        ValueError: also where a coverage lies outside (0, 1].
    """
    risk = _selective_risk(_loss_sample(confidence, loss), coverage=coverage)
    return float(risk) if np.ndim(coverage) == 0 else risk


def _selective_risk(sample: _Sample, *, coverage: ArrayLike) -> FloatArray:
    rank = _rank(coverage, sample.loss.size)
    return _risks(_group(sample))[..., rank - 1]


def coverage_at_risk(confidence: ArrayLike, loss: ArrayLike, *, risk: float) -> float:
    """Largest coverage k/n with selective risk e_k <= risk; 0 where there is none.

    The curve need not be monotone: a larger coverage may meet a risk that a smaller one misses.
    Computed on the data at hand, so no promise about new data: see `sync_jax.guarantees`.

    Raises:
        ValueError: also where risk is negative or NaN.
    """
    return float(_coverage_at_risk(_loss_sample(confidence, loss), risk=risk))


def _coverage_at_risk(sample: _Sample, *, risk: float) -> FloatArray:
    if not risk >= 0:
        raise ValueError(f"risk must be non-negative, got {risk}")
    # A mean of equal losses may round to just above them; no 0/1 risk lies that close to another.
    met = _risks(_group(sample)) <= risk * (1 + 1e-12)
    n = met.shape[-1]
    return np.where(met.any(axis=-1), n - np.argmax(met[..., ::-1], axis=-1), 0) / n


# --- Areas ----------------------------------------------------------------------------------------


def aurc(confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean") -> float:
    """Area under the risk-coverage curve; lower is better.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        convention: peers differ, so name it beside the number.
            "mean": mean of e_k over k = 1..n (Geifman, Uziel & El-Yaniv 2019).
            "fd_shifts": trapezoid through the points at distinct confidences, extended flat to
                coverage 0, as IML-DKFZ/fd-shifts computes it (which displays it times 1000).
            "torch_uncertainty": trapezoid of e_k over [1/n, 1], divided by 1 - 1/n, as
                torch-uncertainty computes it. Its value depends on the order of ties; here it is
                the expected one. Needs n >= 2.

    Raises:
        ValueError: also for an unknown convention, and n = 1 with "torch_uncertainty".
    """
    return float(_aurc(_loss_sample(confidence, loss), convention=convention))


def _aurc(sample: _Sample, *, convention: Convention = "mean") -> FloatArray:
    groups = _group(sample)
    if convention == "fd_shifts":
        return _trapezoid_over_groups(groups)
    risk = _risks(groups)
    if convention == "mean":
        return risk.mean(axis=-1)
    if convention == "torch_uncertainty":
        n = risk.shape[-1]
        if n < 2:
            raise ValueError("confidence needs two examples in convention 'torch_uncertainty'")
        return (risk.sum(axis=-1) - (risk[..., 0] + risk[..., -1]) / 2) / (n - 1)
    raise ValueError(f"convention {convention!r} is none of mean, fd_shifts, torch_uncertainty")


def _trapezoid_over_groups(groups: _Groups) -> FloatArray:
    n_accepted, loss_sum = np.cumsum(groups.count, axis=-1), np.cumsum(groups.loss_sum, axis=-1)
    # A resample may leave groups empty. Those before its first example have no risk yet; they
    # have no width either, so any finite number does.
    risk = loss_sum / np.maximum(n_accepted, 1)
    risk_before = np.where(_before(n_accepted) > 0, _before(risk), risk)
    return (groups.count * (risk + risk_before) / 2).sum(axis=-1) / n_accepted[..., -1]


def excess_aurc(
    confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean"
) -> float:
    """AURC minus that of the best ranking of the same losses: E-AURC (Geifman et al. 2019).

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        convention: "mean": the best ranking is that of these n examples, so the result is 0 for a
            perfect ranking and never below it. "fd_shifts": as that package does, the limit for
            large n, r + (1 - r) ln(1 - r) with r the mean loss, where the loss is 0/1, and the
            sorted losses otherwise; it can be negative. torch-uncertainty defines none.

    Raises:
        ValueError: also for a convention that defines no excess.
    """
    return float(_excess_aurc(_loss_sample(confidence, loss), convention=convention))


def _excess_aurc(sample: _Sample, *, convention: Convention = "mean") -> FloatArray:
    if convention not in ("mean", "fd_shifts"):
        raise ValueError(f"convention {convention!r} defines no excess AURC: mean or fd_shifts")
    area = _aurc(sample, convention=convention)
    best = _risks(_group(sample.best()))
    if convention == "mean":
        return area - best.mean(axis=-1)
    if _is_binary(sample.loss):
        risk = best[..., -1]
        return area - (risk + xlogy(1 - risk, 1 - risk))
    n = best.shape[-1]
    return area - (best.sum(axis=-1) + (best[..., 0] - best[..., -1]) / 2) / n


def normalised_aurc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Excess AURC over that of a random ranking: 0 is perfect, 1 is random, NaN where they agree.

    NAURC of Cattelan & Silva 2023, (AURC - best) / (risk at full coverage - best), in the
    convention "mean", where a random ranking's expected AURC is exactly the full-coverage risk.
    """
    return float(_normalised_aurc(_loss_sample(confidence, loss)))


def _normalised_aurc(sample: _Sample) -> FloatArray:
    best_risks = _risks(_group(sample.best()))
    best, random = best_risks.mean(axis=-1), best_risks[..., -1]
    # Equal losses leave no room but rounding between the best ranking and a random one.
    room = np.where(random - best > 1e-12 * random, random - best, 0.0)
    return _ratio(_aurc(sample) - best, room)


def _ratio(numerator: Any, denominator: Any) -> FloatArray:
    """Quotient, NaN where the denominator is 0."""
    result = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=result, where=np.asarray(denominator) != 0)


def augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve, e_k * k/n over k/n (Traub et al. 2024).

    The trapezoid from the origin, as in fd-shifts (unscaled). For accuracy a it is exactly
    (1 - failure AUROC) a (1 - a) + (1 - a)^2 / 2: the chance that a random example is accepted at
    a random coverage and wrong.
    """
    return float(_augrc(_loss_sample(confidence, loss)))


def _augrc(sample: _Sample) -> FloatArray:
    total = _expected_total(_group(sample))
    # Linear inside ties, so the trapezoid over ranks is that over distinct confidences.
    return (total.sum(axis=-1) - total[..., -1] / 2) / total.shape[-1] ** 2


def excess_augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """AUGRC minus that of the best ranking of the same losses (r^2/2 for a 0/1 loss of mean r)."""
    return float(_excess_augrc(_loss_sample(confidence, loss)))


def _excess_augrc(sample: _Sample) -> FloatArray:
    return _augrc(sample) - _augrc(sample.best())


# --- Failure detection ----------------------------------------------------------------------------


def failure_auroc(confidence: ArrayLike, correct: ArrayLike) -> float:
    """Chance that a correct example is more confident than a wrong one, ties counting half.

    Args:
        confidence: [n], higher = more confident.
        correct: [n], 1 where the prediction is right, 0 where it is wrong.

    Returns:
        The AUROC of telling correct from wrong; NaN unless both occur.

    Raises:
        ValueError: input empty, NaN or of different shapes; correct not 0/1.
    """
    return float(_failure_auroc(_correct_sample(confidence, correct)))


def _failure_auroc(sample: _Sample) -> FloatArray:
    groups = _group(sample)
    right, wrong = groups.loss_sum, groups.count - groups.loss_sum
    n_right, n_wrong = right.sum(axis=-1), wrong.sum(axis=-1)
    wrong_below = n_wrong[..., None] - np.cumsum(wrong, axis=-1)
    return _ratio((right * (wrong_below + wrong / 2)).sum(axis=-1), n_right * n_wrong)


def fpr_at_tpr(confidence: ArrayLike, correct: ArrayLike, *, tpr: float = 0.95) -> float:
    """Share of the wrong examples accepted where at least `tpr` of the correct ones are.

    The positive class is "correct". The threshold is the largest confidence that accepts the share
    `tpr` of the positives, ties accepted together; no interpolation.

    Returns:
        The false positive rate in [0, 1]; NaN unless correct and wrong examples both occur.

    Raises:
        ValueError: as `failure_auroc`, and tpr outside (0, 1].
    """
    return float(_fpr_at_tpr(_correct_sample(confidence, correct), tpr=tpr))


def _fpr_at_tpr(sample: _Sample, *, tpr: float = 0.95) -> FloatArray:
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr must lie in (0, 1], got {tpr}")
    groups = _group(sample)
    right = np.cumsum(groups.loss_sum, axis=-1)
    wrong = np.cumsum(groups.count - groups.loss_sum, axis=-1)
    enough = right >= _ceil(tpr * right[..., -1:])
    accepted = np.take_along_axis(wrong, np.argmax(enough, axis=-1)[..., None], axis=-1)[..., 0]
    return np.where(right[..., -1] > 0, _ratio(accepted, wrong[..., -1]), np.nan)


# --- Thresholds -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deployed:
    """What a fixed threshold gives on a split.

    Attributes:
        threshold: confidence >= threshold is accepted; None accepts nothing.
        coverage: share accepted.
        risk: mean loss of the accepted; NaN where nothing is accepted.
        n: number of examples.
        n_accepted: number accepted.
        n_errors: number accepted with a loss above 0: the errors, where the loss is 0/1.
        loss_sum: total loss of the accepted.
    """

    threshold: float | None
    coverage: float
    risk: float
    n: int
    n_accepted: int
    n_errors: int
    loss_sum: float


def deployed(confidence: ArrayLike, loss: ArrayLike, *, threshold: float | None) -> Deployed:
    """Coverage and risk of accepting confidence >= threshold, chosen on other data.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        threshold: may be infinite; None (an infeasible certificate's) accepts nothing.

    Raises:
        ValueError: also where threshold is NaN.
    """
    sample = _loss_sample(confidence, loss)
    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold is NaN")
    confidence, losses = sample.confidence, sample.loss
    accepted = losses[:0] if threshold is None else losses[confidence >= threshold]
    accepted = np.sort(accepted)  # a float sum depends on its order; the result must not
    total = float(accepted.sum())
    return Deployed(
        threshold=None if threshold is None else float(threshold),
        coverage=accepted.size / losses.size,
        risk=total / accepted.size if accepted.size else float("nan"),
        n=losses.size,
        n_accepted=accepted.size,
        n_errors=int(np.count_nonzero(accepted)),
        loss_sum=total,
    )


def threshold_for_coverage(confidence: ArrayLike, *, coverage: float) -> float:
    """Largest threshold that accepts at least this coverage, ties accepted together.

    Choose it on the calibration split and apply it with `deployed` to another.

    Raises:
        ValueError: confidence empty or NaN; coverage outside (0, 1].
    """
    confidence = _vector(confidence, "confidence")
    index = confidence.size - int(_rank(coverage, confidence.size))
    return float(np.partition(confidence, index)[index])


@dataclasses.dataclass(frozen=True, eq=False)
class ThresholdTable:
    """Counts per threshold, arrays [thresholds]; accepted means confidence >= threshold.

    Attributes:
        threshold: the thresholds, as given, or every distinct confidence, descending.
        n_accepted: accepted examples.
        n_errors: accepted and wrong (missed by the selection).
        n_rejected: rejected examples.
        n_rejected_errors: rejected and wrong (caught by the selection).
        coverage: n_accepted / n.
        risk: n_errors / n_accepted; NaN where nothing is accepted.
    """

    threshold: FloatArray
    n_accepted: IntArray
    n_errors: IntArray
    n_rejected: IntArray
    n_rejected_errors: IntArray
    coverage: FloatArray
    risk: FloatArray


def threshold_table(
    confidence: ArrayLike, loss: ArrayLike, *, thresholds: ArrayLike | None = None
) -> ThresholdTable:
    """Integer counts for each threshold.

    Args:
        confidence: [n], higher = more confident.
        loss: [n], 0/1.
        thresholds: [thresholds] in any order; None takes every distinct confidence.

    Raises:
        ValueError: also where loss is not 0/1, and thresholds empty, NaN or not a vector.
    """
    sample = _loss_sample(confidence, loss)
    if not _is_binary(sample.loss):
        raise ValueError("loss must be 0/1 for a table of counts")
    curve = risk_coverage_curve(confidence, loss)
    threshold = curve.threshold if thresholds is None else _vector(thresholds, "thresholds")
    # How many of the distinct confidences, which descend, are >= each threshold.
    points = np.searchsorted(-curve.threshold, -threshold, side="right")
    n_accepted = np.concatenate(([0], curve.n_accepted))[points]
    errors = np.concatenate(([0], curve.loss_sum.astype(np.int64)))
    return ThresholdTable(
        threshold=threshold,
        n_accepted=n_accepted,
        n_errors=errors[points],
        n_rejected=sample.loss.size - n_accepted,
        n_rejected_errors=errors[-1] - errors[points],
        coverage=n_accepted / sample.loss.size,
        risk=_ratio(errors[points], n_accepted),
    )


# --- Probabilities --------------------------------------------------------------------------------


def _probability_pair(probabilities: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    try:
        p = np.asarray(probabilities, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("probabilities must be an array of real numbers") from error
    y = np.asarray(labels)
    if p.ndim != 2 or p.size == 0:
        raise ValueError(f"probabilities must have shape [n, classes], not empty, got {p.shape}")
    if not ((p >= 0) & (p <= 1)).all() or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
        raise ValueError("probabilities must lie in [0, 1], each row summing to 1, without NaN")
    if y.shape != p.shape[:1]:
        raise ValueError(f"labels has shape {y.shape} but probabilities {p.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= p.shape[1]:
        raise ValueError(f"labels must be integers in [0, {p.shape[1]})")
    return p, y.astype(np.int64)


def accuracy(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Share of the examples whose most probable class (the first, in a tie) is the label.

    Args:
        probabilities: [n, classes], rows summing to 1.
        labels: [n], integers in [0, classes).

    Raises:
        ValueError: shapes differ; probabilities empty, NaN or no probabilities; labels out of
            range. The functions below raise the same.
    """
    p, y = _probability_pair(probabilities, labels)
    return float((p.argmax(axis=1) == y).mean())


def negative_log_likelihood(
    probabilities: ArrayLike, labels: ArrayLike, *, floor: float = 0.0
) -> float:
    """Mean of -ln(probability of the label), in nats.

    Args:
        probabilities: [n, classes], rows summing to 1. Take the softmax in float64: in float32 a
            confident mistake has probability 0.
        labels: [n], integers in [0, classes).
        floor: smaller probabilities count as this one. At 0 a probability of 0 gives infinity.
    """
    p, y = _probability_pair(probabilities, labels)
    if not 0 <= floor <= 1:
        raise ValueError(f"floor must lie in [0, 1], got {floor}")
    label_p = np.maximum(p[np.arange(y.size), y], floor)
    with np.errstate(divide="ignore"):
        return float(-np.log(label_p).mean())


def brier(probabilities: ArrayLike, labels: ArrayLike) -> float:
    """Mean squared distance to the one-hot label, summed over classes: in [0, 2] (Brier 1950)."""
    p, y = _probability_pair(probabilities, labels)
    return float(((p**2).sum(axis=1) - 2 * p[np.arange(y.size), y] + 1).mean())


@dataclasses.dataclass(frozen=True, eq=False)
class CalibrationError:
    """Expected calibration error with the convention that it was computed in.

    Attributes:
        value: mean over examples of |accuracy - confidence| of their bin.
        binning: "width" or "mass".
        bins: how many bins were asked for.
        confidence: mean confidence of each bin that is not empty, ascending.
        accuracy: accuracy of each of these bins.
        count: examples in each of these bins.
    """

    value: float
    binning: str
    bins: int
    confidence: FloatArray
    accuracy: FloatArray
    count: IntArray


def expected_calibration_error(
    probabilities: ArrayLike,
    labels: ArrayLike,
    *,
    binning: Literal["width", "mass"] = "width",
    bins: int = 15,
) -> CalibrationError:
    """Top-label expected calibration error.

    Args:
        probabilities: [n, classes], rows summing to 1.
        labels: [n], integers in [0, classes).
        binning: "width": bins of equal width on (0, 1], closed on the right (Guo et al. 2017).
            "mass": bins of equal size, up to one example (Nixon et al. 2019); a tie cut by a bin's
            edge counts with its mean accuracy on both sides.
        bins: number of bins.

    Raises:
        ValueError: also where binning is unknown or bins below 1.
    """
    p, y = _probability_pair(probabilities, labels)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence, correct = p.max(axis=1), (p.argmax(axis=1) == y).astype(np.float64)
    n = confidence.size
    order = np.sort(-confidence)  # descending confidence
    if binning == "width":
        edges = np.linspace(0, 1, bins + 1)[1:-1]
        ends = n - np.searchsorted(-order[::-1], edges, side="right")[::-1]
    elif binning == "mass":
        ends = np.arange(1, bins) * n // bins
    else:
        raise ValueError(f"binning {binning!r} is neither 'width' nor 'mass'")
    ends = np.unique(np.concatenate(([0], ends, [n])))  # what occurs twice is an empty bin
    count = np.diff(ends)
    correct_sum = np.diff(
        np.append(0.0, _expected_total(_group(_Sample(confidence, correct))))[ends]
    )
    confidence_sum = np.add.reduceat(-order, ends[:-1])
    return CalibrationError(
        value=float(np.abs(correct_sum - confidence_sum).sum() / n),
        binning=binning,
        bins=bins,
        confidence=(confidence_sum / count)[::-1],
        accuracy=(correct_sum / count)[::-1],
        count=count[::-1],
    )


# --- Bootstrap ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile bootstrap interval.

    Attributes:
        estimate: the value on the data themselves.
        lower: lower end; NaN where every resample is undefined.
        upper: upper end.
        level: nominal coverage of the interval.
        resamples: how many resamples were drawn.
        undefined: how many of them had no value (NaN) and were left out.
    """

    estimate: float
    lower: float
    upper: float
    level: float
    resamples: int
    undefined: int


_COUNTED: dict[Callable[..., Any], Callable[..., FloatArray]] = {
    selective_risk: _selective_risk,
    coverage_at_risk: _coverage_at_risk,
    aurc: _aurc,
    excess_aurc: _excess_aurc,
    normalised_aurc: _normalised_aurc,
    augrc: _augrc,
    excess_augrc: _excess_augrc,
    failure_auroc: _failure_auroc,
    fpr_at_tpr: _fpr_at_tpr,
}


def bootstrap_interval(
    metric: Callable[..., float],
    confidence: ArrayLike,
    loss: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Interval:
    """Percentile interval of a metric over resampled examples (Efron & Tibshirani 1993, ch. 13).

    It answers for the draw of these n examples, not for that of the training run.

    Args:
        metric: a function of this module on (confidence, loss) or (confidence, correct), which is
            evaluated on many resamples at once, or any other `metric(confidence, loss, **options)`
            that returns a float, which is called once per resample.
        confidence: [n], higher = more confident.
        loss: [n], or `correct` for a metric that takes it.
        level: nominal coverage in (0, 1).
        resamples: number of resamples of n examples.
        seed: of the resampling; same seed, same interval.
        **options: keyword arguments of the metric, such as coverage=0.9. One number, not an array.

    Raises:
        ValueError: what the metric raises; level outside (0, 1); resamples below 1.
    """
    estimate = float(metric(confidence, loss, **options))
    confidence, loss = _vector(confidence, "confidence"), _vector(loss, "loss")
    order = np.lexsort((loss, -confidence))  # the interval, too, must not depend on the input order
    confidence, loss = confidence[order], loss[order]
    values = [
        _resampled(metric, confidence, loss, index, options)
        for index in _resampling(confidence.size, level, resamples, seed)
    ]
    return _percentiles(estimate, np.concatenate(values), level)


def paired_bootstrap_interval(
    metric: Callable[..., float],
    confidence_a: ArrayLike,
    loss_a: ArrayLike,
    confidence_b: ArrayLike,
    loss_b: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    **options: Any,
) -> Interval:
    """Interval of metric(a) - metric(b) for two methods on the same n examples.

    Both see the same resamples, so what makes an example hard for both cancels: an interval without
    0 says that the methods differ. Arguments as in `bootstrap_interval`, index by index the same
    examples in a and b.

    Raises:
        ValueError: as `bootstrap_interval`, and where a and b have different numbers of examples.
    """
    estimate = float(metric(confidence_a, loss_a, **options)) - float(
        metric(confidence_b, loss_b, **options)
    )
    confidence_a, loss_a = _vector(confidence_a, "confidence_a"), _vector(loss_a, "loss_a")
    confidence_b, loss_b = _vector(confidence_b, "confidence_b"), _vector(loss_b, "loss_b")
    if confidence_a.size != confidence_b.size:
        raise ValueError(
            f"confidence_b has {confidence_b.size} examples but confidence_a {confidence_a.size}"
        )
    order = np.lexsort((loss_b, confidence_b, loss_a, confidence_a))
    confidence_a, loss_a = confidence_a[order], loss_a[order]
    confidence_b, loss_b = confidence_b[order], loss_b[order]
    values = [
        _resampled(metric, confidence_a, loss_a, index, options)
        - _resampled(metric, confidence_b, loss_b, index, options)
        for index in _resampling(confidence_a.size, level, resamples, seed)
    ]
    return _percentiles(estimate, np.concatenate(values), level)


def _resampling(n: int, level: float, resamples: int, seed: int) -> Iterator[IntArray]:
    """Yields blocks of resamples, each [rows, n] indices into the examples."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    for done in range(0, resamples, block):
        yield rng.integers(n, size=(min(block, resamples - done), n))


def _resampled(
    metric: Callable[..., float],
    confidence: FloatArray,
    loss: FloatArray,
    index: IntArray,
    options: dict[str, Any],
) -> FloatArray:
    """The metric on each resample: [rows]."""
    if metric not in _COUNTED:
        return np.array([float(metric(confidence[i], loss[i], **options)) for i in index])
    rows, n = index.shape
    cells = (index + n * np.arange(rows)[:, None]).reshape(-1)
    counts = np.bincount(cells, minlength=rows * n).reshape(rows, n)
    return _COUNTED[metric](_Sample(confidence, loss, counts), **options)


def _percentiles(estimate: float, values: FloatArray, level: float) -> Interval:
    defined = values[~np.isnan(values)]
    lower, upper = float("nan"), float("nan")
    if defined.size:
        tail = (1 - level) / 2
        lower, upper = (float(q) for q in np.quantile(defined, [tail, 1 - tail]))
    return Interval(estimate, lower, upper, level, values.size, values.size - defined.size)
