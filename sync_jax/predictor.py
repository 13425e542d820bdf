"""Classifiers that abstain: `fit` trains one, `SelectiveClassifier.load` reads one."""

import contextlib
import dataclasses
import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.data.preprocessing import Inputs, Preprocessing
from sync_jax.errors import InputError, suggestion
from sync_jax.evaluation.decision import Decision, Prediction, fitted_temperature

# What trains is imported when it is needed: an exported classifier runs without it.
if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from sync_jax.evaluation.predictions import Predictions
    from sync_jax.steps import TrainState
    from sync_jax.trainer import Trainer


class Network(Protocol):
    """A trained network."""

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Maps inputs `[n, ...]`, as `Preprocessing.batch` makes them, to outputs by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class RunNetwork:
    """The network of a run, or of `fit`."""

    trainer: "Trainer"
    state: "TrainState"

    def __call__(self, inputs: np.ndarray) -> dict[str, np.ndarray]:
        """See `Network`."""
        return self.trainer.outputs(self.state, inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class SelectiveClassifier:
    """A trained classifier that answers where its confidence reaches a threshold.

    >>> classifier = SelectiveClassifier.load("runs/image_folder-sync-seed0")
    >>> label, confidence, accepted, probabilities = classifier.predict(["cat.jpg", "dog.jpg"])
    """

    network: Network
    preprocessing: Preprocessing
    decision: Decision
    source: str = ""  # where it is from

    @classmethod
    def load(cls, folder: str | Path) -> "SelectiveClassifier":
        """Reads the classifier of a finished run, or an exported one.

        Of a run the threshold is that of the report's first line: of the recommended certificate,
        or where none is certified that of the target coverage; on the log odds.

        Raises:
            InputError: the folder holds neither, or is damaged or altered.
        """
        folder = Path(folder).expanduser()
        if (folder / "card.json").exists():
            from sync_jax.deploy import artifact

            return cls(*artifact.load(folder), str(folder))
        if not (folder / "config.json").exists():
            raise InputError(f"{folder} holds neither a run nor an exported classifier")
        return _of_run(folder)

    def predict(self, inputs: Inputs) -> Prediction:
        """Answers or abstains, for each of n inputs.

        Args:
            inputs: paths of pictures, PIL images, or a sequence of these; images `[n, height,
                width, channels]` uint8 of any size; or features `[n, d]`.

        Raises:
            InputError: a file cannot be read as a picture.
            ValueError: an array is of another shape or type, or not finite.
        """
        return self.decision(self.outputs(inputs))

    def outputs(self, inputs: Inputs) -> dict[str, np.ndarray]:
        """The network's outputs `[n, ...]` by name, such as "logits"; see `predict`."""
        return self.network(self.preprocessing.batch(inputs))

    def with_threshold(
        self,
        *,
        coverage: float | None = None,
        risk: float | None = None,
        delta: float = 0.05,
        cost: tuple[float, float] | None = None,
    ) -> "SelectiveClassifier":
        """The same with another threshold; see `Decision.with_threshold`."""
        decision = self.decision.with_threshold(
            coverage=coverage, risk=risk, delta=delta, cost=cost
        )
        return dataclasses.replace(self, decision=decision)

    def evaluate(self, inputs: Inputs, labels: ArrayLike) -> dict[str, float]:
        """Judges the answers by labels `[n]`, of `classes`.

        Returns:
            n, accuracy, coverage, the selective risk of the accepted (NaN of none), and AURC.
        """
        from sync_jax import metrics

        found, truth = self.predict(inputs), np.asarray(labels)
        if found.label is None or truth.shape != found.label.shape:
            raise ValueError(f"labels has shape {truth.shape}, and there are {len(found.accepted)}")
        if unknown := {*truth.tolist()} - {*self.classes.tolist()}:
            raise ValueError(f"labels hold {sorted(unknown)[0]!r}, which is no class of it")
        wrong = (found.label != truth).astype(np.float64)
        accepted = found.accepted
        return {
            "n": len(truth),
            "accuracy": float(1 - wrong.mean()),
            "coverage": float(accepted.mean()),
            "selective_risk": float(wrong[accepted].mean()) if accepted.any() else float("nan"),
            "aurc": metrics.aurc(found.confidence, loss=wrong),
        }

    def export(self, folder: str | Path) -> None:
        """Writes a folder that needs only JAX, NumPy and flatbuffers; see `deploy.artifact`."""
        if not isinstance(self.network, RunNetwork):
            raise InputError(f"{self.source} is exported already: copy the folder")
        from sync_jax.deploy.export import export

        export(
            self.network.trainer,
            self.network.state,
            self.preprocessing,
            self.decision,
            Path(folder),
            source=Path(self.source).name,
            method=self.network.trainer.config.method,
        )

    @property
    def classes(self) -> np.ndarray:
        """The classes `[classes]`, in the order of the probabilities."""
        assert self.decision.classes is not None
        return self.decision.classes

    @property
    def threshold(self) -> float:
        """It answers where the confidence is at least this."""
        return self.decision.threshold

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.classes[:3].tolist()))
        more = ", ..." if len(self.classes) > 3 else ""
        return (
            f"SelectiveClassifier of {len(self.classes)} classes ({names}{more}) from "
            f"{self.source}: {self.decision.describe()}"
        )


