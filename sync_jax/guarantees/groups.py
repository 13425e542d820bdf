"""Certificates for every group at once."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.guarantees.calibration import calibration_split, probability
from sync_jax.guarantees.certificate import Certificate, infeasible
from sync_jax.guarantees.joint_risk import conformal_risk_control


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
        ValueError: as the method, and where groups has another shape, NaN, or values not in names.
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
    share = delta / len(wanted)
    certificates: dict[Any, Certificate] = {}
    for name in present:
        member = group == name
        certificates[name] = method(
            scores[member], right[member], target_risk=target_risk, delta=share, **options
        )
    without_example = infeasible(
        certificates[present[0]].method,
        0,
        target_risk=target_risk,
        delta=share,
        reason="the group has no calibration example",
    )
    return {name: certificates.get(name, without_example) for name in wanted}
