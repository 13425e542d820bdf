"""The trainer: network, optimizer and jitted functions, built from a config."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from sync_jax.config import find_method, validate
from sync_jax.data.info import DatasetInfo
from sync_jax.data.loading import training_feed
from sync_jax.data.placement import Placement, free_memory
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import ResidentSplit
from sync_jax.data.splits import Part, parse_fold
from sync_jax.errors import InputError, NonFiniteError
from sync_jax.evaluation.predictions import Predictions, predict
from sync_jax.evaluation.record import known_scores
from sync_jax.methods import training_objective
from sync_jax.models import (
    AUTO,
    ON_ACCELERATOR,
    ON_CPU,
    candidates,
    complete,
    find_backbone,
    make_backbone,
    make_network,
)
from sync_jax.models.pretrained import load_pretrained
from sync_jax.optimizer import learning_rate_schedule, make_optimizer
from sync_jax.options import flatten
from sync_jax.runtime import sharding
from sync_jax.runtime.profiling import parse_steps, training_flops
from sync_jax.runtime.workdir import is_abandoned, saved_configs
from sync_jax.steps import (
    Batch,
    Metrics,
    StepSettings,
    TrainState,
    create_train_state,
    run_evaluation,
    run_step,
)

_LONG = 600.0  # seconds of a training on CPUs, from which on a faster network is named


def resolve(config: ConfigDict) -> list[str]:
    """Checks a config, and adds the options that its method and its backbone declare.

    Returns a line for each option of another backbone, which is removed.
    """
    validate(config)
    parse_steps(config.profile.steps)
    if config.data.fold:
        parse_fold(config.data.fold)
    known_scores(config, find_method(config.method).score)
    return complete(config.model)


def choose_network(config: ConfigDict, workdir: Path | None = None) -> list[str]:
    """Replaces the backbone "auto": by that of the run in the folder, or as the devices are.

    Called when the processes have met, for JAX looks for its devices here. Returns lines on it.
    """
    if config.model.name != AUTO:
        return []
    choices = candidates(config.model)
    name = choices[0] if jax.default_backend() == "cpu" else ON_ACCELERATOR
    reason = "without an accelerator" if name == ON_CPU else "for this machine"
    with contextlib.suppress(OSError, InputError):  # `check_workdir` says what is wrong there
        for saved in (
            saved_configs(workdir) if workdir and not is_abandoned(config, workdir) else ()
        ):
            begun = dict(flatten(saved)).get("model.name")
            if begun != name and begun in choices:
                name, reason = str(begun), f"with which the run in {workdir} began"
    config.model.name = name
    line = f"config.model.name=auto: {name}, {reason}"
    return [line, *complete(config.model)]


def check_dataset(config: ConfigDict, info: DatasetInfo | None) -> None:
    """Checks that method, backbone and dataset, as far as it is known, go together."""
    if info is None:
        return
    if find_backbone(config.model.name).images_only and len(info.image_shape) < 3:
        raise InputError(
            f"config.model.name={config.model.name!r} takes images, and the data are feature "
            "vectors; use mlp"
        )
    method = find_method(config.method)
    if method.check is not None:
        method.check(config, info.num_classes)


class Trainer:
    """Network, optimizer and jitted functions of a run.

    `steps_per_epoch` may be fractional: no example is left out at an epoch's end. `settings` are
    the constants of a step, `state_like` shapes, dtypes and shardings of the training state.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: jax.sharding.Mesh,
        info: DatasetInfo,
        *,
        train_size: int,
        placement: Placement | None = None,
        alive: Callable[[], None] | None = None,
    ):
        """Builds them, uncompiled; calls `alive` after whatever may take long."""
        self.config, self.mesh, self.info = config, mesh, info
        self.placement = placement = placement or Placement()
        self.train_size, self._alive = train_size, alive
        self.steps_per_epoch = train_size / config.train.batch_size
        self.total_steps = self.steps_of(config.train.epochs)
        self.method = method = find_method(config.method)
        options = {name: config.loss[name] for name in method.hyperparameters}
        warmup_epochs = config.loss.warmup_epochs
        if warmup_epochs < 0:
            warmup_epochs = method.warmup * config.train.epochs
        schedule = learning_rate_schedule(
            config.optimizer, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        self.settings = StepSettings(
            network=make_network(
                config.model,
                heads=method.heads,
                num_classes=info.num_classes,
                target_coverage=config.target_coverage,
                dropout=config.loss.dropout,
                dropout_samples=config.loss.dropout_samples,
                **{k: v for k, v in options.items() if k in ("detach_features", "logit_prior")},
            ),
            objective=training_objective(
                method,
                config,
                train_size=train_size,
                warmup_steps=self.steps_of(warmup_epochs) if warmup_epochs else 0,
            ),
            optimizer=make_optimizer(config.optimizer, schedule),
            info=info,
            augmentation=Augmentation.of(config.data),
            mesh=mesh,
            batch_size=config.train.batch_size,
            microbatches=config.train.microbatches,
            sharded=placement.sharded,
            cropped=placement.decoded,
            views=options.get("views", 1),
            average_decay=config.optimizer.average_decay,
        )
        self._create = functools.partial(
            create_train_state,
            network=self.settings.network,
            optimizer=self.settings.optimizer,
            image_shape=info.image_shape,
            create_memory=self._create_memory,
            averaged=config.optimizer.average_decay > 0,
        )
        shapes = jax.eval_shape(self._create, jnp.uint32(0))
        copied, split = sharding.replicated(mesh), sharding.batch_sharding(mesh)
        shardings = jax.tree.map(lambda _: copied, shapes)
        if config.optimizer.sharded:
            shardings = shardings.replace(opt_state=sharding.split_over(mesh, shapes.opt_state))
        self.state_like = jax.tree.map(
            lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            shapes,
            shardings,
        )
        step = functools.partial(run_step, settings=self.settings)
        self._step = sharding.one_at_a_time(
            jax.jit(step, donate_argnums=0, out_shardings=(shardings, copied)), mesh
        )
        outputs = functools.partial(run_evaluation, settings=self.settings)
        self._outputs = sharding.one_at_a_time(
            jax.jit(outputs, in_shardings=(shardings, split), out_shardings=copied), mesh
        )
        # An argument and no constant: runs that differ in it alone share the compilation cache.
        self._seed = np.uint32(config.seed)
        # Each process's answer to "was it asked to stop?", on each of its devices.
        own = len(mesh.local_devices)
        self._votes = {
            asked: sharding.from_shares(np.full(own, asked, np.float32), mesh)
            if mesh.is_multi_process
            else None
            for asked in (False, True)
        }

    def step(
        self, state: TrainState, data: ResidentSplit | Batch, *, stopping: bool = False
    ) -> tuple[TrainState, Metrics]:
        """Starts a training step on data of `feed`, and returns before it has ended.

        The state before it is donated. `stopping` is True if this process was asked to stop.
        """
        result = self._step(state, data, self._seed, self._votes[stopping])
        self.alive()
        return result

    def outputs(self, state: TrainState, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """The network's outputs for some inputs, in batches no larger than they need to be.

        Those of a full batch are the bits of `predict`; of smaller ones rounding may differ.
        """
        devices, nothing = self.mesh.size, np.zeros(len(inputs), np.int32)
        size = 1 << max(len(inputs) - 1, 7).bit_length()
        size = min(-(-size // devices) * devices, self.config.evaluation.batch_size)
        return self.predict(state, Part(inputs, nothing, nothing), batch_size=size).outputs

    def predict(
        self, state: TrainState, part: Part, *, batch_size: int | None = None
    ) -> Predictions:
        """The network's outputs for every example of a part; each process reads its share.

        The batch size is by default the config's, of evaluation.
        """

        def outputs_of(images: np.ndarray) -> dict[str, jax.Array]:
            outputs = self._outputs(state, sharding.from_shares(images, self.mesh))
            self.alive()
            return outputs

        batch_size = batch_size or self.config.evaluation.batch_size
        share = sharding.share(batch_size, self.mesh)
        predictions = predict(part, outputs_of, batch_size, share=share)
        bad = [name for name, x in predictions.outputs.items() if not np.isfinite(x).all()]
        if bad:
            raise NonFiniteError(
                f"the evaluation of {len(part.labels):,} examples: {', '.join(bad)} not finite"
            )
        return predictions

    def feed(self, part: Part, start: int) -> Iterator[ResidentSplit | Batch]:
        """Yields what each step after `start` takes; see `data.loading`."""
        total = self.total_steps
        return training_feed(
            part, self.config, self.placement, self.mesh, start=start, total_steps=total
        )

    def steps_of(self, epochs: float) -> int:
        """Epochs as a number of steps, at least one."""
        return max(round(epochs * self.steps_per_epoch), 1)

    def check(self) -> None:
        """Checks the free memory, the weights' file, the views and the steps to be traced."""
        crops = self.settings.cropped and self.settings.augmentation.min_crop_area < 1
        if self.settings.views > 1 and crops:
            raise InputError(
                "config.loss.views=2 augments an image twice, and the host crops it once; use "
                "config.data.placement='device' or 'disk'"
            )
        traced = parse_steps(self.config.profile.steps)
        if traced and traced[-1] > self.total_steps:
            raise InputError(
                f"config.profile.steps={self.config.profile.steps!r} is beyond the run's "
                f"{self.total_steps:,} steps"
            )
        self._check_memory()
        if self.config.model.pretrained:
            self._load_pretrained(self.state_like)

    def _check_memory(self) -> None:
        size = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves(self.state_like)
        )
        free = free_memory(self.mesh)
        if size * self.mesh.size > free:
            options = {k: v for k, v in self.config.model.items() if type(v) is int}
            shown = " and ".join(f"{name}={value}" for name, value in options.items())
            raise InputError(
                f"config.model.name={self.config.model.name!r} of {shown} has "
                f"{self.num_parameters:,} parameters: the state takes {size / 1e9:,.1f} GB on each "
                f"of {self.mesh.size} devices, and {free / 1e9:,.1f} GB are free on all; make it "
                "smaller, or config.loss.queue_size"
            )

    def advice(self, seconds: float) -> str:
        """Names a faster network where a training on CPUs takes long, by their FLOP."""
        section, shape = self.config.model, self.info.image_shape
        if jax.default_backend() != "cpu" or seconds < _LONG or len(shape) < 3:
            return ""
        section = ConfigDict({"name": ON_CPU, "dtype": section.dtype, "pretrained": ""})
        network = self.settings.network
        small = network.clone(backbone=make_backbone(section))
        times = training_flops(network, shape) / training_flops(small, shape)
        less = f" (--config.model.name={ON_CPU}: {times:.0f} times less arithmetic)"
        return less if times >= 2 else ""

    @property
    def num_parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(x.size for x in jax.tree.leaves(self.state_like.params))

    def create_state(self) -> tuple[TrainState, str | None]:
        """The state before the first step, and a line on its pretrained weights, if any."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state_like)
        state = jax.jit(self._create, out_shardings=shardings)(self._seed)
        if not self.config.model.pretrained:
            return state, None
        params, batch_stats, message = self._load_pretrained(state)
        copied = sharding.replicated(self.mesh)
        params, batch_stats = jax.device_put((params, batch_stats), copied)
        memory = jax.jit(self._create_memory, out_shardings=copied)(params)
        return state.replace(params=params, batch_stats=batch_stats, memory=memory), message

    def _load_pretrained(self, like: TrainState) -> tuple[optax.Params, optax.Params, str]:
        path = Path(self.config.model.pretrained).expanduser()
        return load_pretrained(path, like.params, like.batch_stats)

    def _create_memory(self, params: optax.Params) -> Any:
        memory = self.method.memory
        return memory.create(params, self.train_size, self.config) if memory else {}

    def alive(self) -> None:
        """Tells the watchdog that something that may take long is done."""
        if self._alive is not None:
            self._alive()
