"""The training state, and the pure functions that are compiled: a training step, an evaluation."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from sync_jax.data.augmentation import augment, normalise
from sync_jax.data.info import DatasetInfo
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import ResidentSplit, augmentation_key, training_batch
from sync_jax.losses import Terms, masked_mean
from sync_jax.methods import Trained
from sync_jax.runtime import sharding

Batch = dict[str, Array]
# (outputs, batch, memory, step, trained) to (loss, terms, memory); `methods.training_objective`.
Objective = Callable[[dict[str, Array], Batch, Any, Array, Trained], tuple[Array, Terms, Any]]


class TrainState(struct.PyTreeNode):
    """Everything that a checkpoint must hold."""

    step: Array  # [] int32, steps done
    params: optax.Params
    batch_stats: optax.Params
    opt_state: optax.OptState
    memory: Any  # the method's, see methods.Memory; {} for most


class Averaged(NamedTuple):
    """An optimizer's state and the moving averages that evaluation uses instead of the network's.

    The averages of BatchNorm's statistics lag as far behind as those of the parameters.
    """

    optimizer: optax.OptState
    params: optax.Params
    batch_stats: optax.Params


def create_train_state(
    seed: int,
    *,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, ...],
    create_memory: Callable[[optax.Params], Any] | None = None,
    averaged: bool = False,
) -> TrainState:
    """The state before the first step, of a network for inputs `[batch, *image_shape]`."""
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = network.init(jax.random.key(seed), images, train=False)
    batch_stats, opt_state = variables.get("batch_stats", {}), optimizer.init(variables["params"])
    if averaged:
        # The first step replaces the averages. They start as zeros, as no buffer is donated twice.
        zeros = jax.tree.map(jnp.zeros_like, (variables["params"], batch_stats))
        opt_state = Averaged(opt_state, *zeros)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=batch_stats,
        opt_state=opt_state,
        memory=create_memory(variables["params"]) if create_memory else {},
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
    average_decay: float = 0.0,
) -> tuple[TrainState, Terms]:
    """One step of gradient descent; one that is not finite changes nothing but the step count.

    `batch` has image `[batch, ...]`, normalised, and label, mask and index `[batch]`. With a
    second_image, another augmentation, second_logits join the outputs, as constants. With several
    `microbatches`, which must divide the batch, the network sees one part of it after the other and
    keeps the activations of one, for a second forward pass (gradient accumulation): the objective
    is the whole batch's, and BatchNorm's statistics are a part's. Averages in the state move by
    1 - `average_decay`, and faster at first: after t steps by 10 / (t + 10).

    Returns:
        The state after the step, and scalars: loss, its terms, gradient_norm, accuracy and, with a
        selection head, mean_selection (of g) and coverage (share with g >= 1/2), before the step;
        parameter_norm and state_norm (of all else) after it. If one of them is not finite, the
        state keeps its values, and `step` counts on.
    """

    def forward(
        params: optax.Params, images: Array = batch["image"], key: Array | None = dropout_key
    ) -> tuple[dict[str, Array], optax.Params]:
        return _forward(network, params, state.batch_stats, images, key, microbatches)

    trained = Trained(state.params, lambda params: forward(params)[0])
    second = {}
    if "second_image" in batch:
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, microbatches)
        second["second_logits"] = forward(state.params, batch["second_image"], key)[0]["logits"]

    def loss_fn(params: optax.Params) -> tuple[Array, Any]:
        outputs, batch_stats = forward(params)
        outputs |= second
        loss, terms, memory = objective(outputs, batch, state.memory, state.step, trained)
        return loss, (terms, outputs, batch_stats, memory)

    gradient_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (terms, outputs, batch_stats, memory)), grads = gradient_fn(state.params)
    averages = state.opt_state if isinstance(state.opt_state, Averaged) else None
    before = averages.optimizer if averages else state.opt_state
    updates, opt_state = optimizer.update(grads, before, state.params)
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
    if averages:
        decay = jnp.minimum(average_decay, state.step / (state.step + 10.0))
        moved = optax.incremental_update((params, batch_stats), averages[1:], 1.0 - decay)
        opt_state = Averaged(opt_state, *moved)
    rest = jax.tree.leaves((batch_stats, opt_state, memory))
    floating = [x for x in rest if jnp.issubdtype(x.dtype, jnp.floating)]
    metrics["state_norm"] = optax.tree.norm(floating)
    good = jnp.all(jnp.isfinite(jnp.stack(list(metrics.values()))))
    after = TrainState(state.step, params, batch_stats, opt_state, memory)
    kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    return kept.replace(step=state.step + 1), metrics


def _forward(
    network: nn.Module,
    params: optax.Params,
    batch_stats: optax.Params,
    images: Array,
    dropout_key: Array | None,
    microbatches: int,
) -> tuple[dict[str, Array], optax.Params]:
    """The network's outputs in training, and BatchNorm's statistics afterwards."""

    def apply(params: Any, batch_stats: Any, images: Array, key: Array | None) -> tuple[Any, Any]:
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


class Metrics(struct.PyTreeNode):
    """The metrics of a step, in one array `values` `[metrics]`: each fetch takes its time.

    `stop_vote`, of several processes, is above 0 where any was asked to stop: all of them learn it
    at the same step without waiting for each other.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    values: Array
    stop_vote: Array | None

    def fetch(self) -> dict[str, float]:
        """The metrics by name; waits for the device."""
        return dict(zip(self.names, jax.device_get(self.values).tolist(), strict=True))


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """The constants of a compiled step."""

    network: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    info: DatasetInfo
    augmentation: Augmentation
    mesh: jax.sharding.Mesh
    batch_size: int  # over all devices of the mesh together
    microbatches: int = 1
    sharded: bool = False  # True if the resident images are divided between the devices
    cropped: bool = False  # True if the host has made the resized crops
    views: int = 1  # augmentations of an image in a batch, 1 or 2
    average_decay: float = 0.0

    @property
    def size(self) -> int | None:
        """Pixels of a side of the network's input; None for feature vectors."""
        return self.info.image_shape[0] if len(self.info.image_shape) == 3 else None


