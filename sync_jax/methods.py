"""A method is a set of heads, an objective and the score it is meant to be used with.

A new loss goes into `losses.py`; a new entry of METHODS makes it `--config.method=NAME`.
"""

import dataclasses
from collections.abc import Callable, Mapping

from jax import Array
from ml_collections import ConfigDict

from sync_jax import losses

Outputs = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method trains and selects.

    Attributes:
        heads: what the network has beside its class head: 'selection', 'auxiliary'.
        objective: (outputs, labels, mask, config) to (loss, terms), all scalars.
        score: the name in `scores.SCORES` that the method is meant to be used with.
    """

    heads: tuple[str, ...]
    objective: Callable[[Outputs, Array, Array, ConfigDict], tuple[Array, losses.Terms]]
    score: str


def _ce(
    outputs: Outputs, labels: Array, mask: Array, config: ConfigDict
) -> tuple[Array, losses.Terms]:
    del config
    return losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)


def _selectivenet(
    outputs: Outputs, labels: Array, mask: Array, config: ConfigDict
) -> tuple[Array, losses.Terms]:
    return losses.selectivenet_loss(
        outputs["logits"],
        outputs["selection_logits"],
        outputs["auxiliary_logits"],
        labels,
        target_coverage=config.target_coverage,
        coverage_weight=config.loss.coverage_weight,
        alpha=config.loss.alpha,
        mask=mask,
    )


def _sync(
    outputs: Outputs, labels: Array, mask: Array, config: ConfigDict
) -> tuple[Array, losses.Terms]:
    return losses.sync_loss(
        outputs["logits"],
        outputs["selection_logits"],
        outputs["auxiliary_logits"],
        labels,
        target_coverage=config.target_coverage,
        coverage_weight=config.loss.coverage_weight,
        alpha=config.loss.alpha,
        prior_power=config.loss.prior_power,
        prior_weight=config.loss.prior_weight,
        sync_weight=config.loss.sync_weight,
        divergence=config.loss.divergence,
        mask=mask,
    )


METHODS: dict[str, Method] = {
    # Cross-entropy and softmax response (Hendrycks & Gimpel, 2017).
    "ce": Method(heads=(), objective=_ce, score="softmax_response"),
    # SelectiveNet (Geifman & El-Yaniv, 2019).
    "selectivenet": Method(
        heads=("selection", "auxiliary"), objective=_selectivenet, score="selection"
    ),
    # SelectiveNet with the softmax response as a selective prior (arXiv 2602.11316).
    "sync": Method(heads=("selection", "auxiliary"), objective=_sync, score="selection"),
}
