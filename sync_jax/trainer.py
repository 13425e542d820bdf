"""What a config builds once: the network, the optimiser and the functions that are compiled."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from ml_collections import ConfigDict

from sync_jax.data import catalogue, host, pictures
from sync_jax.data.augmentation import augment, normalise
from sync_jax.data.parts import Part
from sync_jax.data.placement import Placement, free_memory
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import (
    ResidentSplit,
    augmentation_key,
    epoch_constants,
    epoch_index,
    put_on_devices,
    training_batch,
)
from sync_jax.data.squares import Squares
from sync_jax.errors import InputError, NonFiniteError
from sync_jax.evaluation.record import Predictions, predict, summary
from sync_jax.losses import Terms
from sync_jax.methods import METHODS, training_objective
from sync_jax.metrics import aurc
from sync_jax.models import make_network
from sync_jax.models.pretrained import load_pretrained
from sync_jax.optimizer import learning_rate_schedule, make_optimizer
from sync_jax.runtime import profiling, sharding
from sync_jax.runtime.profiling import parse_steps
from sync_jax.steps import Batch, TrainState, create_train_state, eval_step, train_step

_STEPS_PER_DISPATCH = 8  # of an accelerator


class Metrics(struct.PyTreeNode):
    """What the steps of one dispatch say, in one array, for each that is fetched takes its time.

    Attributes:
        names: of the metrics, see `steps.train_step`.
        values: `[steps, metrics]`.
        stop_vote: `[]`, of several processes: above 0 where any was asked to stop. The one way to
            tell all of them the same, at the same step, without waiting for each other.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    values: Array
    stop_vote: Array | None

    def fetch(self) -> list[dict[str, float]]:
        """Of each step, by name; waits for the device."""
        rows = np.asarray(self.values).tolist()
        return [dict(zip(self.names, row, strict=True)) for row in rows]


