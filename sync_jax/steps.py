"""The training state and the pure functions that the loop compiles: a step, an evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from sync_jax.losses import Terms, masked_mean

Batch = dict[str, Array]
# (outputs, batch, memory, step, trained) to (loss, terms, memory); `methods.training_objective`.
Objective = Callable[[dict[str, Array], Batch, Any, Array, "Trained"], tuple[Array, Terms, Any]]


class Trained(NamedTuple):
    """The network in training, for a method that runs it with other parameters too.

    Attributes:
        params: as they were before the step, as constants.
        forward: parameters to the outputs for the step's batch, with the batch's statistics.
    """

    params: optax.Params
    forward: Callable[[optax.Params], dict[str, Array]]


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold.

    Attributes:
        step: `[]` int32, steps done.
        params: the network's parameters.
        batch_stats: BatchNorm's running statistics.
        opt_state: the optimiser's.
        memory: the method's, `methods.Memory`; an empty dict for most.
    """

    step: Array
    params: optax.Params
    batch_stats: optax.Params
    opt_state: optax.OptState
    memory: Any


def create_train_state(
    seed: int,
    *,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    create_memory: Callable[[optax.Params], Any] = lambda params: {},
) -> TrainState:
    """A state before the first step.

    Args:
        seed: of the initialisation.
        network: maps images `[batch, height, width, channels]` to a dict of outputs.
        optimizer: its state is made here.
        image_shape: (height, width, channels).
        create_memory: makes the method's memory, given the parameters.

    Returns:
        The state; a pure function of its arguments, so it can be jitted with output shardings.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = network.init(jax.random.key(seed), images, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
        memory=create_memory(variables["params"]),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    network: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    dropout_key: Array | None = None,
    microbatches: int = 1,
    skip: Array | bool = False,
) -> tuple[TrainState, Terms]:
    """One step of gradient descent; one that is not finite changes nothing but the step count.

    Args:
        state: before the step.
        batch: image `[batch, height, width, channels]`, normalised; label, mask and, for a method
            with a memory, index `[batch]`.
        network: see `create_train_state`.
        objective: what is minimised.
        optimizer: as given to `create_train_state`.
        dropout_key: of this step; for a network with dropout.
        microbatches: gradient accumulation: the network sees the batch in so many parts, one after
            the other, and keeps the activations of one. The objective is that of the whole batch,
            however it weighs its examples; BatchNorm's statistics are a part's. Must divide the
            batch. Above 1 it costs a second forward pass.
        skip: `[]` bool, whether the step is to change nothing, as if it were not finite.

    Returns:
        The state after the step, and scalars of the batch before it: loss, its terms,
        gradient_norm, accuracy and, with a selection head, mean_selection (mean of g) and coverage
        (share with g >= 1/2); parameter_norm and state_norm are of the parameters, and of the
        statistics, the optimiser's state and the memory, that the step led to. If any of them is
        not finite, the state has its old values, and `step` counts on.
    """

    def forward(params: optax.Params) -> tuple[dict[str, Array], optax.Params]:
        return _forward(
            network, params, state.batch_stats, batch["image"], dropout_key, microbatches
        )

    trained = Trained(state.params, lambda params: forward(params)[0])

    def loss_fn(
        params: optax.Params,
    ) -> tuple[Array, tuple[Terms, dict[str, Array], optax.Params, Any]]:
        outputs, batch_stats = forward(params)
        loss, terms, memory = objective(outputs, batch, state.memory, state.step, trained)
        return loss, (terms, outputs, batch_stats, memory)

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (terms, outputs, batch_stats, memory)), grads = gradient_fn(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    correct = jnp.argmax(outputs["logits"], axis=-1) == batch["label"]
    metrics = {
        "loss": loss,
        **terms,
        "gradient_norm": optax.tree.norm(grads),
        "accuracy": masked_mean(correct.astype(jnp.float32), batch["mask"]),
    }
    if "selection_logits" in outputs:
        selection = jax.nn.sigmoid(outputs["selection_logits"])
        accepted = (selection >= 0.5).astype(jnp.float32)
        metrics["mean_selection"] = masked_mean(selection, batch["mask"])
        metrics["coverage"] = masked_mean(accepted, batch["mask"])
    params = optax.apply_updates(state.params, updates)
    metrics["parameter_norm"] = optax.tree.norm(params)
    metrics["state_norm"] = _norm((batch_stats, opt_state, memory))
    good = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values())))) & jnp.logical_not(skip)
    after = TrainState(state.step, params, batch_stats, opt_state, memory)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    return kept.replace(step=state.step + 1), metrics


def _norm(tree: Any) -> Array:
    """Of the floating-point numbers in a tree; 0 without any."""
    leaves = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.sqrt(sum((jnp.sum(jnp.square(x)) for x in leaves), jnp.zeros(())))


def _forward(
    network: nn.Module,
    params: optax.Params,
    batch_stats: optax.Params,
    images: Array,
    dropout_key: Array | None,
    microbatches: int,
) -> tuple[dict[str, Array], optax.Params]:
    """The network's outputs in training, and BatchNorm's statistics afterwards."""

    def apply(
        params: optax.Params, batch_stats: optax.Params, images: Array, key: Array | None
    ) -> tuple[dict[str, Array], optax.Params]:
        outputs, updates = network.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            mutable=["batch_stats"],
            rngs=None if key is None else {"dropout": key},
        )
        return outputs, updates.get("batch_stats", {})

    if microbatches == 1:
        return apply(params, batch_stats, images, dropout_key)

    def part(batch_stats: optax.Params, numbered: tuple[Array, Array]) -> tuple[Any, Any]:
        number, images = numbered
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, number)
        # Its activations are computed again for the gradient instead of being kept.
        outputs, batch_stats = jax.checkpoint(apply)(params, batch_stats, images, key)
        return batch_stats, outputs

    size = images.shape[0] // microbatches
    # Every so many examples rather than a stretch: each device then has its share of each part.
    parts = images.reshape(size, microbatches, *images.shape[1:]).swapaxes(0, 1)
    # Unrolled on a CPU, where convolutions inside a loop are some thirty times slower.
    unroll = microbatches if jax.default_backend() == "cpu" else 1
    batch_stats, outputs = jax.lax.scan(
        part, batch_stats, (jnp.arange(microbatches), parts), unroll=unroll
    )
    whole = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(images.shape[0], *x.shape[2:]), outputs)
    return whole, batch_stats


def eval_step(state: TrainState, images: Array, *, network: nn.Module) -> dict[str, Array]:
    """The network's outputs for a batch, with BatchNorm's running statistics.

    Args:
        state: of which parameters and statistics are used.
        images: `[batch, height, width, channels]`, normalised.
        network: see `create_train_state`.

    Returns:
        Arrays `[batch, ...]` by name.
    """
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    outputs: dict[str, Array] = network.apply(variables, images, train=False)  # type: ignore[assignment]
    return outputs
