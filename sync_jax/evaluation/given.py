"""Predictions of any framework: from files or arrays to the whole report, without JAX."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from sync_jax import metrics
from sync_jax.data.prepare import tables
from sync_jax.data.splits import grouped_split
from sync_jax.errors import InputError
from sync_jax.evaluation.decision import CONFIDENCE, Decision, fitted_temperature
from sync_jax.evaluation.predictions import Predictions, Ranked
from sync_jax.evaluation.record import evaluation_record
from sync_jax.evaluation.report import show_report, strict, write_report
from sync_jax.options import EVALUATION
from sync_jax.runtime.console import say
from sync_jax.scores import SCORES, Score

SUFFIXES = (".npz", ".npy", *tables.SUFFIXES)
_KINDS = ("logits", "probabilities", CONFIDENCE)
_SCORES = {CONFIDENCE: Score(lambda outputs: outputs[CONFIDENCE], CONFIDENCE, needs=(CONFIDENCE,))}
# Of a table: the class follows, as in logit_cat.
_COLUMNS = {"logits": r"logits?_(.+)", "probabilities": r"(?:probability|prob|p)_(.+)"}

Given = Mapping[str, ArrayLike] | tuple[ArrayLike, ArrayLike] | str | Path


class Confidences(Predictions):
    """A user's own confidences, in `outputs`; labels are 1 where the prediction is right."""

    @property
    def predicted(self) -> np.ndarray:
        """Zeros: classes are not known."""
        return np.zeros(len(self.labels), np.int64)

    @property
    def wrong(self) -> np.ndarray:
        """`[n]` float64, 1 where the prediction is wrong."""
        return 1.0 - self.labels

    @property
    def num_classes(self) -> int:
        """0: they are not known."""
        return 0

    def decided(self, score: Score, **parameters: Any) -> Ranked:
        """The examples by the confidences as they were given, in float64."""
        return self.ranked(score, **parameters)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `evaluate_logits` returns."""

    report: dict[str, Any]  # the fields of report.json, docs/report.md
    decision: Decision  # at the recommended certificate, or else at the target coverage


def evaluate_logits(
    calibration: Given,
    test: Given | None = None,
    *,
    class_names: Sequence[str] | None = None,
    workdir: str | Path | None = None,
    seed: int = 0,
    verbose: bool = False,
    **options: Any,
) -> Evaluation:
    """Evaluates predictions of any framework by both protocols, and chooses a threshold.

    Args:
        calibration: a mapping with "labels" `[n]` integers, and "logits" or "probabilities"
            `[n, classes]`; or with "confidence" `[n]`, higher being more confident, and "correct"
            `[n]`, 1 where the prediction is right; and perhaps "groups" `[n]`, equal for examples
            that depend on each other. Also a pair (logits, labels), or the path of a file with
            these (docs/evaluation.md).
        test: likewise. None: half of the calibration examples, drawn by class and in whole groups.
        class_names: by position; None: those of the file, or numbers.
        workdir: folder for report.html, report.json, risk_coverage.png and decision.json; None:
            nothing is written.
        seed: of the draw of a test split.
        verbose: True to print the report.
        **options: `target_coverage`, `target_risks`, `delta` and `coverages` (in %), as of a
            config's section `evaluation`.

    Raises:
        ValueError: an array is missing, of another shape or type, or not finite.
        InputError: a file cannot be read, or an option is out of bounds.
    """
    config = _config(options)
    parts = {name: read(x) for name, x in {"calibration": calibration, "test": test}.items() if x}
    names = {name: tuple(x.pop("class_names")) for name, x in parts.items() if "class_names" in x}
    found = {name: _predictions(part, name) for name, part in parts.items()}
    kinds = {name: next(iter(x.outputs)) for name, x in found.items()}
    if len({(type(x), x.num_classes) for x in found.values()}) > 1 or len({*kinds.values()}) > 1:
        raise ValueError("calibration and test must hold the same kind of array, of the same size")
    note = ""
    if "test" not in found:
        whole = found["calibration"]
        if len(whole.labels) < 2:
            raise ValueError("calibration holds one example, and none is left for a test split")
        kept, held_out = grouped_split(
            whole.labels, whole.groups, holdout=len(whole.labels) // 2, seed=seed
        )
        found = {"calibration": _rows(whole, kept), "test": _rows(whole, held_out)}
        note = (
            f"Only one split was given: {len(kept):,} examples of it are for calibration, and "
            f"{len(held_out):,} for test (seed {seed})."
        )
    split, held = found["calibration"], found["test"]
    scores = _scores(split, "probabilities" in parts["calibration"])
    score = next(iter(scores))
    record = evaluation_record(split, held, config, score=score, scores=scores)
    record["training"] = {"steps": None, "seconds": None, "speed": None}
    record |= {"note": note} if note else {}
    classes = class_names or names.get("calibration")
    decision = _decision(split, record, classes)
    report = strict(record)
    if workdir is not None:
        out = Path(workdir)
        out.mkdir(parents=True, exist_ok=True)
        report = write_report(record, held, config, out, scores=scores)
        decision.save(out / "decision.json")
        if verbose:
            show_report(report, out)
            say(f"The threshold, for your own program: {out / 'decision.json'}")
    return Evaluation(report, decision)


def _config(options: Mapping[str, Any]) -> ConfigDict:
    """The fields of a config that an evaluation reads."""
    config = ConfigDict({"evaluation": {}})
    known = {field.rpartition(".")[2]: field for field in EVALUATION}
    if unknown := options.keys() - known.keys():
        raise InputError(f"{', '.join(unknown)}: no such option; there are {', '.join(known)}")
    for name, field in known.items():
        option = EVALUATION[field]
        value = options.get(name, option.default)
        option.check(name, value)
        section = config.evaluation if "." in field else config
        section[name] = tuple(value) if isinstance(value, list) else value
    return config


def _scores(split: Predictions, probabilities: bool) -> dict[str, Score]:
    """The scores of such predictions, the one that decides first."""
    if isinstance(split, Confidences):
        return _SCORES
    # The logarithms of probabilities have no scale and no shift of their own.
    return {
        name: score
        for name, score in SCORES.items()
        if score.applies(split.outputs) and not (probabilities and score.of_raw_logits)
    }


def _decision(
    split: Predictions, record: Mapping[str, Any], classes: Sequence[str] | None
) -> Decision:
    """The threshold of the recommended certificate, if there is one, or of the target coverage."""
    best = record["recommended"]
    score = SCORES.get(best["score"], _SCORES[CONFIDENCE])
    ranked = split.decided(score)
    name = record["method_score"] if best["score"] == CONFIDENCE else "softmax_response"
    point = record["scores"][name]["operating_point"]
    certificate = {k: x for k, x in best.items() if k not in ("score", "test", "calibration_plan")}
    known = isinstance(split, Confidences)
    return Decision(
        score=best["score"],
        threshold=float(best["threshold"] if best["feasible"] else point["threshold"]),
        confidence=ranked.confidence,
        correct=ranked.wrong == 0,
        groups=split.groups,
        classes=None if classes is None else np.asarray(classes),
        temperature=1.0 if known else fitted_temperature(split.outputs["logits"], split.labels),
        chosen_by=certificate if best["feasible"] else {"coverage": point["target_coverage"]},
    )


def _rows(split: Predictions, rows: np.ndarray) -> Predictions:
    outputs = {name: x[rows] for name, x in split.outputs.items()}
    groups = None if split.groups is None else split.groups[rows]
    return type(split)(outputs, split.labels[rows], split.index[rows], groups)


def read(given: Given) -> dict[str, Any]:
    """The arrays of a mapping, a pair or a file, by name."""
    if isinstance(given, str | Path):
        return _read_file(Path(given))
    if isinstance(given, Mapping):
        return {name: np.asarray(x) for name, x in given.items()}
    logits, labels = given
    return {"logits": np.asarray(logits), "labels": np.asarray(labels)}


def _read_file(path: Path) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path} is of no known kind; choose from {', '.join(SUFFIXES)}")
    try:
        if suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            # What a run of ours saves.
            return {name.removeprefix("outputs/"): x for name, x in arrays.items()}
        if suffix == ".npy":
            labels = path.with_suffix(".labels.npy")
            return {
                "logits": np.load(path, allow_pickle=False),
                "labels": np.load(labels, allow_pickle=False),
            }
        return _of_columns(path.name, tables.read_columns(path.name, path.read_bytes()))
    except InputError:
        raise
    except Exception as error:  # zipfile and NumPy raise almost anything on a damaged file
        raise InputError(f"{path} cannot be read: {error}") from error


def _of_columns(name: str, columns: tables.Columns) -> dict[str, Any]:
    """The arrays of a table: a column for each class, or confidence and correct."""
    found: dict[str, Any] = {}
    for kind, pattern in _COLUMNS.items():
        matches = {x: re.fullmatch(pattern, x.lower()) for x in columns}
        own = [x for x, match in matches.items() if match]
        if own and not found:
            found[kind] = np.asarray([[float(v) for v in columns[x]] for x in own]).T
            classes = [x[len(x) - len(str(matches[x][1])) :] for x in own]  # type: ignore[index]
            found["class_names"] = classes
    for name_of, usual in {
        CONFIDENCE: ("confidence", "score"),
        "correct": ("correct",),
        "labels": ("label", "labels", "class", "target"),
        "groups": ("group", "groups"),
    }.items():
        for column in columns:
            if column.lower() in usual and name_of not in found:
                found[name_of] = columns[column]
    if "groups" in found:
        found["groups"] = np.asarray(found["groups"])
    if "labels" in found:
        found["labels"] = _numbered(name, found["labels"], found.get("class_names"))
    for kind in (CONFIDENCE, "correct"):
        if kind in found:
            words = {"true": "1", "false": "0"}
            found[kind] = np.asarray([float(words.get(x.lower(), x)) for x in found[kind]])
    return found


def _numbered(name: str, labels: Sequence[str], classes: Sequence[str] | None) -> np.ndarray:
    """Labels as positions: of class names, or numbers."""
    position = {known: i for i, known in enumerate(classes or ())}
    if all(label in position for label in labels):
        return np.asarray([position[label] for label in labels])
    if all(re.fullmatch(r"\d{1,9}", label) for label in labels):
        return np.asarray([int(label) for label in labels])
    unknown = next(x for x in labels if x not in position and not x.isdigit())
    raise InputError(f"{name}: the label {unknown!r} is no class of its columns and no number")


def _predictions(arrays: Mapping[str, Any], name: str) -> Predictions:
    """Checks the arrays of a split."""
    kinds = [kind for kind in _KINDS if kind in arrays]
    if not kinds:
        raise ValueError(
            f"{name} must hold logits or probabilities with labels, or confidence with correct; it "
            f"has {', '.join(arrays) or 'nothing'}"
        )
    kind = kinds[0]
    truth = "correct" if kind == CONFIDENCE else "labels"
    values = np.asarray(arrays[kind])
    if truth not in arrays:
        raise ValueError(f"{name} holds {kind} and no {truth}")
    labels = np.asarray(arrays[truth])
    dimensions = 1 if kind == CONFIDENCE else 2
    if values.ndim != dimensions or values.dtype.kind not in "fiu" or not values.size:
        raise ValueError(
            f"{name}: {kind} is {values.dtype} {values.shape}, not [n] or [n, classes]"
        )
    values = values.astype(np.float64 if values.dtype.itemsize > 4 else np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: {kind} holds a number that is not finite")
    if labels.shape != values.shape[:1] or labels.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: {truth} is {labels.dtype} {labels.shape}, not {len(values)} numbers"
        )
    if (labels != labels.astype(np.int64)).any():
        raise ValueError(f"{name}: {truth} must be whole numbers")
    labels = labels.astype(np.int32)
    most = 2 if kind == CONFIDENCE else values.shape[1]
    if labels.min() < 0 or labels.max() >= most:
        raise ValueError(f"{name}: {truth} must lie in [0, {most - 1}]")
    index, groups = np.arange(len(labels)), arrays.get("groups")
    if groups is not None:
        groups = np.asarray(groups)
        if groups.shape != labels.shape:
            raise ValueError(f"{name}: groups has shape {groups.shape}, not {labels.shape}")
        groups = np.unique(groups, return_inverse=True)[1]
    if kind == CONFIDENCE:
        return Confidences({CONFIDENCE: values}, labels, index, groups)
    if kind == "probabilities":
        metrics.accuracy(values, labels)  # raises where these are no probabilities
        with np.errstate(divide="ignore"):
            least = np.finfo(values.dtype).tiny
            return Predictions({"logits": np.log(np.maximum(values, least))}, labels, index, groups)
    return Predictions({"logits": values}, labels, index, groups)
