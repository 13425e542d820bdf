"""Classifiers that abstain, from arrays in memory: `fit` trains one, `predict` answers."""

import contextlib
import dataclasses
import io
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from sync_jax import metrics, train
from sync_jax.config import FIELDS, default_config, find_method
from sync_jax.data.datasets.memory import MemoryDataset, as_inputs
from sync_jax.data.splits import Part
from sync_jax.errors import InputError, suggestion
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import fit_parameters, known_scores
from sync_jax.models import find_backbone
from sync_jax.runtime import sharding
from sync_jax.runtime.files import check_plain
from sync_jax.runtime.processes import Processes
from sync_jax.scores import Score
from sync_jax.steps import TrainState
from sync_jax.trainer import Trainer, resolve


class Prediction(NamedTuple):
    """Answers for n examples."""

    label: np.ndarray  # [n], the most probable class, as it was named when fitting
    # [n] float32, higher is more confident: the method's own score, in the form that thresholds are
    # on (`Score.unsaturated`), such as the log odds.
    confidence: np.ndarray
    accepted: np.ndarray  # [n] bool, False where the classifier abstains
    probabilities: np.ndarray  # [n, classes] float64, in the order of SelectiveClassifier.classes


@dataclasses.dataclass(frozen=True)
class SelectiveClassifier:
    """A trained classifier that answers where its confidence reaches a threshold."""

    trainer: Trainer
    state: TrainState
    classes: np.ndarray  # [classes], the sorted labels
    calibration: Predictions  # on the examples that were held out
    score: Score
    parameters: dict[str, Any]  # the score's arguments
    threshold: float  # accepts `target_coverage` of the held-out examples

    def predict(self, images_or_features: ArrayLike) -> Prediction:
        """Answers or abstains, for each of n examples.

        Raises:
            ValueError: the examples are not as those of `fit` were.
        """
        inputs = as_inputs(images_or_features, "images_or_features")
        expected = self.trainer.info.image_shape
        if inputs.shape[1:] != expected:
            raise ValueError(
                f"images_or_features has shape {inputs.shape}, expected [n, "
                f"{', '.join(map(str, expected))}]"
            )
        nothing = np.zeros(len(inputs), np.int32)  # labels are not known
        predictions = self.trainer.predict(self.state, Part(inputs, nothing, nothing))
        confidence, _, predicted, *_ = predictions.decided(self.score, **self.parameters)
        return Prediction(
            self.classes[predicted],
            confidence,
            confidence >= self.threshold,
            predictions.probabilities,
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
    threshold = metrics.threshold_for_coverage(
        held_out.decided(score, **parameters).confidence, coverage=config.target_coverage
    )
    return SelectiveClassifier(job.trainer, state, classes, held_out, score, parameters, threshold)


def _config(inputs: np.ndarray, calibration: float) -> ConfigDict:
    """The default config for arrays."""
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


def _override(config: ConfigDict, overrides: dict[str, Any]) -> None:
    """Sets the fields that keyword arguments name."""
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