def check_artifact(run: str | Path, folder: str | Path) -> str:
    """Compares an exported classifier with the run that it is from; returns a line on it.

    Raises:
        InputError: a file of it was altered, or it answers otherwise than the run.
    """
    from sync_jax.deploy.export import check

    classifier = SelectiveClassifier.load(run)
    if not isinstance(classifier.network, RunNetwork):
        raise InputError(f"{run} is no run")
    network, decision = classifier.network, classifier.decision
    worst = check(network.trainer, network.state, classifier.preprocessing, decision, Path(folder))
    return (
        f"{folder} answers as {run} does: outputs differ by at most {worst:.1g} of the largest; "
        "all files are as they were exported"
    )


def _of_run(folder: Path) -> SelectiveClassifier:
    from sync_jax import train
    from sync_jax.config import config_of_run
    from sync_jax.evaluation.report import read_report

    config = config_of_run(str(folder))
    trainer, state, known = train.restored(config, folder)
    report = read_report(folder)
    if report is None:
        raise InputError(f"{folder} holds no finished run: it has no report.json")
    held_out, _ = train.load_predictions(folder)
    best = report.get("recommended", {"feasible": False})
    target = config.target_coverage
    classes = np.asarray(known["class_names"])
    decision = _decision(held_out, "log_odds", {}, classes, target=target)
    if best["feasible"]:
        kept = ("score", "test", "calibration_plan")
        chosen = {name: value for name, value in best.items() if name not in kept}
        decision = dataclasses.replace(
            decision, threshold=float(best["threshold"]), chosen_by=chosen
        )
    return SelectiveClassifier(
        RunNetwork(trainer, state), train.preprocessing_of(config, known), decision, str(folder)
    )


def fit(
    images_or_features: ArrayLike,
    labels: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    method: str = "sync",
    model: str | None = None,
    calibration: float = 0.1,
    seed: int = 0,
    workdir: str | Path | None = None,
    verbose: bool = False,
    **overrides: Any,
) -> SelectiveClassifier:
    """Trains a selective classifier on arrays in memory.

    Args:
        images_or_features: images `[n, height, width]` or `[n, height, width, channels]` uint8, or
            features `[n, d]`, such as another network's embeddings, of any real dtype.
        labels: `[n]`, integers or strings; at least two classes.
        groups: `[n]` integers or strings; examples of one group, such as a patient's, depend on
            each other, and are held out together. None: all are independent.
        method: a name in `methods.METHODS`, or yours as 'package.module:NAME'.
        model: a backbone, likewise of `models.BACKBONES`; None: 'cnn' for images, 'mlp' for
            features.
        calibration: share of the examples that is held out to choose the threshold, in (0, 1).
        seed: of the initialisation and of the order of the examples.
        workdir: folder for checkpoints, where a stopped training goes on; None: nothing is kept.
        verbose: True to print the progress.
        **overrides: fields of the config, by path with __ for the dot (`data__flip=True`), or by
            the last name where no other field has it (`epochs=20`, `target_coverage=0.9`). Images
            are neither cropped nor mirrored unless these say so.

    Raises:
        ValueError: an array is not as described; names the argument.
        InputError: there is no such method, backbone or field, or its value is out of bounds.
    """
    from sync_jax import train
    from sync_jax.data.datasets.memory import MemoryDataset, as_inputs
    from sync_jax.evaluation.record import fit_parameters, known_scores
    from sync_jax.runtime.files import check_plain
    from sync_jax.runtime.processes import Processes
    from sync_jax.trainer import resolve

    inputs = as_inputs(images_or_features, "images_or_features")
    given = np.asarray(labels)
    if given.shape != (len(inputs),) or given.dtype.kind not in "iubUS":
        raise ValueError(
            f"labels must be {len(inputs)} integers or strings, one for each example; got "
            f"{given.dtype} of shape {given.shape}"
        )
    if not 0 < calibration < 1:
        raise ValueError(f"calibration must lie in (0, 1), got {calibration}")
    classes, numbers = np.unique(given, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"labels hold {len(classes)} class; a classifier needs two")
    dataset = MemoryDataset(inputs, numbers, tuple(map(str, classes)), groups=groups)
    config = _config(inputs, calibration)
    config.method, config.seed = method, seed
    config.model.name = model or ("mlp" if inputs.ndim == 2 else "cnn")
    _override(config, overrides)
    resolve(config)
    with contextlib.ExitStack() as stack:
        if not verbose:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if workdir is None:
            workdir = stack.enter_context(tempfile.TemporaryDirectory(prefix="sync_jax-"))
        check_plain(Path(workdir))
        processes = Processes(seconds=config.process.wait_seconds)
        job = stack.enter_context(train.prepared(config, dataset, Path(workdir), processes))
        state = train.fit(job, train.begin(job)).state
        held_out = job.trainer.predict(state, job.calibration_part)
    name = job.trainer.method.score
    score = known_scores(config, name)[name]
    parameters = fit_parameters(held_out, score=score)
    decision = _decision(held_out, name, parameters, classes, target=config.target_coverage)
    shape = job.trainer.info.image_shape
    side = shape[0] if len(shape) == 3 else 0
    return SelectiveClassifier(
        RunNetwork(job.trainer, state), Preprocessing(shape, side, side), decision, "arrays"
    )


