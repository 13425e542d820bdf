"""Training a selective classifier, from a config to a report."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from sync_jax.config import describe_differences, find_method, from_saved, to_json, upgraded
from sync_jax.data import registry
from sync_jax.data.datasets.image_folder import ImageFolder, source_of
from sync_jax.data.images import Layout
from sync_jax.data.info import Dataset, DatasetInfo, few
from sync_jax.data.loading import known_info, load_data
from sync_jax.data.prepare.layouts import Source, labelled_pictures
from sync_jax.data.prepare.pictures import FilePictures
from sync_jax.data.preprocessing import Preprocessing
from sync_jax.data.resident import examples_of_step
from sync_jax.data.splits import Part, load_test
from sync_jax.errors import InputError, TerminatedError
from sync_jax.evaluation.predictions import Predictions, write_examples
from sync_jax.evaluation.record import calibration_metrics, evaluation_record
from sync_jax.evaluation.report import (
    read_report,
    shifted,
    show_report,
    speed_before,
    write_report,
)
from sync_jax.evaluation.tables import show
from sync_jax.guarantees.binomial import fewest_accepted
from sync_jax.runtime import profiling, sharding
from sync_jax.runtime.checkpoint import Checkpoints, latest_notes
from sync_jax.runtime.console import printable, say
from sync_jax.runtime.files import check_plain, write_text
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.profiling import Stopwatch, Trace, parse_steps
from sync_jax.runtime.signals import terminated, watchdog
from sync_jax.runtime.training_log import TrainingLog, read_metrics
from sync_jax.runtime.workdir import (
    check_run,
    check_shared,
    check_workdir,
    is_abandoned,
    owned,
    prepare_workdir,
    refuse_differences,
    saved_configs,
    writing,
)
from sync_jax.steps import Metrics, TrainState
from sync_jax.trainer import Trainer, check_dataset, resolve


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains, or goes on with a run that was stopped, then calibrates, evaluates and reports.

    The config has gone through `trainer.resolve`. The folder is made when needed; all processes
    must see the same one, or end. It holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
    predictions_*.npz and, when the run is finished, risk_coverage.png, report.html and report.json.

    Raises:
        InputError: the data cannot be had or do not fit, or `workdir` holds another experiment.
        FailedError, TerminatedError, WriteError: see `sync_jax.errors`.
    """
    processes = Processes(seconds=config.process.wait_seconds)
    if processes.from_first("the workdir", lambda: is_finished(config, workdir)):
        return
    with prepared(config, registry.dataset(config.data), workdir, processes) as job:
        if line := beyond_proof(config, job.calibration_part):
            processes.print(line)
        finish(job, fit(job, begin(job)))


