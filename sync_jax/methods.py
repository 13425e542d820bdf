"""Methods: each has heads, an objective, hyperparameters and the score it is meant to be used with.

A new loss goes into `losses.py`, and a new entry of METHODS makes it `--config.method=NAME`. A
method in a package of your own is `--config.method=package.module:NAME`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from sync_jax import losses
from sync_jax.errors import InputError
from sync_jax.options import Option

Outputs = Mapping[str, Array]
Batch = Mapping[str, Array]
Loss = tuple[Array, losses.Terms]  # a scalar, and its terms by name


class Trained(NamedTuple):
    """The network in training, for a method that runs it with other parameters too."""

    params: Any  # before the step, as constants
    forward: Callable[[Any], dict[str, Array]]  # from parameters to the batch's outputs


@dataclasses.dataclass(frozen=True)
class Memory:
    """The state that a method keeps between steps, in the train state and its checkpoints.

    `update` also returns arrays for the objective, which join the outputs; none has a gradient.
    """

    create: Callable[[Any, int, ConfigDict], Any]  # of parameters, number of examples, config
    update: Callable[[Any, Outputs, Batch, ConfigDict, Trained], tuple[Any, Outputs]]


@dataclasses.dataclass(frozen=True)
class Method:
    """How one method trains and selects.

    `heads` come beside the class head: 'selection', 'auxiliary', 'abstention', 'dropout' (before
    the class head), 'features' (as an output of training). The objective maps (outputs, labels,
    mask, config) to (loss, terms), all scalars.
    """

    heads: tuple[str, ...]
    objective: Callable[[Outputs, Array, Array, ConfigDict], Loss]
    score: str  # the method's own, a name in `scores.SCORES` or 'package.module:NAME'
    hyperparameters: Mapping[str, Option] = dataclasses.field(
        default_factory=dict
    )  # of config.loss
    memory: Memory | None = None  # None: nothing is kept between steps
    warmup: float = 0.0  # share of the run that minimises the plain cross-entropy first
    # Of config and number of classes; raises InputError where they do not go together.
    check: Callable[[ConfigDict, int], None] | None = None


def training_objective(
    method: Method, config: ConfigDict, *, train_size: int, warmup_steps: int
) -> Callable[[Outputs, Batch, Any, Array, Trained], tuple[Array, losses.Terms, Any]]:
    """Makes the function that a step minimises: the method's objective after a warm-up.

    The first `warmup_steps` minimise the cross-entropy of the class logits alone, and leave the
    memory as it is created from their parameters for `train_size` examples. Afterwards
    config.loss.entropy_weight times the entropy is added to the method's objective.

    Returns:
        (outputs, batch, memory, step, trained) to (loss, terms, memory).
    """

    def objective(
        outputs: Outputs, batch: Batch, memory: Any, step: Array, trained: Trained
    ) -> tuple[Array, losses.Terms, Any]:
        labels, mask = batch["label"], batch["mask"]
        after = memory
        if method.memory is not None:
            constant = jax.lax.stop_gradient(outputs)
            after, remembered = method.memory.update(memory, constant, batch, config, trained)
            outputs = {**outputs, **remembered}
        loss, terms = method.objective(outputs, labels, mask, config)
        if config.loss.entropy_weight:
            entropy = losses.masked_mean(losses.entropy(outputs["logits"]), mask)
            loss, terms = loss + config.loss.entropy_weight * entropy, {**terms, "entropy": entropy}
        if warmup_steps:
            warming = step < warmup_steps
            plain, plain_terms = losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)
            loss, terms = jnp.where(warming, plain, loss), {**plain_terms, **terms}
            if method.memory is not None:
                fresh = method.memory.create(trained.params, train_size, config)
                after = jax.tree.map(lambda new, old: jnp.where(warming, new, old), fresh, after)
        return loss, terms, after

    return objective


def _ce(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """Cross-entropy: mean(-log p_y). Softmax response selects (Hendrycks & Gimpel, 2017).

    Label smoothing and the normalisation of logits are in `losses.cross_entropy_loss`. Both are of
    training alone, as in their papers; scores read the logits as they are.
    """
    return losses.cross_entropy_loss(outputs["logits"], labels, mask=mask, **_own(config, "ce"))


def _aurc(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """AURC as the loss (Zhou et al., 2025): `losses.aurc_loss`.

    Their harmonic weights, by the rank of the softmax response. They train a network further that
    cross-entropy has trained, which the warm-up stands for.
    """
    del config
    return losses.aurc_loss(outputs["logits"], labels, mask=mask)


def _own(config: ConfigDict, name: str, *without: str) -> dict[str, Any]:
    """The hyperparameters of a method of ours, but for some."""
    names = METHODS[name].hyperparameters.keys() - {*without}
    return {key: config.loss[key] for key in names}


def _mc_dropout(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """MC-dropout (Gal & Ghahramani, 2016): cross-entropy with dropout on the class head's features.

    SelectiveNet's authors have it there too. Evaluation averages the probabilities of samples that
    drop the same features of every example, so that results do not depend on the batch size. Their
    score is minus the samples' mean variance; ours is the softmax response of the mean.
    """
    del config
    return losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)


def _selectivenet(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """SelectiveNet (Geifman & El-Yaniv, 2019): `losses.selectivenet_loss`.

    The paper's risk; its code divides by the batch size instead of by the coverage. The selection
    head is its code's, but for a bias that starts at the target (`models.heads.SelectionHead`).
    """
    return losses.selectivenet_loss(
        *_three_heads(outputs),
        labels,
        target_coverage=config.target_coverage,
        mask=mask,
        **_own(config, "selectivenet"),
    )


def _sync(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """SelectiveNet with the softmax response as a selective prior: `losses.sync_loss`.

    A family of readings of the abstract of arXiv 2602.11316, whose equation and code are not
    public. With `views=2` the step runs the network, as a constant, on a second augmentation.
    """
    return losses.sync_loss(
        *_three_heads(outputs),
        labels,
        target_coverage=config.target_coverage,
        second_logits=outputs.get("second_logits"),
        average_response=outputs.get("average_response"),
        earlier_responses=outputs.get("earlier_responses"),
        held_out=outputs.get("held_out"),
        mask=mask,
        **_own(config, "sync", *_NOT_THE_LOSS),
    )


def _check_sync(config: ConfigDict, num_classes: int) -> None:
    del num_classes
    if config.loss.prior_source == "agreement" and config.loss.views < 2:
        raise InputError(
            "config.loss.prior_source='agreement' compares two augmentations; set "
            "config.loss.views=2"
        )
    if config.loss.rank_window and config.loss.prior_source != "class_head":
        raise InputError(
            "config.loss.rank_window keeps softmax responses of the class head; use "
            "config.loss.prior_source='class_head'"
        )


def _create_responses(params: Any, train_size: int, config: ConfigDict) -> Any:
    """The confidences that a member of the family keeps, by name; {} for most.

    'average' is a mean per training example, below 0 before its first visit; 'earlier' are those of
    the last batches, below 0 where there was none; 'held_out' examples teach g alone.
    """
    del params
    kept = {}
    if config.loss.prior_source == "average":
        kept["average"] = jnp.full(train_size, -1.0, jnp.float32)
    if config.loss.rank_window:
        kept["earlier"] = jnp.full(config.loss.rank_window, -1.0, jnp.float32)
    if config.loss.evidence_share:
        draws = jax.random.uniform(jax.random.key(0), (train_size,))
        kept["held_out"] = draws < config.loss.evidence_share
    return kept


def _update_responses(
    memory: Any, outputs: Outputs, batch: Batch, config: ConfigDict, trained: Trained
) -> tuple[Any, Outputs]:
    """Exponential moving averages that begin with the first value; the last batches' responses."""
    del trained
    after, remembered = {}, {}
    now = losses.softmax_response_prior(outputs["logits"], power=1.0)
    if "average" in memory:
        before = memory["average"][batch["index"]]
        momentum = jnp.where(before < 0, 0.0, config.loss.prior_momentum)
        average = momentum * before + (1.0 - momentum) * now
        after["average"] = visited(memory["average"], batch, average)
        remembered["average_response"] = average
    if "earlier" in memory:
        newest = jnp.where(batch["mask"] > 0, now, -1.0)
        after["earlier"] = jnp.concatenate([memory["earlier"], newest])[-config.loss.rank_window :]
        remembered["earlier_responses"] = memory["earlier"]
    if "held_out" in memory:
        after["held_out"] = memory["held_out"]
        remembered["held_out"] = memory["held_out"][batch["index"]]
    return after, remembered


