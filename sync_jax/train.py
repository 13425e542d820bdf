"""Training a selective classifier, from a config to a report."""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from sync_jax import sharding
from sync_jax.checkpoint import Checkpoints
from sync_jax.config import check_sizes, describe_differences, to_json
from sync_jax.data import catalogue, host, pictures
from sync_jax.data.augmentation import normalise
from sync_jax.data.parts import Part, load_test, load_train_and_calibration
from sync_jax.data.placement import Placement, choose, free_memory
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import (
    ResidentSplit,
    epoch_constants,
    put_on_devices,
    training_batch,
)
from sync_jax.data.squares import Squares
from sync_jax.errors import InputError, TerminatedError
from sync_jax.evaluate import Predictions, evaluation_record, predict, summary
from sync_jax.losses import Terms
from sync_jax.methods import METHODS, training_objective
from sync_jax.models import make_network
from sync_jax.models.pretrained import load_pretrained
from sync_jax.optimizer import learning_rate_schedule, make_optimizer
from sync_jax.printable import say
from sync_jax.process import exclusive, terminated
from sync_jax.progress import MetricWriter, Progress, read_metrics
from sync_jax.report import read_report, show_report, write_report
from sync_jax.steps import Batch, TrainState, create_train_state, eval_step, train_step


class NonFiniteError(Exception):
    """The loss, one of its terms or the gradient is not a finite number."""


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains, or goes on with a run that was stopped, then calibrates, evaluates and reports.

    Args:
        config: validated.
        workdir: made when needed; holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
            predictions_*.npz, and, when the run is finished, risk_coverage.png and report.json.

    Raises:
        InputError: the dataset cannot be had, the batch cannot be split over the devices, or
            `workdir` holds another experiment.
        NonFiniteError: training diverged.
        TerminatedError: stopped by SIGTERM; the state is saved.
        WriteError: a checkpoint cannot be written.
    """
    mesh = sharding.make_mesh()
    check_run(config, workdir)
    if (report := read_report(workdir)) is not None:
        say(f"{workdir} holds a finished run: nothing to train. Its report:")
        if report["config"]["evaluation"] == json.loads(to_json(config))["evaluation"]:
            show_report(report, workdir)
        else:  # other coverages, target risks or delta than it was made with
            evaluate_finished(config, workdir)
        return
    if not catalogue.is_ready(config.data):
        catalogue.make_ready(config.data)
    check_sizes(config)
    placement = place(config, mesh)
    train_part, calibration_part = load_train_and_calibration(
        config.data, decode=not placement.on_device
    )
    run = Run(config, mesh, train_size=len(train_part.labels), placement=placement)
    run.check()
    with exclusive(workdir), terminated() as stopping:
        prepare_workdir(config, workdir)
        state, start = run.create_state(), 0
        print(run.describe(state, len(calibration_part.labels)))
        print(placement.reason)
        with Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
            if (restored := checkpoints.restore(state)) is not None:
                state, start = restored
                print(f"resuming at step {start} of {run.total_steps}")
            elif config.model.pretrained:
                state, message = run.load_pretrained(state)
                say(message)
            state = fit(
                run, state, start, train_part, calibration_part, checkpoints, workdir, stopping
            )
        finish(run, state, calibration_part, workdir, stopping)


def fit(
    run: "Run",
    state: TrainState,
    start: int,
    train_part: Part,
    calibration_part: Part,
    checkpoints: Checkpoints,
    workdir: Path,
    stopping: Callable[[], bool],
) -> TrainState:
    """The training loop: steps `start` to the last.

    Raises:
        TerminatedError: `stopping` said so; the state is saved.
        NonFiniteError: training diverged.
        WriteError: a checkpoint cannot be written.
    """
    config = run.config
    feed = run.feed(train_part, start)
    save_every = run.steps_of(config.checkpoint.every_epochs)
    calibrate_every = run.steps_of(config.log.calibration_every_epochs)
    unchecked: list[tuple[int, Terms]] = []  # metrics still on the device, by the steps then done
    with (
        MetricWriter(workdir, start_step=start) as writer,
        Progress(
            total_steps=run.total_steps, start_step=start, batch_size=config.train.batch_size
        ) as progress,
    ):
        for done in range(start + 1, run.total_steps + 1):
            state, metrics = run.step(state, next(feed))
            unchecked.append((done, metrics))
            progress.step(done)
            last = done == run.total_steps
            if done % config.log.every_steps == 0 or last:
                # All but the newest, which is being computed: the device never waits for the host.
                averages = check_and_average(unchecked if last else unchecked[:-1])
                unchecked = [] if last else unchecked[-1:]
                if averages:
                    writer.write(done, "train", averages)
                    progress.metrics(done, averages)
            calibrates, saves = (
                done % every == 0 or last for every in (calibrate_every, save_every)
            )
            stops = stopping() and not last
            if calibrates or saves or stops:
                # Nothing non-finite is evaluated or saved. This waits for the device.
                check_and_average(unchecked)
                check_state(state, done)
            if calibrates:
                values = run.calibration_metrics(state, calibration_part)
                writer.write(done, "calibration", values)
                progress.line(describe_calibration(done, done / run.steps_per_epoch, values))
            if saves or stops:
                checkpoints.save(state, done)
            if stops:
                checkpoints.wait()
                raise TerminatedError(f"stopped by SIGTERM, saved at step {done}")
        checkpoints.wait()
    return state


def finish(
    run: "Run",
    state: TrainState,
    calibration_part: Part,
    workdir: Path,
    stopping: Callable[[], bool],
) -> None:
    """Predicts on the calibration and the test split, and writes the report.

    Raises:
        TerminatedError: `stopping` said so; the trained state is saved.
    """
    calibration = run.predict(state, calibration_part)
    calibration.save(workdir / "predictions_calibration.npz")
    if stopping():
        raise TerminatedError("stopped by SIGTERM before the evaluation on test")
    test = run.predict(state, load_test(run.config.data, decode=not run.placement.on_device))
    test.save(workdir / "predictions_test.npz")
    evaluate_finished(run.config, workdir)


def evaluate_finished(config: ConfigDict, workdir: Path) -> None:
    """Makes the report of a trained run from its saved predictions; nothing is trained.

    Args:
        config: validated; of its run, but for the `evaluation` section.
        workdir: of a run that was trained to its end.

    Raises:
        InputError: there is no such run, or it is another experiment.
    """
    check_workdir(config, workdir)
    calibration = Predictions.load(workdir / "predictions_calibration.npz")
    test = Predictions.load(workdir / "predictions_test.npz")
    score = METHODS[config.method].score
    record = evaluation_record(calibration, test, config, score=score)
    entries = read_metrics(workdir)
    record["training"] = {
        "steps": max((entry["step"] for entry in entries), default=None),
        "seconds": max((entry["seconds"] for entry in entries), default=None),
    }
    report = write_report(record, test, config, workdir)
    show_report(report, workdir)


def prepare(config: ConfigDict) -> None:
    """Obtains and prepares the config's dataset; once is enough.

    Raises:
        InputError: it cannot be had.
    """
    catalogue.make_ready(config.data)
    if config.data.name in pictures.NAMES:
        print(place(config, sharding.make_mesh()).reason)


def place(config: ConfigDict, mesh: jax.sharding.Mesh) -> Placement:
    """Where the images of a prepared dataset are to be; makes the squares if that needs them.

    Raises:
        InputError: there is no room for them.
    """
    info = catalogue.dataset_info(config.data)
    if info is None:
        raise InputError(f"{config.data.name} is not prepared; --mode=prepare does it")
    placement = choose(config.data, info, mesh)
    if placement.on_device and config.data.name in pictures.NAMES:
        pictures.prepare_squares(config.data)
    return placement


class Run:
    """What a config builds once: network, optimiser and the compiled functions.

    Attributes:
        config: validated.
        mesh: over which the batch is split.
        info: the dataset's.
        placement: of the training images.
        steps_per_epoch: may be fractional: no example is left out at an epoch's end.
        total_steps: of the run.
    """

    def __init__(
        self,
        config: ConfigDict,
        mesh: jax.sharding.Mesh,
        *,
        train_size: int,
        placement: Placement | None = None,
    ):
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

        def step(
            state: TrainState, data: ResidentSplit | Batch, seed: Array
        ) -> tuple[TrainState, Terms]:
            batch = resident_batch(state, data, seed) if isinstance(data, ResidentSplit) else data
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
            )

        def outputs(state: TrainState, images: Array) -> dict[str, Array]:
            return eval_step(state, normal(images), network=self.network)

        compiled = jax.jit(step, donate_argnums=0, out_shardings=copied)
        # An argument and no constant: runs that differ in it alone share the compilation cache.
        seed = np.uint32(config.seed)
        self.step = sharding.one_at_a_time(lambda state, data: compiled(state, data, seed), mesh)
        self._outputs = sharding.one_at_a_time(
            jax.jit(outputs, in_shardings=(copied, split), out_shardings=copied), mesh
        )

    def steps_of(self, epochs: float) -> int:
        """Epochs as a number of steps, at least one."""
        return max(round(epochs * self.steps_per_epoch), 1)

    def feed(self, part: Part, start: int) -> Iterator[ResidentSplit | Batch]:
        """What each step from `start` on takes: the resident split, or the host's batches."""
        if self.placement.on_device:
            images = part.images.uncut() if isinstance(part.images, Squares) else part.images
            split = put_on_devices(images, part.labels, self.mesh, sharded=self.placement.sharded)
            yield from itertools.repeat(split)
            return
        batch_size, size = self.config.train.batch_size, len(part.labels)
        assert not isinstance(part.images, Squares)
        examples = host.Examples(
            part.images,
            part.labels,
            epoch_constants(self.config.seed, -(-self.total_steps * batch_size // size)),
            self.config.seed,
            self.augmentation,
            self.info.image_shape[0],
        )
        split_batch = sharding.batch_sharding(self.mesh)
        for batch in host.batches(
            examples,
            start=start,
            stop=self.total_steps,
            batch_size=batch_size,
            process=jax.process_index(),
            processes=jax.process_count(),
            workers=self.config.data.workers,
        ):
            whole = batch | {"mask": np.ones(len(batch["label"]), np.float32)}
            yield {
                name: jax.make_array_from_process_local_data(split_batch, array)
                for name, array in whole.items()
            }

    def create_state(self) -> TrainState:
        """The state before the first step, on every device."""
        copied = sharding.replicated(self.mesh)
        return jax.jit(self._creator(), out_shardings=copied)(jnp.uint32(self.config.seed))

    def _creator(self) -> Callable[..., TrainState]:
        return functools.partial(
            create_train_state,
            network=self.network,
            optimizer=self.optimizer,
            image_shape=self.info.image_shape,
            create_memory=self._create_memory,
        )

    def check(self) -> None:
        """Makes sure, before anything is written, that the state fits and that the weights do.

        Raises:
            InputError: it takes more memory than is free, or the file cannot be used.
        """
        config = self.config
        state = jax.eval_shape(self._creator(), jnp.uint32(0))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
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

    def _create_memory(self, params: optax.Params) -> Any:
        memory = METHODS[self.config.method].memory
        return memory.create(params, self.train_size, self.config) if memory else {}

    def predict(self, state: TrainState, part: Part) -> Predictions:
        """The network's outputs for every example of a part."""
        outputs_of = functools.partial(self._outputs, state)
        return predict(part, outputs_of, self.config.evaluation.batch_size)

    def calibration_metrics(self, state: TrainState, part: Part) -> dict[str, float]:
        """What is logged of the calibration split while training."""
        predictions = self.predict(state, part)
        values = summary(predictions)
        names = ("accuracy", "negative_log_likelihood", "mean_selection")
        return {name: values[name] for name in names if name in values}

    def describe(self, state: TrainState, calibration_size: int) -> str:
        """One line on what will run."""
        config = self.config
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        devices = f"{self.mesh.size} {jax.devices()[0].platform.upper()} device"
        return (
            f"{config.method} on {config.data.name}: {self.train_size:,} training and "
            f"{calibration_size:,} calibration images; {config.model.name} with {parameters:,} "
            f"parameters; {self.total_steps:,} steps of {config.train.batch_size} on {devices}"
            f"{'s' if self.mesh.size > 1 else ''}"
        )


def check_devices() -> None:
    """Makes sure that JAX finds a device.

    Raises:
        InputError: it does not; says what it was told to look for.
    """
    try:
        jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        told = f" (JAX_PLATFORMS={platforms})" if platforms else ""
        reason = " ".join(str(error).split()).removesuffix(".")
        raise InputError(
            f"JAX finds no device{told}: {reason}; JAX_PLATFORMS=cpu always works"
        ) from error


def check_run(config: ConfigDict, workdir: Path) -> None:
    """Refuses what `train_and_evaluate` could not begin with, whatever the data are.

    Raises:
        InputError: the batch cannot be split over the devices, or `workdir` cannot be the run's.
    """
    mesh = sharding.make_mesh()
    sharding.check_divisible("config.train.batch_size", config.train.batch_size, mesh)
    sharding.check_divisible("config.evaluation.batch_size", config.evaluation.batch_size, mesh)
    check_workdir(config, workdir)
    for name in ("checkpoints", "tensorboard"):
        if (workdir / name).exists() and not (workdir / name).is_dir():
            raise InputError(f"{workdir / name} is not a folder; name another --workdir")
    read_metrics(workdir)


def check_workdir(config: ConfigDict, workdir: Path) -> None:
    """Refuses a folder that cannot be the run's, or is another run's.

    Raises:
        InputError: naming the fields that differ.
    """
    try:
        nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        path, report = workdir / "config.json", workdir / "report.json"
        has_config, has_report = path.exists(), report.exists()
    except OSError as error:  # a name too long, a folder that is another user's
        raise InputError(f"--workdir={workdir} cannot be used: {error.strerror}") from error
    if not nearest.is_dir():
        whose = (
            "is not a folder" if nearest == workdir else f"is below {nearest}, which is no folder"
        )
        raise InputError(f"--workdir={workdir} {whose}")
    if has_report and not has_config:
        raise InputError(
            f"--workdir={workdir} holds a report and no config.json, as an ensemble's folder; name "
            "another --workdir"
        )
    if has_config:
        differing = describe_differences(config, path)
        if differing:
            raise InputError(
                f"--workdir={workdir} holds another experiment: {'; '.join(differing)}; name "
                "another --workdir, or the same values"
            )


def prepare_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the folder and saves the resolved config in it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = workdir / "config.json.incomplete"
        temporary.write_text(to_json(config))
        os.replace(temporary, workdir / "config.json")
    except OSError as error:
        raise InputError(f"--workdir={workdir} cannot be written: {error.strerror}") from error


def check_and_average(unchecked: list[tuple[int, Terms]]) -> dict[str, float]:
    """Fetches metrics, makes sure that they are finite, and averages them.

    Raises:
        NonFiniteError: naming the first bad step and the terms that are not finite then.
    """
    fetched = jax.device_get([metrics for _, metrics in unchecked])
    for (done, _), metrics in zip(unchecked, fetched, strict=True):
        bad = [f"{name}={value}" for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            good = [
                f"{name}={value:.4g}" for name, value in metrics.items() if math.isfinite(value)
            ]
            raise NonFiniteError(
                f"step {done}: {', '.join(bad)} (finite: {', '.join(good) or 'nothing'}); a"
                " smaller config.optimizer.learning_rate or a longer warm-up usually helps"
            )
    if not fetched:
        return {}
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}


def check_state(state: TrainState, done: int) -> None:
    """Makes sure that a state may be saved.

    Raises:
        NonFiniteError: naming the step and the part of the state.
    """
    for name in ("params", "batch_stats", "opt_state", "memory"):
        if not bool(_all_finite(getattr(state, name))):
            raise NonFiniteError(f"step {done}: {name} holds a number that is not finite")


@jax.jit
def _all_finite(tree: optax.Params) -> Array:
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite)) if finite else jnp.asarray(True)


def describe_calibration(done: int, epoch: float, values: dict[str, float]) -> str:
    """One line on the calibration split."""
    selection = ""
    if "mean_selection" in values:
        selection = f"  mean g {values['mean_selection']:.3f}"
    return (
        f"epoch {epoch:.1f} (step {done}): calibration accuracy {values['accuracy']:.4f}{selection}"
    )