class Run:
    """What a config builds once: network, optimiser and the compiled functions.

    Attributes:
        config: validated.
        mesh: over which the batch is split.
        info: the dataset's.
        placement: of the training images.
        steps_per_epoch: may be fractional: no example is left out at an epoch's end.
        total_steps: of the run.
        state_like: shapes, dtypes and shardings of the training state.
        steps_per_dispatch: that the device does for one command of the host.
        alive: to be called whenever something has been done that may take long.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: jax.sharding.Mesh,
        *,
        train_size: int,
        placement: Placement | None = None,
        alive: Callable[[], None] = lambda: None,
    ):
        """Builds them; nothing is compiled yet.

        Args:
            config: validated.
            mesh: over all devices of all processes.
            train_size: number of training examples.
            placement: of their images.
            alive: called whenever a step or a batch of predictions is done; the attribute.

        Raises:
            InputError: the dataset is not prepared.
        """
        self.config = config
        self.mesh = mesh
        self.placement = placement = placement or Placement()
        info = catalogue.dataset_info(config.data)
        if info is None:
            raise InputError(f"{config.data.name} is not prepared; --mode=prepare does it")
        self.info = info
        self.train_size = train_size
        self.steps_per_epoch = train_size / config.train.batch_size
        self.total_steps = self.steps_of(config.train.epochs)
        self.size = info.image_shape[0] if config.data.name in pictures.NAMES else None
        self.steps_per_dispatch = config.train.steps_per_dispatch or (
            _STEPS_PER_DISPATCH
            if placement.on_device and mesh.devices.flat[0].platform != "cpu"
            else 1
        )
        method = METHODS[config.method]
        self.network = make_network(
            config.model,
            heads=method.heads,
            num_classes=self.info.num_classes,
            target_coverage=config.target_coverage,
        )
        schedule = learning_rate_schedule(
            config.optimizer, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        self.optimizer = make_optimizer(config.optimizer, schedule)
        copied, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        normal = functools.partial(normalise, mean=self.info.mean, std=self.info.std)
        self.augmentation = Augmentation.of(config.data)
        warmup_epochs = config.loss.warmup_epochs
        if warmup_epochs < 0:
            warmup_epochs = method.warmup * config.train.epochs
        warmup_steps = self.steps_of(warmup_epochs) if warmup_epochs else 0
        objective = training_objective(
            method, config, train_size=train_size, warmup_steps=warmup_steps
        )

        self._create = functools.partial(
            create_train_state,
            network=self.network,
            optimizer=self.optimizer,
            image_shape=self.info.image_shape,
            create_memory=self._create_memory,
        )
        self.state_like = self._with_shardings(jax.eval_shape(self._create, jnp.uint32(0)))
        shardings = jax.tree.map(lambda x: x.sharding, self.state_like)

        def resident_batch(state: TrainState, data: ResidentSplit, seed: Array) -> Batch:
            return training_batch(
                data,
                seed,
                state.step,
                batch_size=config.train.batch_size,
                augmentation=self.augmentation,
                size=self.size,
                mesh=mesh if placement.sharded else None,
            )

        def host_batch(state: TrainState, data: Batch, seed: Array) -> Batch:
            image = augment(
                augmentation_key(seed, state.step),
                data["image"],
                self.augmentation,
                size=self.size,
                cropped=placement.decoded,
            )
            return data | {"image": image}

        def step(
            state: TrainState,
            data: ResidentSplit | Batch,
            seed: Array,
            skip: Array,
        ) -> tuple[TrainState, Terms]:
            if isinstance(data, ResidentSplit):
                batch = resident_batch(state, data, seed)
            else:
                batch = host_batch(state, data, seed)
            batch = sharding.shard_batch(batch | {"image": normal(batch["image"])}, mesh)
            return train_step(
                state,
                batch,
                network=self.network,
                objective=objective,
                optimizer=self.optimizer,
                # Of a seed's three streams of randomness this is the third; see training_batch.
                dropout_key=jax.random.fold_in(
                    jax.random.split(jax.random.key(seed), 3)[2], state.step
                ),
                microbatches=config.train.microbatches,
                skip=skip,
            )

        def steps(
            state: TrainState,
            data: ResidentSplit | Batch,
            seed: Array,
            skips: Array,
            vote: Array | None,
        ) -> tuple[TrainState, Metrics]:
            if len(skips) == 1:
                state, metrics = step(state, data, seed, skips[0])
                metrics = jax.tree.map(lambda x: x[None], metrics)
            else:
                # Barriers, or XLA fuses neighbouring steps, and rounds otherwise than one does.
                state, metrics = jax.lax.scan(
                    lambda state, skip: jax.lax.optimization_barrier(
                        step(jax.lax.optimization_barrier(state), data, seed, skip)
                    ),
                    state,
                    skips,
                    # Convolutions inside a loop are some thirty times slower on a CPU.
                    unroll=len(skips) if jax.default_backend() == "cpu" else 1,
                )
            values = jnp.stack(list(metrics.values()), axis=1)
            stop_vote = None if vote is None else jnp.max(vote)
            return state, Metrics(tuple(metrics), values, stop_vote)

        def outputs(state: TrainState, images: Array) -> dict[str, Array]:
            return eval_step(state, normal(images), network=self.network)

        compiled = jax.jit(steps, donate_argnums=0, out_shardings=(shardings, copied))
        self._compiled = sharding.one_at_a_time(compiled, mesh)
        # An argument and no constant: runs that differ in it alone share the compilation cache.
        self._seed = np.uint32(config.seed)
        # Whether this process was asked to stop, on each of its devices; see `step`.
        self._votes: dict[bool, Any] = {False: None, True: None}
        if mesh.is_multi_process:
            own = len(mesh.local_devices)
            self._votes = {
                asked: sharding.from_shares(np.full(own, asked, np.float32), mesh)
                for asked in (False, True)
            }
        self._outputs = sharding.one_at_a_time(
            jax.jit(outputs, in_shardings=(shardings, split), out_shardings=copied), mesh
        )
        self.alive = alive

    def step(
        self,
        state: TrainState,
        data: ResidentSplit | Batch,
        *,
        skips: Sequence[bool] = (False,),
        stopping: bool = False,
    ) -> tuple[TrainState, Metrics]:
        """So many training steps as `skips` has, under way when this returns.

        Args:
            state: before them; donated.
            data: of `feed`; several steps want the resident split.
            skips: whether each is to change nothing; each length is compiled by itself.
            stopping: whether this process was asked to stop.

        Returns:
            The state after them, and their metrics.
        """
        vote = self._votes[stopping]
        result = self._compiled(state, data, self._seed, np.asarray(skips), vote)
        self.alive()
        return result

    def dispatches(self, start: int) -> Iterator[range]:
        """Which steps, counted from 1, are done together, from the one after `start` to the last.

        Either `steps_per_dispatch` or one alone, and none across a step at which the loop saves or
        evaluates. Where a stretch between two of those is divided does not depend on `start`: a run
        that goes on from where it stopped has the same dispatches as one that never did.
        """
        most, checkpoint, log = self.steps_per_dispatch, self.config.checkpoint, self.config.log
        epochs = checkpoint.every_epochs, log.calibration_every_epochs
        periods = [self.steps_of(x) for x in epochs]
        done = start
        while done < self.total_steps:
            begin = max(done // every * every for every in periods)
            end = min(self.total_steps, *((done // every + 1) * every for every in periods))
            together = most if (done - begin) % most == 0 and done + most <= end else 1
            yield range(done + 1, done + together + 1)
            done += together

    def steps_of(self, epochs: float) -> int:
        """Epochs as a number of steps, at least one."""
        return max(round(epochs * self.steps_per_epoch), 1)

    def positions(self, step: int) -> np.ndarray:
        """Which training examples a step sees, counted from 1: `[batch]`, positions in its part."""
        key, _ = jax.random.split(jax.random.key(self._seed))
        batch_size = self.config.train.batch_size
        return np.asarray(epoch_index(key, jnp.uint32(step - 1), batch_size, self.train_size))

    def feed(self, part: Part, start: int) -> Iterator[ResidentSplit | Batch]:
        """What each step from `start` on takes: the resident split, or the host's batches."""
        images = part.images.uncut() if isinstance(part.images, Squares) else part.images
        if self.placement.on_device:
            split = put_on_devices(images, part.labels, self.mesh, sharded=self.placement.sharded)
            yield from itertools.repeat(split)
            return
        batch_size, size = self.config.train.batch_size, len(part.labels)
        decoded = self.placement.decoded
        examples = host.Examples(
            images,
            part.labels,
            epoch_constants(self.config.seed, -(-self.total_steps * batch_size // size)),
            self.config.seed,
            self.augmentation.min_crop_area if decoded else 1.0,
            self.info.image_shape[0],
        )
        for batch in host.batches(
            examples,
            start=start,
            stop=self.total_steps,
            batch_size=batch_size,
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=self.config.data.workers if decoded else 0,
        ):
            whole = batch | {"mask": np.ones(len(batch["label"]), np.float32)}
            split_batch = sharding.batch_sharding(self.mesh)
            yield {
                name: jax.make_array_from_process_local_data(split_batch, array)
                for name, array in whole.items()
            }

    def check(self) -> None:
        """Makes sure, before anything is written, of what depends on the dataset and the machine.

        Raises:
            InputError: the state takes more memory than is free, the weights' file cannot be used,
                or the steps to be traced are not the run's.
        """
        config, state = self.config, self.state_like
        if config.train.steps_per_dispatch > 1 and not self.placement.on_device:
            raise InputError(
                f"config.train.steps_per_dispatch={config.train.steps_per_dispatch} wants the "
                "images on the device, and they are on the host (config.data.placement); use 1 or 0"
            )
        traced = parse_steps(config.profile.steps)
        if traced and traced[-1] > self.total_steps:
            raise InputError(
                f"config.profile.steps={config.profile.steps!r} is beyond the run's "
                f"{self.total_steps:,} steps"
            )
        size = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(state)
        )
        free = free_memory(self.mesh)
        if size * self.mesh.size > free:
            parameters = sum(x.size for x in jax.tree.leaves(state.params))
            raise InputError(
                f"config.model.name={config.model.name!r} of width={config.model.width} and "
                f"features={config.model.features} has {parameters:,} parameters: the state takes "
                f"{size / 1e9:,.1f} GB on each of {self.mesh.size} devices, and {free / 1e9:,.1f} "
                "GB are free on all; make it smaller, or config.loss.queue_size"
            )
        if config.model.pretrained:
            path = Path(config.model.pretrained).expanduser()
            load_pretrained(path, state.params, state.batch_stats)

    def create_state(self) -> TrainState:
        """The state before the first step, on every device."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_like)
        return jax.jit(self._create, out_shardings=shardings)(self._seed)

    def load_pretrained(self, state: TrainState) -> tuple[TrainState, str]:
        """The state with the weights of `config.model.pretrained`, and a line on what matched.

        Raises:
            InputError: the file cannot be read, or nothing in it fits.
        """
        path = Path(self.config.model.pretrained).expanduser()
        params, batch_stats, message = load_pretrained(path, state.params, state.batch_stats)
        copied = sharding.replicated(self.mesh)
        params, batch_stats = jax.device_put((params, batch_stats), copied)
        memory = jax.jit(self._create_memory, out_shardings=copied)(params)
        return state.replace(params=params, batch_stats=batch_stats, memory=memory), message

    def _with_shardings(self, shapes: TrainState) -> TrainState:
        """Copied to each device; the optimiser's state divided between them if so configured."""
        copied = sharding.replicated(self.mesh)
        shardings = jax.tree.map(lambda x: copied, shapes)
        if self.config.optimizer.sharded:
            divided = sharding.split_over(self.mesh, shapes.opt_state)
            shardings = shardings.replace(opt_state=divided)
        return jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            shardings,
        )

    def _create_memory(self, params: optax.Params) -> Any:
        memory = METHODS[self.config.method].memory
        return memory.create(params, self.train_size, self.config) if memory else {}

    def predict(self, state: TrainState, part: Part) -> Predictions:
        """The network's outputs for every example of a part; each process reads its share.

        Raises:
            NonFiniteError: an output is not finite.
        """

        def outputs_of(images: np.ndarray) -> dict[str, Array]:
            outputs = self._outputs(state, sharding.from_shares(images, self.mesh))
            self.alive()
            return outputs

        batch_size = self.config.evaluation.batch_size
        share = sharding.share(batch_size, self.mesh)
        predictions = predict(part, outputs_of, batch_size, share=share)
        bad = [name for name, x in predictions.outputs.items() if not np.isfinite(x).all()]
        if bad:
            raise NonFiniteError(
                f"the evaluation of {len(part.labels):,} examples: {', '.join(bad)} not finite"
            )
        return predictions

    def calibration_metrics(self, state: TrainState, part: Part) -> dict[str, float]:
        """What is logged of the calibration split while training."""
        predictions = self.predict(state, part)
        values = summary(predictions)
        values["aurc"] = aurc(predictions.confidence("softmax_response"), predictions.wrong)
        names = ("accuracy", "negative_log_likelihood", "aurc", "mean_selection")
        return {name: values[name] for name in names if name in values}

    def speed(self, steps: int, seconds: dict[str, float]) -> dict[str, Any] | None:
        """How fast a training was, see `profiling.speed`; None of no steps.

        Measures the device, which must have nothing else to do.

        Args:
            steps: done.
            seconds: that they took, by phase; see `profiling.Stopwatch`.
        """
        if not steps:
            return None
        # Simulated devices share a processor; other hosts and devices are taken to be as this one.
        devices = jax.process_count() if jax.default_backend() == "cpu" else self.mesh.size
        return profiling.speed(
            seconds,
            steps=steps,
            batch_size=self.config.train.batch_size,
            train_size=self.train_size,
            flops=profiling.training_flops(self.network, self.info.image_shape),
            peak=devices * profiling.matmul_flops(self.config.model.dtype),
        )

    def describe(self, calibration_size: int) -> str:
        """One line on what will run."""
        config = self.config
        parameters = sum(x.size for x in jax.tree.leaves(self.state_like.params))
        count = jax.process_count()
        processes = f" of {count} processes" if count > 1 else ""
        devices = f"{self.mesh.size} {jax.devices()[0].platform.upper()} device"
        return (
            f"{config.method} on {config.data.name}: {self.train_size:,} training and "
            f"{calibration_size:,} calibration images; {config.model.name} with {parameters:,} "
            f"parameters; {self.total_steps:,} steps of {config.train.batch_size} on {devices}"
            f"{'s' if self.mesh.size > 1 else ''}{processes}"
        )
