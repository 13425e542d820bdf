"""Training a selective classifier, from a config to a report."""

import contextlib
import dataclasses
import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from ml_collections import ConfigDict

from sync_jax.config import to_json
from sync_jax.data.loading import load_data
from sync_jax.data.parts import Part, load_test
from sync_jax.errors import NonFiniteError, TerminatedError
from sync_jax.evaluation.record import Predictions, evaluation_record
from sync_jax.evaluation.report import read_report, show_report, speed_before, write_report
from sync_jax.methods import METHODS
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.console import say
from sync_jax.runtime.nonfinite import NonFiniteSteps
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.profiling import Stopwatch, Trace, parse_steps
from sync_jax.runtime.progress import MetricWriter, Progress, read_metrics
from sync_jax.runtime.signals import terminated, watchdog
from sync_jax.runtime.workdir import (
    check_run,
    check_workdir,
    owned,
    prepare_workdir,
    refuse_differences,
)
from sync_jax.steps import TrainState
from sync_jax.trainer import Metrics, Run


def train_and_evaluate(config: ConfigDict, workdir: Path) -> None:
    """Trains, or goes on with a run that was stopped, then calibrates, evaluates and reports.

    Of several processes, all call it alike.

    Args:
        config: validated.
        workdir: made when needed; holds config.json, metrics.jsonl, tensorboard/, checkpoints/,
            predictions_*.npz, and, when the run is finished, risk_coverage.png and report.json;
            nonfinite.jsonl where a step was not finite. All processes must see the same folder.

    Raises:
        InputError: the dataset cannot be had, the batch cannot be split over the devices, or
            `workdir` holds another experiment.
        NonFiniteError: training diverged.
        FailedError: a process is missing.
        TerminatedError: stopped by SIGTERM; the state is saved.
        WriteError: a checkpoint cannot be written.
    """
    processes = Processes(seconds=config.process.wait_seconds, name=str(workdir))
    if processes.from_first("the workdir", lambda: is_finished(config, workdir)):
        return
    mesh = sharding.make_mesh()
    placement, train_part, calibration_part = load_data(config, mesh, workdir, processes)
    with watchdog(config.process.watchdog_seconds) as alive:
        run = Run(config, mesh, train_size=len(train_part.labels), placement=placement, alive=alive)
        processes.together("the check of the memory", run.check)
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
            bad_steps = NonFiniteSteps(
                workdir,
                action=config.train.on_nonfinite,
                budget=config.train.nonfinite_budget,
                indices=lambda step: train_part.index[run.positions(step)],
                processes=processes,
            )
            job = Job(
                run, train_part, calibration_part, workdir, processes, checkpoints, bad_steps,
                stopping,
            )  # fmt: skip
            processes.print(run.describe(len(calibration_part.labels)))
            processes.print(placement.reason)
            finish(job, fit(job, begin(job)))


@dataclasses.dataclass(frozen=True)
class Job:
    """What a training works with.

    Attributes:
        run: what the config builds.
        train_part: what is trained on.
        calibration_part: what is held out.
        workdir: the run's folder.
        processes: that train together.
        checkpoints: in that folder.
        bad_steps: the steps that were not finite.
        stopping: whether this process was asked to stop.
    """

    run: Run
    train_part: Part
    calibration_part: Part
    workdir: Path
    processes: Processes
    checkpoints: Checkpoints
    bad_steps: NonFiniteSteps
    stopping: Callable[[], bool]


class Start(NamedTuple):
    """Where training begins.

    Attributes:
        state: the training state.
        step: steps done.
        unlogged: metrics of the last of them that no log line has averaged yet, by step.
    """

    state: TrainState
    step: int
    unlogged: list[tuple[int, dict[str, float]]]


class Fitted(NamedTuple):
    """What the training loop leaves.

    Attributes:
        state: after the last step.
        steps: done by this process.
        seconds: that they took, by phase; see `profiling.Stopwatch`.
    """

    state: TrainState
    steps: int
    seconds: dict[str, float]


def begin(job: Job) -> Start:
    """The latest checkpoint, or the state before the first step.

    Raises:
        InputError: no checkpoint can be used, they are another experiment's, or the weights to
            begin with cannot be read.
    """
    run, processes = job.run, job.processes
    restored = job.checkpoints.restore(run.state_like, processes.print)
    if restored is not None:
        refuse_differences(run.config, restored.notes["config"], job.workdir)
    processes.from_first("writing the config", lambda: prepare_workdir(run.config, job.workdir))
    if restored is not None:
        processes.print(f"resuming at step {restored.step} of {run.total_steps}")
        unlogged = [(done, values) for done, values in restored.notes["unlogged"]]
        return Start(restored.state, restored.step, unlogged)
    state = run.create_state()
    if run.config.model.pretrained:
        state, message = run.load_pretrained(state)
        processes.print(message)
    return Start(state, 0, [])