def beyond_proof(config: ConfigDict, calibration: Part) -> str:
    """One line on the target risks that no calibration split of this size can certify, or ''."""
    size, what = len(calibration.labels), "images"
    if calibration.groups is not None:
        size, what = len(np.unique(calibration.groups)), "groups of images"
    delta = config.evaluation.delta
    needed = {risk: fewest_accepted(risk, delta) for risk in config.evaluation.target_risks}
    beyond = [
        f"{100 * risk:g} % (at least {n:,} are needed, without an error)"
        for risk, n in sorted(needed.items(), reverse=True)
        if n > size
    ]
    if not beyond:
        return ""
    return (
        f"{size:,} calibration {what} cannot certify an error rate of "
        f"{', '.join(beyond)} at config.evaluation.delta={delta:g}; more of "
        "them can"
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """A training and all that it works with; `stopping` tells that SIGTERM has come."""

    trainer: Trainer
    dataset: Dataset
    train_part: Part
    calibration_part: Part
    workdir: Path
    processes: Processes
    checkpoints: Checkpoints
    stopping: Callable[[], bool]


@contextlib.contextmanager
def prepared(
    config: ConfigDict, dataset: Dataset, workdir: Path, processes: Processes
) -> Iterator[Job]:
    """Loads the data, builds the trainer, and holds the run's folder meanwhile."""
    mesh = sharding.make_mesh()
    # What is known of the data is checked before anything is prepared, and again afterwards.
    processes.together("checking the config", lambda: check_dataset(config, dataset.info()))
    check_shared(workdir, processes)
    placement, train_part, calibration_part = load_data(config, dataset, mesh, workdir, processes)
    info = known_info(dataset)
    check_dataset(config, info)
    train_size = len(train_part.labels)
    with watchdog(config.process.watchdog_seconds) as alive:
        trainer = Trainer(
            config, mesh, info, train_size=train_size, placement=placement, alive=alive
        )
        processes.together("the check of the run", trainer.check)
        with (
            terminated() as stopping,
            processes.ending_together(),
            owned(workdir, processes),
            Checkpoints(
                workdir / "checkpoints",
                keep=config.checkpoint.keep,
                keep_best=config.checkpoint.keep_best,
                best_metric=config.checkpoint.best_metric,
                processes=processes,
            ) as checkpoints,
        ):
            processes.share("connecting the devices")
            sharding.connect(mesh)
            processes.print(describe(trainer, calibration_part))
            processes.print(placement.reason)
            yield Job(
                trainer, dataset, train_part, calibration_part, workdir, processes, checkpoints,
                stopping,
            )  # fmt: skip


def describe(trainer: Trainer, calibration: Part) -> str:
    """One line on the training that is about to begin."""
    grouped = ""
    if calibration.groups is not None:
        grouped = f" in {len(np.unique(calibration.groups)):,} groups"
    config, devices, count = trainer.config, trainer.mesh.size, jax.process_count()
    info = trainer.info
    processes = f" of {count} processes" if count > 1 else ""
    return (
        f"{config.method} on {config.data.name}: {trainer.train_size:,} training and "
        f"{len(calibration.labels):,} calibration images{grouped} of {info.num_classes} classes "
        f"({few(info.class_names)}); {config.model.name} with "
        f"{trainer.num_parameters:,} parameters; {trainer.total_steps:,} steps of "
        f"{config.train.batch_size} on {devices} {jax.devices()[0].platform.upper()} device"
        f"{'s' if devices > 1 else ''}{processes}{info.note and '; '}{info.note}"
    )


class Start(NamedTuple):
    """The state after some steps, and the metrics, by step, that no log line has averaged yet."""

    state: TrainState
    step: int
    unlogged: list[tuple[int, dict[str, float]]]


class Fitted(NamedTuple):
    """The trained state, and the seconds of this process's steps by phase."""

    state: TrainState
    steps: int
    seconds: dict[str, float]


def begin(job: Job) -> Start:
    """Restores the latest checkpoint, or creates the state before the first step."""
    trainer, processes = job.trainer, job.processes
    restored = job.checkpoints.restore(
        trainer.state_like, processes.print, last=trainer.total_steps
    )
    if restored is not None:
        refuse_differences(trainer.config, restored.notes["config"], job.workdir)

    def write() -> None:
        check_same_data(trainer.config, job.dataset, job.workdir)
        prepare_workdir(trainer.config, job.workdir)
        known = dataclasses.asdict(trainer.info) | {
            "train_size": trainer.train_size,
            "digest": job.dataset.digest(),
        }
        write_text(job.workdir / "dataset.json", json.dumps(known, indent=1) + "\n")
        for report in job.dataset.reports():
            shutil.copyfile(report, job.workdir / report.name)

    processes.from_first("writing the config", write)
    if restored is not None:
        processes.print(f"resuming at step {restored.step} of {trainer.total_steps}")
        unlogged = [(done, values) for done, values in restored.notes["unlogged"]]
        return Start(restored.state, restored.step, unlogged)
    state, message = trainer.create_state()
    if message:
        processes.print(message)
    return Start(state, 0, [])


def check_same_data(config: ConfigDict, dataset: Dataset, workdir: Path) -> None:
    """Raises an InputError where the run in the folder was begun on other data."""
    path = workdir / "dataset.json"
    before = read_dataset(path)["digest"] if path.exists() else ""
    now = dataset.digest()
    if before and now:
        same, how = before == now, f"digest {before[:12]}, now {now[:12]}"
    else:  # a run of an earlier version
        same, how = not has_moved(config, workdir), f"now config.data.folder={config.data.folder!r}"
    if not same and not is_abandoned(config, workdir):
        raise InputError(
            f"--workdir={workdir} holds a run on other data ({how}); name another --workdir"
        )


def has_moved(config: ConfigDict, workdir: Path) -> bool:
    """Returns True where the run in the folder was begun with its pictures in another place."""
    folders = {upgraded(saved).get("data.folder") for saved in saved_configs(workdir)}
    return any(os.path.abspath(x or "") != os.path.abspath(config.data.folder) for x in folders)


def read_dataset(path: Path) -> dict[str, Any]:
    """Reads a run's dataset.json: the fields of `DatasetInfo`, `train_size` and `digest`."""
    try:
        known: dict[str, Any] = json.loads(path.read_text())
        if not {"class_names", "mean", "std", "train_size", "digest"} <= known.keys():
            raise ValueError("fields are missing")
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing: an earlier version trained the run; train it anew"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return known


def fit(job: Job, start: Start) -> Fitted:
    """The training loop: the steps after `start` to the last."""
    trainer, config, processes = job.trainer, job.trainer.config, job.processes
    state, total = start.state, trainer.total_steps
    periods = config.log.calibration_every_epochs, config.checkpoint.every_epochs
    calibrate_every, save_every = map(trainer.steps_of, periods)
    traced = parse_steps(config.profile.steps) if processes.first else range(0)

    def indices(step: int) -> np.ndarray:
        size = config.train.batch_size
        examples = examples_of_step(config.seed, step, batch_size=size, size=trainer.train_size)
        return job.train_part.index[examples]

    with (
        Stopwatch() as watch,
        TrainingLog(
            job.workdir,
            config,
            start_step=start.step,
            total_steps=total,
            unlogged=start.unlogged,
            indices=indices,
            processes=processes,
            advice=trainer.advice,
        ) as log,  # fmt: skip
        Trace(traced, job.workdir / "profile", processes.print) as trace,
    ):
        feed = trainer.feed(job.train_part, start.step)
        for done in range(start.step + 1, total + 1):
            with watch.spent("data", busy=log.is_device_busy):
                data = next(feed)
            with trace.step(done):
                state, metrics = trainer.step(state, data, stopping=job.stopping())
            trace.done(done, metrics)
            oldest, last = log.add(done, metrics), done == total
            calibrates, saves = (last or done % x == 0 for x in (calibrate_every, save_every))
            stops = not last and asked_to_stop(job, metrics, oldest)
            log.update(done, wait=calibrates or saves or stops, last=last)
            if not (calibrates or saves or stops):
                continue
            score = None
            if calibrates:
                with watch.spent("evaluating"):
                    score = calibrate(job, log, state, done)
            if saves or stops:
                with watch.spent("saving"):
                    save(job, log, state, done, score)
            if stops:
                job.checkpoints.wait()
                raise TerminatedError(f"stopped by SIGTERM, saved at step {done}")
        with watch.spent("saving"):
            job.checkpoints.wait()
    return Fitted(state, total - start.step, watch.seconds)


def asked_to_stop(job: Job, newest: Metrics, oldest: Metrics | None) -> bool:
    """Returns True at the step at which the run has to stop, the same on all processes.

    Each process adds its vote to every step, and all read the sum two steps later, when it has
    been computed: nobody waits, and all stop at the same step.
    """
    if newest.stop_vote is None:  # one process
        return job.stopping()
    return oldest is not None and bool(oldest.stop_vote)


def calibrate(job: Job, log: TrainingLog, state: TrainState, done: int) -> float:
    """Evaluates on the calibration split; returns the checkpoint's score, higher is better."""
    trainer, best = job.trainer, job.trainer.config.checkpoint.best_metric
    values = calibration_metrics(trainer.predict(state, job.calibration_part))
    log.calibration(done, done / trainer.steps_per_epoch, values)
    return values[best] if best == "accuracy" else -values[best]


def save(job: Job, log: TrainingLog, state: TrainState, done: int, score: float | None) -> None:
    """Saves a checkpoint in the background."""
    log.flush()
    notes = {
        "config": job.trainer.config.to_dict(),
        "unlogged": log.unlogged,
        "placement": job.trainer.placement.where,
    }
    job.checkpoints.save(state, done, notes=notes, score=score)
    job.trainer.alive()


def finish(job: Job, fitted: Fitted) -> None:
    """Predicts on the calibration and the test split, and writes the report."""
    trainer, workdir, processes, state = job.trainer, job.workdir, job.processes, fitted.state
    calibration = trainer.predict(state, job.calibration_part)
    processes.from_first(
        "writing the predictions",
        lambda: calibration.save(workdir / "predictions_calibration.npz"),
    )
    of_calibration = "calibration" if trainer.info.num_calibration else "train"
    if any(processes.share("the evaluation on test", job.stopping())):
        raise TerminatedError("stopped by SIGTERM before the evaluation on test")
    test_part = processes.together(
        "reading the test split",
        lambda: load_test(job.dataset, decode=trainer.placement.decoded),
    )
    trainer.alive()
    test = trainer.predict(state, test_part)

    def report() -> None:
        test.save(workdir / "predictions_test.npz")
        named = {"calibration": (calibration, of_calibration), "test": (test, "test")}
        examples = {
            name: (predictions, job.dataset.files(split))
            for name, (predictions, split) in named.items()
        }
        write_examples(workdir / "examples.csv", examples, trainer.info.class_names)
        evaluate_finished(trainer.config, workdir, speed=measure_speed(trainer, fitted))

    processes.from_first("the report", report)


def measure_speed(trainer: Trainer, fitted: Fitted) -> dict[str, Any] | None:
    """The speed of a training, see `profiling.speed`; None of no steps. The device is idle."""
    if not fitted.steps:
        return None
    # Simulated devices share a processor; other hosts and devices are taken to be as this one.
    devices = jax.process_count() if jax.default_backend() == "cpu" else trainer.mesh.size
    return profiling.speed(
        fitted.seconds,
        steps=fitted.steps,
        batch_size=trainer.config.train.batch_size,
        train_size=trainer.train_size,
        flops=profiling.training_flops(trainer.settings.network, trainer.info.image_shape),
        peak=devices * profiling.matmul_flops(trainer.config.model.dtype),
    )


def evaluate_finished(
    config: ConfigDict, workdir: Path, *, speed: dict[str, Any] | None = None
) -> None:
    """Makes the report of a trained run from its saved predictions; the first process does it.

    The config may differ from the run's in the `evaluation` section. The speed of the training is
    taken from an earlier report if it is not given.
    """
    if jax.process_index() > 0:
        return
    check_workdir(config, workdir)
    calibration, test = load_predictions(workdir)
    if not (workdir / "config.json").exists():  # it was lost
        prepare_workdir(config, workdir)
    score = find_method(config.method).score
    record = evaluation_record(calibration, test, config, score=score)
    entries = read_metrics(workdir)
    record["training"] = {
        "steps": max((entry["step"] for entry in entries), default=None),
        "seconds": max((entry["seconds"] for entry in entries), default=None),
        "speed": speed or speed_before(workdir),
    }
    report = write_report(record, test, config, workdir)
    show_report(report, workdir)


def evaluate(config: ConfigDict, workdir: Path) -> None:
    """Makes a run's report anew, with a config's section `evaluation` and else the run's own.

    Reads the saved predictions, and nothing of the data.
    """
    if jax.process_index() > 0:
        return
    check_plain(workdir)
    for saved in saved_configs(workdir)[:1]:
        own = from_saved(saved)
        other = config.data.folder
        elsewhere = other and os.path.abspath(other) != os.path.abspath(own.data.folder)
        named = {"method": (own.method, config.method)}
        if elsewhere:
            named["model.name"] = own.model.name, config.model.name
        for field, (name, given) in named.items():
            if ":" in name and name != given:  # a module that a run's file names
                raise InputError(
                    f"{workdir} was trained with a {field} of another module; add "
                    f"--config.{field}={name} to allow its import"
                )
        own.evaluation = config.evaluation
        if elsewhere:
            evaluate_elsewhere(own, workdir, source_of(config.data))
            return
        if differing := describe_differences(config, saved):
            say(f"{workdir} is evaluated with its own config: {'; '.join(differing)}")
        config = own
    evaluate_finished(config, workdir)


def evaluate_elsewhere(config: ConfigDict, workdir: Path, source: Source) -> None:
    """Evaluates a finished run on labelled pictures of another source, as of another site.

    The thresholds are the run's own, from its calibration split. The report, the predictions and
    their examples go to `workdir/elsewhere/<name of the source>`. Needs nothing but the two.
    """
    if jax.process_count() > 1:
        raise InputError("one process evaluates on another folder; give the command once")
    trainer, state, known = restored(config, workdir)
    prepare, folder = preprocessing_of(config, known), source.path
    if len(prepare.shape) < 3:
        raise InputError(f"{workdir} was trained on feature vectors, not on pictures")
    pictures, note = labelled_pictures(source, known["class_names"])
    images = FilePictures(np.arange(len(pictures)), prepare.shape[0], pictures, prepare)
    labels = np.asarray([picture.label for picture in pictures], np.int32)
    with_note = f" ({note})" if note else ""
    say(f"{len(pictures):,} pictures of {folder}{with_note}, with the thresholds of {workdir}")
    everything = trainer.predict(state, Part(images, labels, np.arange(len(labels))))
    good = np.setdiff1d(everything.index, [*images.bad])
    for row, problem in sorted(images.bad.items())[:5]:
        say(f"cannot be read, left out: {pictures[row].name}: {problem}")
    if images.bad:
        say(f"{len(images.bad):,} of {len(pictures):,} pictures left out")
    if not len(good):
        raise InputError(f"no picture of {folder} can be read")
    outputs = {name: x[good] for name, x in everything.outputs.items()}
    there = Predictions(outputs, labels[good], good)
    calibration, test = load_predictions(workdir)
    record = evaluation_record(calibration, there, config, score=find_method(config.method).score)
    record["training"] = {"steps": trainer.total_steps, "seconds": None, "speed": None}
    word = re.sub(r"[^A-Za-z0-9_-]+", "-", folder.resolve().name) or "root"
    out = workdir / "elsewhere" / word
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        there.save(out / "predictions_test.npz")
        files = np.asarray([printable(picture.name) for picture in pictures])
        write_examples(out / "examples.csv", {"test": (there, files)}, known["class_names"])
        report = write_report(record, there, config, out)
    before = evaluation_record(calibration, test, config, score=record["method_score"])
    show(shifted(before, report, folder))
    say(f"Report: {out / 'report.html'}, report.json and risk_coverage.png beside it")


def restored(config: ConfigDict, workdir: Path) -> tuple[Trainer, TrainState, dict[str, Any]]:
    """The trainer and the last state of a finished run, and its dataset.json."""
    resolve(config)
    known = read_dataset(workdir / "dataset.json")
    info = DatasetInfo.from_json(known)
    trainer = Trainer(config, sharding.make_mesh(), info, train_size=known["train_size"])
    with Checkpoints(
        workdir / "checkpoints", keep=config.checkpoint.keep, processes=Processes()
    ) as checkpoints:
        found = checkpoints.restore(trainer.state_like, say, last=trainer.total_steps)
    if found is None or found.step < trainer.total_steps:
        raise InputError(f"{workdir} holds no checkpoint of a finished training")
    return trainer, found.state, known


def preprocessing_of(config: ConfigDict, known: Mapping[str, Any]) -> Preprocessing:
    """What a run's inputs are, from its config and its dataset.json."""
    shape = tuple(known["image_shape"])
    if len(shape) < 3:
        return Preprocessing(shape)
    layout = Layout.of(config.data)
    if layout.size != shape[0]:  # a dataset of arrays, whose pictures are as large as they are
        return Preprocessing(shape, shape[0], shape[0])
    largest = ImageFolder.LARGEST_SIDE if config.data.name == "image_folder" else None
    return Preprocessing(shape, layout.short_side, layout.stored, largest)


def is_finished(config: ConfigDict, workdir: Path) -> bool:
    """Returns True if nothing is left to train or to predict, and shows the report.

    Makes a missing report from the predictions; False if a checkpoint can replace lost predictions.
    """
    check_run(config, workdir)
    report = read_report(workdir)
    if report is not None and has_moved(config, workdir):
        dataset = registry.dataset(config.data)
        dataset.prepare()
        check_same_data(config, dataset, workdir)
    if not has_predictions(workdir):
        if report is None:
            return False
        if latest_notes(workdir / "checkpoints") is not None:
            say(f"{workdir} lacks predictions: they are made again from its last checkpoint")
            return False
    if report is None:
        say(f"{workdir} was trained to its end: its report is made from its predictions")
        evaluate_finished(config, workdir)
        return True
    say(f"{workdir} holds a finished run: nothing to train. Its report:")
    if report["config"]["evaluation"] == json.loads(to_json(config))["evaluation"]:
        show_report(report, workdir)
    else:  # other coverages, target risks or delta than it was made with
        evaluate_finished(config, workdir)
    return True


def load_predictions(workdir: Path) -> tuple[Predictions, Predictions]:
    """Reads a run's predictions of the calibration and the test split; may raise InputError."""
    calibration, test = (
        Predictions.load(workdir / f"predictions_{split}.npz") for split in ("calibration", "test")
    )
    return calibration, test


def has_predictions(workdir: Path) -> bool:
    """Returns True if a run's predictions are there and whole."""
    try:
        load_predictions(workdir)
    except InputError:
        return False
    return True
