"""Several runs in one command: every combination of some fields' values, one after the other."""

import ast
import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from sync_jax.config import default_config, find_method
from sync_jax.data import registry
from sync_jax.data.info import Dataset
from sync_jax.data.loading import known_info
from sync_jax.errors import InputError, NonFiniteError, suggestion
from sync_jax.evaluation.comparison import FREE, compare
from sync_jax.evaluation.label_errors import (
    GALLERY,
    LIST,
    LabelErrors,
    describe,
    find_label_errors,
    joined,
    write_gallery,
    write_label_errors,
)
from sync_jax.evaluation.report import read_report
from sync_jax.models import candidates, find_backbone
from sync_jax.options import flatten
from sync_jax.runtime.console import say
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.workdir import check_run, check_shared
from sync_jax.scores import SCORES
from sync_jax.train import begin, fit, has_predictions, prepared, train_and_evaluate
from sync_jax.trainer import choose_network, resolve


def sweep(config: ConfigDict, vary: Sequence[str], out: Path, *, name: str) -> bool:
    """Trains every combination, skips what is finished, and compares all of it in `out`/compare.

    Repeating the call goes on where it was stopped. Nothing is trained if a combination is no valid
    config. A run that diverges is named at the end, and the result is False then. `vary` has fields
    with their values, such as 'seed=0,1,2'; the folders in `out` begin with `name`, the config's.
    """
    runs = combinations(config, vary, name=name)
    check_shared(out, Processes(seconds=config.process.wait_seconds))
    lines: dict[str, None] = {}
    for folder, run in runs:
        lines |= dict.fromkeys((*resolve(run), *choose_network(run, out / folder)))
        check_run(run, out / folder)
    for line in lines:
        say(line)
    done = [
        folder
        for folder, _ in runs
        if read_report(out / folder) is not None and has_predictions(out / folder)
    ]
    say(
        f"{len(runs)} runs in {out}, each a training of its own: "
        f"{len(done)} finished, {len(runs) - len(done)} to do"
    )
    began, trained, failed = time.monotonic(), 0, []
    for i, (folder, run) in enumerate(runs, start=1):
        if folder in done:
            continue
        each = (time.monotonic() - began) / 60 / max(trained, 1)
        left = f" (about {each * (len(runs) - len(done) - trained):.0f} min left)"
        say(f"=== run {i} of {len(runs)}: {folder}{left if trained else ''}")
        try:
            train_and_evaluate(run, out / folder)
        except NonFiniteError as error:
            failed.append(folder)
            say(f"{folder} stopped at {error}")
        trained += 1
        jax.clear_caches()  # every run compiles functions of its own
    finished = [out / folder for folder, _ in runs if folder not in failed]
    if finished and jax.process_index() == 0:
        # A field that was varied on purpose may differ.
        folders = [str(folder) for folder in finished]
        scores = dict.fromkeys(x for _, run in runs for x in own_scores(run))
        compare(folders, out / "compare", mixed=True, scores=tuple(scores))
    for folder in failed:
        say(f"{folder} diverged and is not in the table")
    return not failed


def label_errors(
    config: ConfigDict, out: Path, *, folds: int, dataset: Dataset | None = None
) -> LabelErrors:
    """Trains on all but one of several folds of the training split in turn, and lists label errors.

    A label is judged by the network that has not seen it. `out` gets label_errors.csv, and a folder
    per fold; repeating the call goes on where it was stopped. The dataset is by default the
    config's.
    """
    dataset = dataset or registry.dataset(config.data)
    predicted = []
    for number in range(1, folds + 1):
        run = config.copy_and_resolve_references()
        run.data.fold, run.data.calibration_size = f"{number}/{folds}", 0
        # Nothing is chosen by the fold, so that its labels are judged by what never saw them.
        run.checkpoint.keep_best = 0
        say(f"=== fold {number} of {folds}")
        workdir, processes = out / f"fold-{number}", Processes(seconds=run.process.wait_seconds)
        check_run(run, workdir)
        with prepared(run, dataset, workdir, processes) as job:
            state = fit(job, begin(job)).state
            predicted.append(job.trainer.predict(state, job.calibration_part))
        jax.clear_caches()
    every, info = joined(predicted), known_info(dataset)
    errors = find_label_errors(every)
    if jax.process_index() == 0:
        files = dataset.files("train")
        write_label_errors(errors, out, info.class_names, files)
        say(describe(errors, len(every.labels), info.class_names))
        where = f"they are listed in {out / LIST}, the most suspect first"
        if len(info.image_shape) == 3:
            images, _ = dataset.load("train")
            write_gallery(errors, out, info.class_names, images, files)
            where += f", and shown in {out / GALLERY}"
        say(where)
    return errors


def own_scores(config: ConfigDict) -> list[str]:
    """The scores of other packages that a run uses."""
    names = (find_method(config.method).score, *config.evaluation.scores)
    return [name for name in names if name not in SCORES]


def combinations(
    config: ConfigDict, vary: Sequence[str], *, name: str
) -> list[tuple[str, ConfigDict]]:
    """Every combination of the values, with the name of its folder; the last varies slowest."""
    if not vary:
        raise InputError("--vary is missing; for example --vary=method=ce,sync --vary=seed=0,1,2")
    fields: dict[str, list[Any]] = {}
    known = _known(config)
    for entry in vary:
        field, equals, values = entry.partition("=")
        field = field.removeprefix("config.")
        if field not in known:
            raise InputError(f"--vary={entry}: no field {field!r}{suggestion(field, known)}")
        if field.startswith(FREE) and field != "seed":
            raise InputError(f"--vary={entry}: {field} changes no training, so nothing to compare")
        if field in fields:
            raise InputError(f"--vary={entry}: {field} is varied twice")
        if not equals or not values:
            raise InputError(f"--vary={entry} needs values: --vary={field}=VALUE,VALUE")
        fields[field] = [_parsed(entry, text, known[field]) for text in values.split(",")]
        if len(set(fields[field])) < len(fields[field]):
            raise InputError(f"--vary={entry} names a value twice")
    runs = []
    for slowest_first in itertools.product(*reversed(fields.values())):
        values_by_field = dict(zip(reversed(fields), slowest_first, strict=True))
        run = config.copy_and_resolve_references()
        run.update_from_flattened_dict(values_by_field)
        folder = f"{name}-{run.method}-seed{run.seed}"
        for field in fields:
            if field not in ("method", "seed"):
                folder += f"-{field}={values_by_field[field]}"
        runs.append((folder.replace(os.sep, "-"), run))
    if len({folder for folder, _ in runs}) < len(runs):
        raise InputError(f"--vary={', '.join(vary)}: two runs would have the same folder")
    return runs


def _known(config: ConfigDict) -> dict[str, Any]:
    """Every field that may be varied, with a value of its type."""
    options = {
        f"model.{name}": option.default
        for backbone in candidates(config.model)
        for name, option in find_backbone(backbone).options.items()
    }
    return options | dict(flatten(default_config().to_dict())) | dict(flatten(config.to_dict()))


def _parsed(entry: str, text: str, like: Any) -> Any:
    """A value as the type that the field has."""
    kind = type(like)
    value: Any = text
    if kind is not str:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
    if type(value) is kind or (kind is float and type(value) is int):
        return kind(value)
    raise InputError(f"--vary={entry}: {text!r} must be of type {kind.__name__}")