def fit(job: Job, start: Start) -> Fitted:
    """The training loop: the steps after `start` to the last.

    Raises:
        TerminatedError: `stopping` said so, on any process; the state is saved.
        NonFiniteError: training diverged.
        WriteError: a checkpoint cannot be written.
    """
    run, config, processes, bad_steps = job.run, job.run.config, job.processes, job.bad_steps
    state, feed = start.state, job.run.feed(job.train_part, start.step)
    save_every = run.steps_of(config.checkpoint.every_epochs)
    calibrate_every = run.steps_of(config.log.calibration_every_epochs)
    bad_steps.begin(start.step)
    # Metrics by their steps: on the device still, and fetched but in no log line yet.
    unchecked: list[tuple[range, Metrics]] = []
    unlogged = list(start.unlogged)
    every = config.log.every_steps
    next_line = (start.step // every + 1) * every
    newest: deque[Metrics] = deque()
    traced = parse_steps(config.profile.steps) if processes.first else range(0)

    def busy() -> bool:
        """Whether the device has something to do."""
        values: Any = newest[-1].values if newest else None
        return values is not None and not values.is_ready()

    with (
        Stopwatch() as watch,
        contextlib.ExitStack() as opened,
        Progress(
            total_steps=run.total_steps,
            start_step=start.step,
            batch_size=config.train.batch_size,
            shown=processes.first,
        ) as progress,
        Trace(traced, job.workdir / "profile", processes.print) as trace,
    ):
        writer = None
        if processes.first:
            writer = opened.enter_context(MetricWriter(job.workdir, start_step=start.step))
        for steps in run.dispatches(start.step):
            done = steps[-1]
            with watch.spent("data", busy=busy):
                data = next(feed)
            skips = [False] * len(steps)
            with trace.step(steps[0], done):
                state, metrics = run.step(state, data, skips=skips, stopping=job.stopping())
            trace.done(done, metrics)
            unchecked.append((steps, metrics))
            progress.step(done)
            last = done == run.total_steps
            calibrates, saves = (done % x == 0 or last for x in (calibrate_every, save_every))
            # Two dispatches late, so that the device never waits; and the host is no further ahead,
            # so that SIGTERM needs not wait for more than these.
            newest.append(metrics)
            oldest = newest.popleft() if len(newest) > 2 else None
            jax.block_until_ready(oldest)
            stops = job.stopping()
            if metrics.stop_vote is not None:
                stops = oldest is not None and bool(oldest.stop_vote)
            stops = stops and not last
            score = None
            waits = calibrates or saves or stops
            if waits or next_line <= done:
                # All but the newest, which is being computed; but nothing non-finite is evaluated
                # or saved, which waits for the device.
                ready = len(unchecked) if waits else -1
                unlogged += check(unchecked[:ready], bad_steps)
                unchecked = unchecked[ready:] if ready < 0 else []
                fetched = unchecked[0][0][0] - 1 if unchecked else done
                # A line has the steps before its own, and the last line has its own too.
                while next_line <= min(done, fetched + 1) and not (next_line == done and last):
                    unlogged = log_line(next_line, unlogged, writer, progress)
                    next_line += every
                if last:
                    unlogged = log_line(done + 1, unlogged, writer, progress, at=done)
            if waits:
                check_state(state, done)
            if calibrates:
                with watch.spent("evaluating"):
                    values = run.calibration_metrics(state, job.calibration_part)
                if writer:
                    writer.write(done, "calibration", values)
                progress.line(describe_calibration(done, done / run.steps_per_epoch, values))
                best = values[config.checkpoint.best_metric]
                score = best if config.checkpoint.best_metric == "accuracy" else -best
            if saves or stops:
                if writer:
                    writer.flush()
                notes = {
                    "config": config.to_dict(),
                    "unlogged": unlogged,
                    "placement": run.placement.where,
                }
                with watch.spent("saving"):
                    job.checkpoints.save(state, done, notes=notes, score=score)
                run.alive()
            if stops:
                job.checkpoints.wait()
                raise TerminatedError(f"stopped by SIGTERM, saved at step {done}")
        with watch.spent("saving"):
            job.checkpoints.wait()
    return Fitted(state, run.total_steps - start.step, watch.seconds())


def finish(job: Job, fitted: Fitted) -> None:
    """Predicts on the calibration and the test split, and writes the report.

    Raises:
        TerminatedError: `stopping` said so; the trained state is saved.
    """
    run, workdir, processes, state = job.run, job.workdir, job.processes, fitted.state
    calibration = run.predict(state, job.calibration_part)
    processes.from_first(
        "writing the predictions",
        lambda: calibration.save(workdir / "predictions_calibration.npz"),
    )
    if any(processes.share("the evaluation on test", job.stopping())):
        raise TerminatedError("stopped by SIGTERM before the evaluation on test")
    test_part = processes.together(
        "reading the test split",
        lambda: load_test(run.config.data, decode=run.placement.decoded),
    )
    run.alive()
    test = run.predict(state, test_part)

    def report() -> None:
        test.save(workdir / "predictions_test.npz")
        evaluate_finished(run.config, workdir, speed=run.speed(fitted.steps, fitted.seconds))

    processes.from_first("the report", report)


def evaluate_finished(
    config: ConfigDict, workdir: Path, *, speed: dict[str, Any] | None = None
) -> None:
    """Makes the report of a trained run from its saved predictions; nothing is trained.

    Of several processes the first does it.

    Args:
        config: validated; of its run, but for the `evaluation` section.
        workdir: of a run that was trained to its end.
        speed: of the training, for the report; None: what an earlier report says.

    Raises:
        InputError: there is no such run, or it is another experiment.
    """
    if jax.process_index() > 0:
        return
    check_workdir(config, workdir)
    calibration = Predictions.load(workdir / "predictions_calibration.npz")
    test = Predictions.load(workdir / "predictions_test.npz")
    score = METHODS[config.method].score
    record = evaluation_record(calibration, test, config, score=score)
    entries = read_metrics(workdir)
    record["training"] = {
        "steps": max((entry["step"] for entry in entries), default=None),
        "seconds": max((entry["seconds"] for entry in entries), default=None),
        "speed": speed or speed_before(workdir),
    }
    report = write_report(record, test, config, workdir)
    show_report(report, workdir)


def is_finished(config: ConfigDict, workdir: Path) -> bool:
    """Whether the folder holds the run's report, which is shown then.

    Raises:
        InputError: the folder cannot be the run's.
    """
    check_run(config, workdir)
    if (report := read_report(workdir)) is None:
        return False
    say(f"{workdir} holds a finished run: nothing to train. Its report:")
    if report["config"]["evaluation"] == json.loads(to_json(config))["evaluation"]:
        show_report(report, workdir)
    else:  # other coverages, target risks or delta than it was made with
        evaluate_finished(config, workdir)
    return True


def check(
    unchecked: list[tuple[range, Metrics]], bad_steps: NonFiniteSteps
) -> list[tuple[int, dict[str, float]]]:
    """Fetches metrics; those of steps that were not finite are dealt with, and left out.

    Raises:
        NonFiniteError: as `bad_steps` decides.
    """
    good = []
    # All copies are under way before the first is waited for.
    fetched = jax.device_get([metrics for _, metrics in unchecked])
    for (steps, _), metrics in zip(unchecked, fetched, strict=True):
        for step, values in zip(steps, metrics.fetch(), strict=True):
            if all(map(math.isfinite, values.values())):
                good.append((step, values))
            else:
                bad_steps.meet(step, values)
    return good


def log_line(
    step: int,
    unlogged: list[tuple[int, dict[str, float]]],
    writer: MetricWriter | None,
    progress: Progress,
    *,
    at: int | None = None,
) -> list[tuple[int, dict[str, float]]]:
    """Writes and shows the averages of the steps before one, if there are any.

    Args:
        step: the one.
        unlogged: metrics by step.
        writer: of metrics.jsonl.
        progress: on the console.
        at: the step that the line names; None: the same.

    Returns:
        The metrics that are left.
    """
    at = step if at is None else at
    if averaged := [entry for entry in unlogged if entry[0] < step]:
        averages = average(averaged)
        if writer:
            writer.write(at, "train", averages)
        progress.metrics(at, averages)
    return [entry for entry in unlogged if entry[0] >= step]


def average(entries: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over some steps."""
    return {name: float(np.mean([values[name] for _, values in entries])) for name in entries[0][1]}


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
