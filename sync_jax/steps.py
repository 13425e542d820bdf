"""The training state and the pure functions that the loop compiles: a step, an evaluation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from sync_jax.losses import Terms, masked_mean

Batch = dict[str, Array]
# (outputs, labels, mask) to (loss, terms); a method's objective with its hyperparameters filled in.
Objective = Callable[[dict[str, Array], Array, Array], tuple[Array, Terms]]


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold.

    Attributes:
        step: `[]` int32, steps done.
        params: the network's parameters.
        batch_stats: BatchNorm's running statistics.
        opt_state: the optimiser's.
    """

    step: Array
    params: optax.Params
    batch_stats: optax.Params
    opt_state: optax.OptState


def create_train_state(
    seed: int,
    *,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """A state before the first step.

    Args:
        seed: of the initialisation.
        network: maps images `[batch, height, width, channels]` to a dict of outputs.
        optimizer: its state is made here.
        image_shape: (height, width, channels).

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
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    network: nn.Module,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Terms]:
    """One step of gradient descent.

    Args:
        state: before the step.
        batch: image `[batch, height, width, channels]`, normalised; label, mask `[batch]`.
        network: see `create_train_state`.
        objective: what is minimised.
        optimizer: as given to `create_train_state`.

    Returns:
        The state after the step, and scalars of the batch before it: loss, its terms,
        gradient_norm, accuracy and, with a selection head, mean_selection (mean of g) and coverage
        (share with g >= 1/2).
    """

    def loss_fn(params: optax.Params) -> tuple[Array, tuple[Terms, dict[str, Array], optax.Params]]:
        outputs, updates = network.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        loss, terms = objective(outputs, batch["label"], batch["mask"])
        return loss, (terms, outputs, updates.get("batch_stats", {}))

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (terms, outputs, batch_stats)), grads = gradient_fn(state.params)
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