def _three_heads(outputs: Outputs) -> tuple[Array, Array, Array]:
    return outputs["logits"], outputs["selection_logits"], outputs["auxiliary_logits"]


def _deep_gamblers(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """Deep Gamblers (Liu et al., 2019): `losses.deep_gamblers_loss`.

    In log space, where their code takes the logarithm of a sum of probabilities. The warm-up is
    theirs for a payoff such as 2.2, 100 of 300 epochs; without one the network abstains before it
    has learnt all classes (seen: half of Fashion-MNIST's stay unknown).
    """
    per_example = losses.deep_gamblers_loss(
        outputs["logits"], outputs["abstention_logits"], labels, payoff=config.loss.payoff
    )
    loss = losses.masked_mean(per_example, mask)
    return loss, {"gambler_loss": loss}


def _self_adaptive(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """Self-adaptive training (Huang et al., 2020): `losses.self_adaptive_loss`.

    Their code keeps a target per class; the loss reads the label's only, and ours keeps that one.
    Theirs warms up for 0 to 150 epochs, by repository; ours for none unless told to.
    """
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
    table: Array, outputs: Outputs, batch: Batch, config: ConfigDict, trained: Trained
) -> tuple[Array, Outputs]:
    """The table `[training examples]` after a step, and the batch's new targets.

    The loss reads the target after the update, as the authors' code does.
    """
    del trained
    targets = losses.update_targets(
        table[batch["index"]],
        outputs["logits"],
        batch["label"],
        momentum=config.loss.target_momentum,
    )
    return visited(table, batch, targets), {"targets": targets}


def visited(table: Array, batch: Batch, values: Array) -> Array:
    """A table `[training examples]` with new values for a batch's real examples.

    A batch that straddles two epochs can hold an example twice; its entry becomes the mean of the
    two values, which depends on no order.
    """
    index, mask = batch["index"], batch["mask"]
    visits = jnp.zeros_like(table).at[index].add(mask)
    sums = jnp.zeros_like(table).at[index].add(jnp.where(mask > 0, values, 0.0))
    return jnp.where(visits > 0, sums / jnp.maximum(visits, 1.0), table)


def _ccl_sc(outputs: Outputs, labels: Array, mask: Array, config: ConfigDict) -> Loss:
    """CCL-SC (Wu et al., 2024): cross-entropy and `losses.contrastive_loss`.

    Features meet the keys that a momentum encoder made of earlier batches.
    Their code, once its queues are full, returns before it enqueues, so that they stand still,
    and moves the encoder once an epoch; ours move at every step, as in MoCo (He et al., 2020),
    where they come from. It waits for full queues; we use the places that are filled, for a short
    run never makes thousands of errors. The warm-up is theirs, 150 of 300 epochs.
    """
    plain, terms = losses.cross_entropy_loss(outputs["logits"], labels, mask=mask)
    queues = ("correct_keys", "correct_classes", "error_keys", "error_classes")
    per_example = losses.contrastive_loss(
        outputs["features"],
        outputs["logits"],
        labels,
        temperature=config.loss.contrast_temperature,
        **{name: outputs[name] for name in queues},
    )
    contrastive = losses.masked_mean(per_example, mask)
    terms = terms | {"contrastive_loss": contrastive}
    return plain + config.loss.contrast_weight * contrastive, terms


def _create_queues(params: Any, train_size: int, config: ConfigDict) -> Any:
    """The momentum encoder, the network itself until the warm-up is over, and two empty queues."""
    del train_size
    units, size = params["class_head"]["kernel"].shape[0], config.loss.queue_size
    empty = {
        "keys": jnp.zeros((size, units), jnp.float32),
        "classes": jnp.full(size, -1, jnp.int32),
        "next": jnp.zeros((), jnp.int32),  # the place of the next key
    }
    return {"encoder": params, "correct": empty, "error": empty}


def _update_queues(
    memory: Any, outputs: Outputs, batch: Batch, config: ConfigDict, trained: Trained
) -> tuple[Any, Outputs]:
    """The momentum encoder moves, then its keys of this batch replace the oldest.

    The loss reads the queues as they were, so that no example meets its own key.
    """
    del outputs
    momentum = config.loss.encoder_momentum
    encoder = jax.tree.map(
        lambda slow, fast: momentum * slow + (1.0 - momentum) * fast,
        memory["encoder"],
        trained.params,
    )
    encoded = trained.forward(encoder)
    keys = losses.unit_length(encoded["features"])
    predicted = jnp.argmax(encoded["logits"], axis=-1).astype(jnp.int32)
    right, real = predicted == batch["label"], batch["mask"] > 0
    after = {
        "encoder": encoder,
        "correct": enqueue(memory["correct"], keys, predicted, right & real),
        "error": enqueue(memory["error"], keys, predicted, ~right & real),
    }
    remembered = {
        f"{name}_{part}": memory[name][part]
        for name in ("correct", "error")
        for part in ("keys", "classes")
    }
    return jax.lax.stop_gradient((after, remembered))


def enqueue(queue: Any, keys: Array, classes: Array, chosen: Array) -> Any:
    """A ring after the chosen keys of a batch have replaced its oldest."""
    size = queue["classes"].shape[0]
    rank, count = jnp.cumsum(chosen) - 1, jnp.sum(chosen)
    kept = chosen & (rank >= count - size)
    place = jnp.where(kept, (queue["next"] + rank) % size, size)  # `size` is dropped
    return {
        "keys": queue["keys"].at[place].set(keys, mode="drop"),
        "classes": queue["classes"].at[place].set(classes, mode="drop"),
        "next": ((queue["next"] + count) % size).astype(jnp.int32),
    }


def _check_payoff(config: ConfigDict, num_classes: int) -> None:
    if config.loss.payoff > num_classes:
        raise InputError(
            f"config.loss.payoff={config.loss.payoff:g} must be at most the {num_classes} classes"
        )


_SELECTIVE = {
    "coverage_weight": Option(32.0, "[0, inf)", "weight of the coverage penalty (lambda)"),
    "alpha": Option(0.5, "[0, 1]", "share of the selective part; the rest is the auxiliary head's"),
}
_SOURCES = (
    *("class_head", "auxiliary_head", "true_class", "margin", "average", "agreement"),
    "shuffled",  # a control
)
# The values are provisional: the paper's are not public, and the best are an open question.
_SYNC = _SELECTIVE | {
    "prior_source": Option("class_head", _SOURCES, "confidence that the prior is a power of"),
    "prior_momentum": Option(0.9, "[0, 1)", "of prior_source 'average'"),
    "prior_power": Option(3.0, "[0, inf)", "exponent of the confidence in the prior"),
    "prior_weight": Option(0.0, "[0, inf)", "exponent of the prior in the weight"),
    "risk_weight": Option("selection", ("selection", "rank", "equal"), "what weighs the risk"),
    "rank_floor": Option("target", ("target", "error"), "where the coverages of 'rank' begin"),
    "sync_target": Option("prior", ("prior", "correctness"), "of g"),
    "sync_weight": Option(0.5, "[0, inf)", "weight of the synchronisation term"),
    "divergence": Option("bce", ("bce", "mse"), "between g and its target"),
    "detach_features": Option(False, "", "the selection head teaches the backbone nothing"),
    "logit_prior": Option("none", ("none", "fixed", "learnt"), "log odds of SR in g's logit"),
    "views": Option(1, "[1, 2]", "augmentations of an image in a step"),
    "rank_window": Option(0, "[0, 1000000]", "earlier examples that 'rank' ranks among too"),
    "evidence_share": Option(0.0, "[0, 1)", "of the training examples, which teach g alone"),
}
_NOT_THE_LOSS = (
    *("detach_features", "logit_prior", "views", "prior_momentum"),
    *("rank_window", "evidence_share"),
)
_CE = {
    "label_smoothing": Option(0.0, "[0, 1)", "share of the target that all classes divide"),
    "logit_norm": Option(0.0, "[0, inf)", "temperature of normalised logits; 0: as they are"),
}
_DROPOUT = {
    "dropout": Option(0.5, "[0, 1)", "rate, on the feature vector"),
    "dropout_samples": Option(100, "[1, 10000]", "that evaluation averages over"),
}
_PAYOFF = {"payoff": Option(2.2, "(1, inf)", "of a right answer; at most the number of classes")}
_MOMENTUM = {"target_momentum": Option(0.9, "[0, 1)", "of the targets; often 0.99 on ImageNet")}
_CONTRAST = {
    "contrast_weight": Option(1.0, "[0, inf)", "weight of the contrastive term"),
    "contrast_temperature": Option(0.1, "(0, inf)", "that divides similarities of features"),
    "queue_size": Option(3000, "[1, 1000000]", "keys of right and of wrong predictions"),
    "encoder_momentum": Option(0.999, "[0, 1)", "of the encoder that makes the keys"),
}
_TARGETS = Memory(lambda params, size, config: jnp.ones(size, jnp.float32), _update_target_table)
_RESPONSES = Memory(_create_responses, _update_responses)
_QUEUES = Memory(_create_queues, _update_queues)
_GATED, _ABSTAINING = ("selection", "auxiliary"), ("abstention",)
# Each objective's docstring gives its source and where ours differs, and why; losses.py has the
# equations.
METHODS: dict[str, Method] = {
    "ce": Method((), _ce, "softmax_response", _CE),
    "aurc": Method((), _aurc, "softmax_response", warmup=1 / 2),
    "mc_dropout": Method(("dropout",), _mc_dropout, "softmax_response", _DROPOUT),
    "selectivenet": Method(_GATED, _selectivenet, "selection", _SELECTIVE),
    "sync": Method(_GATED, _sync, "selection", _SYNC, _RESPONSES, check=_check_sync),
    "deep_gamblers": Method(
        _ABSTAINING, _deep_gamblers, "abstention", _PAYOFF, warmup=1 / 3, check=_check_payoff
    ),
    "self_adaptive": Method(_ABSTAINING, _self_adaptive, "abstention", _MOMENTUM, _TARGETS),
    "ccl_sc": Method(("features",), _ccl_sc, "softmax_response", _CONTRAST, _QUEUES, warmup=1 / 2),
}
