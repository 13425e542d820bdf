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
    image_shape: tuple[int, int, int],
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
) -> tuple[TrainState, Terms]:
    """One step of gradient descent.

    Args:
        state: before the step.
        batch: image `[batch, height, width, channels]`, normalised; label, mask and, for a method
            with a memory, index `[batch]`.
        network: see `create_train_state`.
        objective: what is minimised.
        optimizer: as given to `create_train_state`.
        dropout_key: of this step; for a network with dropout.

    Returns:
        The state after the step, and scalars of the batch before it: loss, its terms,
        gradient_norm, accuracy and, with a selection head, mean_selection (mean of g) and coverage
        (share with g >= 1/2).
    """

    def forward(params: optax.Params) -> tuple[dict[str, Array], optax.Params]:
        outputs, updates = network.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
            rngs=None if dropout_key is None else {"dropout": dropout_key},
        )
        return outputs, updates.get("batch_stats", {})

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
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
        memory=memory,
    )
    return state, metrics


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
