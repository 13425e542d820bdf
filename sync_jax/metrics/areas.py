"""Areas under the risk-coverage curve: AURC, AUGRC, their excess over the best ranking."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import xlogy

from sync_jax.metrics.arrays import FloatArray, is_binary, ratio
from sync_jax.metrics.sample import (
    Groups,
    Sample,
    before,
    expected_risks,
    expected_totals,
    group_ties,
    loss_sample,
)

Convention = Literal["mean", "fd_shifts", "torch_uncertainty"]


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
    return float(aurc_of_sample(loss_sample(confidence, loss), convention=convention))


def aurc_of_sample(sample: Sample, *, convention: Convention = "mean") -> FloatArray:
    """The twin of `aurc`: [...]."""
    groups = group_ties(sample)
    if convention == "fd_shifts":
        return _trapezoid_over_groups(groups)
    risk = expected_risks(groups)
    if convention == "mean":
        return risk.mean(axis=-1)
    if convention == "torch_uncertainty":
        n = risk.shape[-1]
        if n < 2:
            raise ValueError("confidence needs two examples in convention 'torch_uncertainty'")
        return (risk.sum(axis=-1) - (risk[..., 0] + risk[..., -1]) / 2) / (n - 1)
    raise ValueError(f"convention {convention!r} is none of mean, fd_shifts, torch_uncertainty")


def _trapezoid_over_groups(groups: Groups) -> FloatArray:
    n_accepted, loss_sum = np.cumsum(groups.count, axis=-1), np.cumsum(groups.total, axis=-1)
    # A resample may leave groups empty. Those before its first example have no risk yet; they
    # have no width either, so any finite number does.
    risk = loss_sum / np.maximum(n_accepted, 1)
    risk_before = np.where(before(n_accepted) > 0, before(risk), risk)
    return (groups.count * (risk + risk_before) / 2).sum(axis=-1) / n_accepted[..., -1]


def excess_aurc(
    confidence: ArrayLike, loss: ArrayLike, *, convention: Convention = "mean"
) -> float:
    """AURC minus that of the best ranking of the same losses: E-AURC (Geifman et al. 2019).

    Args:
        confidence: [n], higher = more confident.
        loss: [n], finite and non-negative.
        convention: "mean": the best ranking is that of these n examples, so the result is 0 for a
            perfect ranking and, but for rounding, never below it. "fd_shifts": as that package does
            it, the limit for large n, r + (1 - r) ln(1 - r) with r the mean loss, where the loss is
            0/1, and the sorted losses otherwise; it can be negative. torch-uncertainty defines
            none.

    Raises:
        ValueError: also for a convention that defines no excess.
    """
    return float(excess_aurc_of_sample(loss_sample(confidence, loss), convention=convention))


def excess_aurc_of_sample(sample: Sample, *, convention: Convention = "mean") -> FloatArray:
    """The twin of `excess_aurc`: [...]."""
    if convention not in ("mean", "fd_shifts"):
        raise ValueError(f"convention {convention!r} defines no excess AURC: mean or fd_shifts")
    area = aurc_of_sample(sample, convention=convention)
    best = expected_risks(group_ties(sample.best()))
    if convention == "mean":
        return area - best.mean(axis=-1)
    if is_binary(sample.value):
        risk = best[..., -1]
        return area - (risk + xlogy(1 - risk, 1 - risk))
    n = best.shape[-1]
    return area - (best.sum(axis=-1) + (best[..., 0] - best[..., -1]) / 2) / n


def normalised_aurc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Excess AURC over that of a random ranking: 0 is perfect, 1 is random, NaN where they agree.

    NAURC of Cattelan & Silva 2023, (AURC - best) / (risk at full coverage - best), in the
    convention "mean", where a random ranking's expected AURC is exactly the full-coverage risk.
    """
    return float(normalised_aurc_of_sample(loss_sample(confidence, loss)))


def normalised_aurc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `normalised_aurc`: [...]."""
    best_risks = expected_risks(group_ties(sample.best()))
    best, random = best_risks.mean(axis=-1), best_risks[..., -1]
    # Equal losses leave no room but rounding between the best ranking and a random one.
    room = np.where(random - best > 1e-12 * random, random - best, 0.0)
    return ratio(aurc_of_sample(sample) - best, room)


def augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """Area under the generalised risk-coverage curve, e_k * k/n over k/n (Traub et al. 2024).

    The trapezoid from the origin, as in fd-shifts (unscaled). For accuracy a it is exactly
    (1 - failure AUROC) a (1 - a) + (1 - a)^2 / 2: the chance that a random example is accepted at
    a random coverage and wrong.
    """
    return float(augrc_of_sample(loss_sample(confidence, loss)))


def augrc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `augrc`: [...]."""
    total = expected_totals(group_ties(sample))
    # Linear inside ties, so the trapezoid over ranks is that over distinct confidences.
    return (total.sum(axis=-1) - total[..., -1] / 2) / total.shape[-1] ** 2


def excess_augrc(confidence: ArrayLike, loss: ArrayLike) -> float:
    """AUGRC minus that of the best ranking of the same losses (r^2/2 for a 0/1 loss of mean r)."""
    return float(excess_augrc_of_sample(loss_sample(confidence, loss)))


def excess_augrc_of_sample(sample: Sample) -> FloatArray:
    """The twin of `excess_augrc`: [...]."""
    return augrc_of_sample(sample) - augrc_of_sample(sample.best())
