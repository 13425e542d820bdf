"""A method is a set of heads, an objective and the score it is meant to be used with.

A new loss goes into `losses.py`; a new entry of METHODS makes it `--config.method=NAME`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from sync_jax import losses

Outputs = Mapping[str, Array]
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class Memory:
    """What a method remembers between steps; it lives in the train state and its checkpoints.

    Attributes:
        create: number of training examples to the memory before the first step, a tree of arrays.
        update: (memory, outputs, batch, config) to the memory after a step and what the objective
            reads of it, arrays that join the outputs. Nothing of either has a gradient.
    """

    create: Callable[[int], Any]
    update: Callable[[Any, Outputs, Batch, ConfigDict], tuple[Any, Outputs]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method trains and selects.

    Attributes:
        heads: what the network has beside its class head: 'selection', 'auxiliary', 'abstention',
            'dropout' (before the class head).
        objective: (outputs, labels, mask, config) to (loss, terms), all scalars.
        score: the name in `scores.SCORES` that the method is meant to be used with.
        memory: None for a method that keeps nothing between steps.
        warmup: share of the run that minimises the plain cross-entropy first, unless
            config.loss.warmup_epochs says otherwise.
    """

    heads: tuple[str, ...]
    objective: Callable[[Outputs, Array, Array, ConfigDict], tuple[Array, losses.Terms]]
    score: str
    memory: Memory | None = None
    warmup: float = 0.0


def training_objective(
    method: Method, config: ConfigDict, *, warmup_steps: int
) -> Callable[[Outputs, Batch, Any, Array], tuple[Array, losses.Terms, Any]]:
    """What a step minimises: the method's objective, entropy minimisation added, after a warm-up.

    Args:
        method: of METHODS.
        config: `loss.entropy_weight`, and what the method's objective reads.
        warmup_steps: so many first steps minimise the cross-entropy of the class logits instead,
            without entropy minimisation, and leave the memory as it is.

    Returns:
        (outputs, batch, memory, step) to (loss, terms, memory).
    """

    def objective(
        outputs: Outputs, batch: Batch, memory: Any, step: Array
    ) -> tuple[Array, losses.Terms, Any]:
        labels, mask = batch["label"], batch["mask"]
        after = memory
        if method.memory is not None:
            constant = jax.lax.stop_gradient(outputs)
            after, remembered = method.memory.update(memory, constant, batch, config)
            outputs = {**outputs, **remembered}
        loss, terms = method.objective(outputs, labels, mask, config)
        if config.loss.entropy_weight:
            entropy = losses.masked_mean(losses.entropy(outputs["logits"]), mask)
            loss, terms = loss + config.loss.entropy_weight * entropy, {**terms, "entropy": entropy}
        if warmup_steps:
            warming = step < warmup_steps
            plain, plain_terms = losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)
            loss, terms = jnp.where(warming, plain, loss), {**plain_terms, **terms}
            after = jax.tree.map(lambda old, new: jnp.where(warming, old, new), memory, after)
        return loss, terms, after

    return objective


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


def _deep_gamblers(
    outputs: Outputs, labels: Array, mask: Array, config: ConfigDict
) -> tuple[Array, losses.Terms]:
    per_example = losses.deep_gamblers_loss(
        outputs["logits"], outputs["abstention_logits"], labels, payoff=config.loss.payoff
    )
    loss = losses.masked_mean(per_example, mask)
    return loss, {"gambler_loss": loss}


def _self_adaptive(
    outputs: Outputs, labels: Array, mask: Array, config: ConfigDict
) -> tuple[Array, losses.Terms]:
    del config
    per_example = losses.self_adaptive_loss(
        outputs["logits"], outputs["abstention_logits"], labels, outputs["targets"]
    )
    loss = losses.masked_mean(per_example, mask)
    return loss, {
        "self_adaptive_loss": loss,
        "mean_target": losses.masked_mean(outputs["targets"], mask),
    }


def _update_target_table(
    table: Array, outputs: Outputs, batch: Batch, config: ConfigDict
) -> tuple[Array, Outputs]:
    """The table `[training examples]` after a step, and the batch's new targets.

    A batch that straddles two epochs can hold an example twice; its entry becomes the mean of the
    two updates, which depends on no order. The loss reads the target after the update, as the
    authors' code does.
    """
    index, mask = batch["index"], batch["mask"]
    targets = losses.update_targets(
        table[index], outputs["logits"], batch["label"], momentum=config.loss.target_momentum
    )
    visits = jnp.zeros_like(table).at[index].add(mask)
    sums = jnp.zeros_like(table).at[index].add(jnp.where(mask > 0, targets, 0.0))
    table = jnp.where(visits > 0, sums / jnp.maximum(visits, 1.0), table)
    return table, {"targets": targets}


METHODS: dict[str, Method] = {
    # Cross-entropy and softmax response (Hendrycks & Gimpel, 2017).
    "ce": Method(heads=(), objective=_ce, score="softmax_response"),
    # MC-dropout (Gal & Ghahramani, 2016), on the features before the class head, as SelectiveNet's
    # authors compare with. Their score is minus the mean variance of the probabilities; here it is
    # the softmax response of their mean, beside predictive entropy and mutual information.
    "mc_dropout": Method(heads=("dropout",), objective=_ce, score="softmax_response"),
    # SelectiveNet (Geifman & El-Yaniv, 2019).
    "selectivenet": Method(
        heads=("selection", "auxiliary"), objective=_selectivenet, score="selection"
    ),
    # SelectiveNet with the softmax response as a selective prior (arXiv 2602.11316).
    "sync": Method(heads=("selection", "auxiliary"), objective=_sync, score="selection"),
    # Deep Gamblers (Liu et al., 2019). The warm-up is the authors' for a payoff such as 2.2, 100 of
    # 300 epochs; without one the network abstains before it has learnt all classes (seen: half of
    # Fashion-MNIST's stay unknown).
    "deep_gamblers": Method(
        heads=("abstention",), objective=_deep_gamblers, score="abstention", warmup=1 / 3
    ),
    # Self-adaptive training (Huang et al., 2020): the labels believed as far as the network does.
    "self_adaptive": Method(
        heads=("abstention",),
        objective=_self_adaptive,
        score="abstention",
        memory=Memory(
            create=lambda train_size: jnp.ones(train_size, jnp.float32),
            update=_update_target_table,
        ),
    ),
}