def input_batch(
    state: TrainState, data: ResidentSplit | Batch, seed: Array, *, settings: StepSettings
) -> Batch:
    """The batch of a step: augmented, normalised and split over the mesh; see `run_step`."""
    batch = _augmented(state.step, data, seed, settings, view=0)
    if settings.views > 1:
        # What both views do alike, such as gathering the images, the compiler does once.
        batch["second_image"] = _augmented(state.step, data, seed, settings, view=1)["image"]
    normal = {x: _normal(batch[x], settings.info) for x in batch if x.endswith("image")}
    return sharding.shard_batch(batch | normal, settings.mesh)


def _augmented(
    step: Array, data: ResidentSplit | Batch, seed: Array, settings: StepSettings, view: int
) -> Batch:
    """The batch of a step with one of the views of its images."""
    if isinstance(data, ResidentSplit):
        return training_batch(
            data,
            seed,
            step,
            batch_size=settings.batch_size,
            augmentation=settings.augmentation,
            size=settings.size,
            mesh=settings.mesh if settings.sharded else None,
            view=view,
        )
    image = augment(
        augmentation_key(seed, step, view),
        data["image"],
        settings.augmentation,
        size=settings.size,
        cropped=settings.cropped,
    )
    return data | {"image": image}


def _normal(images: Array, info: DatasetInfo) -> Array:
    return normalise(images, info.mean, info.std, info.scale)


def run_step(
    state: TrainState,
    data: ResidentSplit | Batch,
    seed: Array,
    vote: Array | None,
    *,
    settings: StepSettings,
) -> tuple[TrainState, Metrics]:
    """A training step, from the data to the next state.

    `vote` `[devices]`, of several processes, is 1 where one was asked to stop.
    """
    state, metrics = train_step(
        state,
        input_batch(state, data, seed, settings=settings),
        network=settings.network,
        objective=settings.objective,
        optimizer=settings.optimizer,
        # Of a seed's three streams of randomness this is the third; see training_batch.
        dropout_key=jax.random.fold_in(jax.random.split(jax.random.key(seed), 3)[2], state.step),
        microbatches=settings.microbatches,
        average_decay=settings.average_decay,
    )
    values = jnp.stack(list(metrics.values()))
    return state, Metrics(tuple(metrics), values, None if vote is None else jnp.max(vote))


def run_evaluation(state: TrainState, images: Array, *, settings: StepSettings) -> dict[str, Array]:
    """The network's outputs for images as they are stored; see `eval_step`."""
    return eval_step(state, _normal(images, settings.info), network=settings.network)


def eval_step(state: TrainState, images: Array, *, network: nn.Module) -> dict[str, Array]:
    """The network's outputs `[batch, ...]` for normalised images, by running statistics.

    With averages in the state, the outputs of the averaged network.
    """
    shown = state.opt_state if isinstance(state.opt_state, Averaged) else state
    variables = {"params": shown.params, "batch_stats": shown.batch_stats}
    outputs: dict[str, Array] = network.apply(variables, images, train=False)  # type: ignore[assignment]
    return outputs