def _decision(
    held_out: "Predictions",
    name: str,
    parameters: Mapping[str, Any],
    classes: np.ndarray,
    *,
    target: float,
) -> Decision:
    """The threshold of a score that accepts the target coverage of the calibration examples."""
    from sync_jax import metrics
    from sync_jax.scores import SCORES

    if name not in SCORES:
        raise InputError(f"the score {name} is of another package, and not of a classifier to keep")
    ranked = held_out.decided(SCORES[name], **parameters)
    return Decision(
        score=name,
        threshold=metrics.threshold_for_coverage(ranked.confidence, coverage=target),
        confidence=ranked.confidence,
        correct=ranked.wrong == 0,
        groups=held_out.groups,
        parameters=parameters,
        classes=classes,
        temperature=fitted_temperature(held_out.outputs["logits"], held_out.labels),
        chosen_by={"coverage": target},
    )


def _config(inputs: np.ndarray, calibration: float) -> "ConfigDict":
    """The default config for arrays."""
    from sync_jax.config import default_config
    from sync_jax.runtime import sharding

    config = default_config()
    config.data.name = "memory"
    config.data.crop_padding, config.data.flip = 0, False
    config.data.calibration_size = max(round(calibration * len(inputs)), 1)
    config.process.watchdog_seconds = 0.0
    devices = sharding.make_mesh().size
    most = (len(inputs) - config.data.calibration_size) // devices * devices
    config.train.batch_size = max(min(128 // devices * devices, most), devices)
    config.evaluation.batch_size = 1000 // devices * devices
    return config


def _override(config: "ConfigDict", overrides: dict[str, Any]) -> None:
    """Sets the fields that keyword arguments name."""
    from sync_jax.config import FIELDS, find_method
    from sync_jax.models import find_backbone

    fields = {
        *FIELDS,
        *(f"loss.{name}" for name in find_method(config.method).hyperparameters),
        *(f"model.{name}" for name in find_backbone(config.model.name).options),
    }
    values = {_path(name, fields): value for name, value in overrides.items()}
    with config.ignore_type():  # which `resolve` checks
        for path, value in values.items():
            section, _, name = path.rpartition(".")
            (config[section] if section else config)[name] = value
        if "optimizer.warmup_epochs" not in values and type(config.train.epochs) in (int, float):
            config.optimizer.warmup_epochs = min(1.0, config.train.epochs / 10)


def _path(name: str, fields: set[str]) -> str:
    """The field that a keyword argument names."""
    path = name.replace("__", ".")
    if "." in path or path in fields:
        return path
    found = sorted(field for field in fields if field.rpartition(".")[2] == name)
    if len(found) > 1:
        raise InputError(f"{name} could be any of {', '.join(found)}; write section__{name}")
    if not found:
        known = {field.rpartition(".")[2] for field in fields}
        raise InputError(f"{name} is no field of the config{suggestion(name, known)}")
    return found[0]
