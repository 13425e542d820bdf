"""Finished runs together: a table over seeds (docs/report.md), and their deep ensemble."""

import contextlib
import csv
import dataclasses
import functools
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.text
from ml_collections import ConfigDict

from sync_jax import metrics
from sync_jax.config import default_config, upgraded
from sync_jax.errors import InputError
from sync_jax.evaluation import report as reports
from sync_jax.evaluation import tables
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.evaluation.report import label_of, read_report, strict
from sync_jax.options import find, flatten
from sync_jax.runtime.console import printable, say
from sync_jax.runtime.files import check_plain, write_text
from sync_jax.scores import SCORES, Score

# What may differ between the rows of a table: the methods with what belongs to them, the seed, and
# what moves no weight. The test ranking's coverages are this module's own.
OF_METHOD = ("method", "target_coverage", "loss.")
FREE = ("seed", "data.data_dir", "data.source", "log.", "checkpoint.", "evaluation.")
GRID = np.linspace(0.01, 1, 100)  # coverages of the plot


class Column(NamedTuple):
    """A column of the tables: its numbers are shown times the factor, in the format."""

    heading: str
    factor: float = 100
    format: str = ".2f"
    best: Any = None  # min or max


COLUMNS = {
    "own_risk": Column("error % at target", best=min),
    "deployed_risk": Column("deployed error %", best=min),
    "deployed_coverage": Column("deployed coverage %"),
    "aurc": Column("AURC x1000", 1000, best=min),
    "excess_aurc": Column("E-AURC x1000", 1000, best=min),
    "augrc": Column("AUGRC x1000", 1000, best=min),
    "accuracy": Column("accuracy %", best=max),
    "seconds": Column("seconds", 1, ".0f", best=min),
}
# Those of the console; all are in compare.md.
CONSOLE_COLUMNS = (
    *("method, score", "runs", "100 %", "90 %", "80 %", "70 %", "target %", "error % at target"),
    *("AURC x1000", "AUGRC x1000", "accuracy %", "seconds"),
)


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has its report."""

    workdir: Path
    config: dict[str, Any]  # by path
    report: dict[str, Any]
    test: Predictions
    own: Mapping[str, Score]  # of other packages, by name

    def of(self, score: str) -> tuple[np.ndarray, np.ndarray]:
        """Confidence and error of the test examples, `[n]` each."""
        known = {**SCORES, **self.own}
        if score not in known:
            raise InputError(
                f"{self.workdir} uses the score {score}, which is not built in; name it in --scores"
            )
        parameters = self.report["scores"][score]["parameters"]
        return self.test.ranked(known[score], **parameters)[:2]

    @property
    def scores(self) -> list[str]:
        """The softmax response and the method's own score, which may be the same."""
        return list(reports.main_scores(self.report))

    @property
    def coverages(self) -> list[float]:
        """The coverages of its report."""
        return [percent / 100 for percent in self.report["config"]["evaluation"]["coverages"]]

    def numbers(self, score: str, coverages: list[float]) -> dict[str, np.ndarray]:
        """selective_risk at the coverages, and `COLUMNS`; NaN where they are undefined."""
        record, (confidence, wrong) = self.report["scores"][score], self.of(score)
        point, target = record["operating_point"], record["operating_point"]["target_coverage"]
        found = {
            "selective_risk": metrics.selective_risk(confidence, loss=wrong, coverage=coverages),
            "own_risk": metrics.selective_risk(confidence, loss=wrong, coverage=target),
            "deployed_risk": point["selective_risk"],
            "deployed_coverage": point["coverage"],
            "aurc": record["aurc"]["mean"],
            "excess_aurc": record["excess_aurc"]["mean"],
            "augrc": record["augrc"],
            "accuracy": self.report["test"]["accuracy"],
            "seconds": self.report["training"]["seconds"],
        }
        return {name: np.asarray(value, np.float64) for name, value in found.items()}


def compare(
    patterns: Sequence[str], out: Path, *, mixed: bool = False, scores: Sequence[str] = ()
) -> dict[str, Any]:
    """Compares finished runs; writes compare.json, .md, .csv and .png to `out`, and prints.

    Args:
        patterns: folders of runs, or patterns such as 'runs/quickstart-*'.
        out: made when needed.
        mixed: compare although data, backbone, schedule or the like differ.
        scores: of other packages, as package.module:NAME. What a report names is not imported
            otherwise: a run's folder is data, and no code.
    """
    runs = load_runs(patterns, scores)
    ignored = differing_fields(runs)
    if ignored and not mixed:
        raise InputError(
            f"these runs differ in more than method and seed: {'; '.join(ignored)}; compare "
            "others, or add --mixed to compare them all the same"
        )
    rows = grouped(runs)
    record = strict(comparison(rows) | {"ignored": ignored})
    with writing(out):
        write_text(out / "compare.json", json.dumps(record, indent=1, allow_nan=False) + "\n")
        write_text(out / "compare.md", markdown(record))
        write_text(out / "compare.csv", csv_text(record))
        plot(rows, record, out / "compare.png")
    show(record, out)
    return record


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Makes a folder, and names it in an InputError where something in it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_plain(out)
        yield
    except OSError as error:
        raise InputError(f"--workdir={out} cannot be written: {error.strerror}") from error


def load_runs(patterns: Sequence[str], scores: Sequence[str] = ()) -> list[FinishedRun]:
    """The finished runs that the patterns name, each once; arguments as of `compare`."""
    own = {name: find(name, SCORES, Score, "--scores") for name in scores}
    folders: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern)))
        found = {Path(match): None for match in matches if os.path.isdir(match)}
        if not found:
            raise InputError(f"--runs={pattern} matches no folder")
        folders |= found
    if not folders:
        raise InputError("--runs is missing; for example --runs='runs/quickstart-*'")
    runs = []
    defaults = dict(flatten(default_config().to_dict()))
    for folder in folders:
        check_plain(folder)
        if (report := read_report(folder)) is None:
            raise InputError(f"{folder} holds no finished run: it has no report.json")
        test = Predictions.load(folder / "predictions_test.npz")
        # A field younger than the run counts with its default.
        config = defaults | upgraded(report["config"])
        run = FinishedRun(folder, config, report, test, own)
        with reports.undamaged(folder / "report.json", ", or not of the predictions beside it"):
            for score in run.scores:
                run.numbers(score, run.coverages)
        runs.append(run)
        if not run.test.same_examples(runs[0].test):
            raise InputError(f"{run.workdir} has other test examples than {runs[0].workdir}")
    return runs


def differing_fields(runs: Sequence[FinishedRun]) -> list[str]:
    """Fields that a comparison needs equal and that differ, a phrase each."""
    phrases = []
    for field in sorted(set().union(*(run.config for run in runs))):
        if field.startswith((*OF_METHOD, *FREE)):
            continue
        values: dict[str, Path] = {}
        for run in runs:
            values.setdefault(repr(run.config.get(field)), run.workdir)
        if len(values) > 1:
            where = " and ".join(f"{value} in {folder}" for value, folder in values.items())
            phrases.append(printable(f"config.{field} is {where}"))
    return phrases


def grouped(runs: Sequence[FinishedRun]) -> dict[str, tuple[list[FinishedRun], str]]:
    """The rows: runs that differ in their seed only, and a score of theirs, by a label."""
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        key = tuple((k, repr(v)) for k, v in sorted(run.config.items()) if not k.startswith(FREE))
        groups.setdefault(key, []).append(run)
    rows: dict[str, tuple[list[FinishedRun], str]] = {}
    for key, members in groups.items():
        method = members[0].config["method"]
        rivals = [dict(other) for other in groups if ("method", repr(method)) in other]
        apart = [
            f"{field}={value.strip(chr(39))}"
            for field, value in key
            if any(rival.get(field) != value for rival in rivals)
        ]
        label = printable(f"{method} ({', '.join(apart)})" if apart else method)
        for score in members[0].scores:
            rows[f"{label}, {label_of(members[0].report, score)}"] = members, score
        seen: dict[Any, Path] = {}
        for run in members:
            first = seen.setdefault(seed := run.config["seed"], run.workdir)
            if first != run.workdir:
                raise InputError(f"{run.workdir} and {first} are the same run: seed {seed}")
    return rows


def comparison(rows: dict[str, tuple[list[FinishedRun], str]]) -> dict[str, Any]:
    """The record, apart from `ignored`."""
    runs = {run.workdir: run for members, _ in rows.values() for run in members}
    coverages = next(iter(runs.values())).coverages
    entries = [_row(label, score, runs, coverages) for label, (runs, score) in rows.items()]
    entries.sort(key=lambda row: row["mean"]["aurc"])
    # The same seed: the same resamples of the test examples for every run.
    resampled = {}
    for label, (members, score) in rows.items():
        ranked = [run.of(score) for run in members]
        values = [metrics.bootstrap_values(metrics.aurc, c, loss=wrong) for c, wrong in ranked]
        resampled[label] = np.mean(values, axis=0)
    differences = []
    for a, b in itertools.combinations(entries, 2):
        interval = metrics.percentile_interval(
            a["mean"]["aurc"] - b["mean"]["aurc"], resampled[a["label"]] - resampled[b["label"]]
        )
        differences.append({"a": a["label"], "b": b["label"], **dataclasses.asdict(interval)})
    return {
        "runs": [
            {"workdir": str(x.workdir), "method": x.config["method"], "seed": x.config["seed"]}
            for x in runs.values()
        ],
        "coverages": coverages,
        "rows": entries,
        "differences": differences,
    }


def _row(label: str, score: str, runs: list[FinishedRun], coverages: list[float]) -> dict[str, Any]:
    numbers = [run.numbers(score, coverages) for run in runs]
    values = {name: np.array([each[name] for each in numbers]) for name in numbers[0]}
    return {
        "label": label,
        "method": runs[0].config["method"],
        "score": score,
        "seeds": [run.config["seed"] for run in runs],
        "target_coverage": runs[0].config["target_coverage"],
        "mean": {name: np.mean(x, axis=0).tolist() for name, x in values.items()},
        "std": {name: _std(x).tolist() for name, x in values.items()},
    }


def _std(x: np.ndarray) -> np.ndarray:
    """The sample standard deviation over runs; of a single run none."""
    return np.std(x, axis=0, ddof=1) if len(x) > 1 else np.full(x.shape[1:], np.nan)


def _numbers(row: dict[str, Any]) -> list[tuple[float | None, float | None]]:
    """Mean and standard deviation, at each coverage and of each of `COLUMNS`."""
    mean, std = (
        [*row[part]["selective_risk"], *(row[part][name] for name in COLUMNS)]
        for part in ("mean", "std")
    )
    return list(zip(mean, std, strict=True))


def table(record: dict[str, Any]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings, and rows of (text, whether it is the best of its column)."""
    rows, last = record["rows"], COLUMNS
    if len({row["target_coverage"] for row in rows}) > 1:  # they do not compete at their targets
        last = COLUMNS | {n: COLUMNS[n]._replace(best=None) for n in ("own_risk", "deployed_risk")}
    at = [Column(f"{100 * coverage:g} %", best=min) for coverage in record["coverages"]]
    columns = [Column("runs", 1, "d"), *at, Column("target %", format="g"), *last.values()]
    values = []
    for row in rows:
        numbers, split = _numbers(row), len(at)
        target = row["target_coverage"], None
        values.append([(len(row["seeds"]), None), *numbers[:split], target, *numbers[split:]])
    cells = [_cells(pairs, c) for c, pairs in zip(columns, zip(*values, strict=True), strict=True)]
    headings = ["method, score", *(column.heading for column in columns)]
    return headings, [[(r["label"], False), *x] for r, *x in zip(rows, *cells, strict=True)]


def _cells(
    pairs: Iterable[tuple[float | None, float | None]], column: Column
) -> list[tuple[str, bool]]:
    """'mean ± std' of each row; the best are those that read no worse than the best, if any is."""
    text = functools.partial(reports.number, factor=column.factor, spec=column.format)
    cells = [(text(mean), "" if std is None else f" ± {text(std)}") for mean, std in pairs]
    means = [float(mean) for mean, _ in cells if mean != "-"]
    best = column.best(means) if column.best and means else None
    return [(mean + std, mean != "-" and float(mean) == best) for mean, std in cells]


def _differences(record: dict[str, Any], label: Callable[[str], str] = str) -> list[str]:
    lines = []
    for entry in record["differences"]:
        numbers = (f"{1000 * entry[key]:+.2f}" for key in ("estimate", "lower", "upper"))
        verdict = "" if entry["lower"] <= 0 <= entry["upper"] else " (differ)"
        rows = f"{label(entry['a'])} minus {label(entry['b'])}"
        lines.append("{}: {} [{}, {}]{}".format(rows, *numbers, verdict))
    return lines


NOTES = (
    "Selective error % on test by coverage (rank-based), mean ± standard deviation over seeds; "
    "bold: best of the column as printed.",
    "AURC x1000 of one minus the other, with the 95 % paired bootstrap interval over test "
    "examples; it does not cover the draw of the training runs.",
)


def markdown(record: dict[str, Any]) -> str:
    """The tables as Markdown."""
    headings, rows = table(record)
    lines = [NOTES[0], "", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [f"**{text}**" if best else _literal(text) for text, best in row]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", NOTES[1], "", *(f"- {line}" for line in _differences(record, _literal))]
    if record["ignored"]:
        ignored = _literal("; ".join(record["ignored"]))
        lines += ["", f"These runs differ in more than method and seed: {ignored}."]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """The text with what Markdown or HTML would take for markup escaped."""
    return re.sub(r"[\\`*<>|&\[\]]", r"\\\g<0>", text)


def csv_text(record: dict[str, Any]) -> str:
    """A line per method and score, numbers as fractions."""
    names = [*(f"selective_risk_at_{coverage:g}" for coverage in record["coverages"]), *COLUMNS]
    headings = [f"{name}_{part}" for name in names for part in ("mean", "std")]
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerow(["label", "method", "score", "runs", *headings])
    for row in record["rows"]:
        # An apostrophe before what a spreadsheet would take for a formula.
        texts = [re.sub(r"^[=+@-]", r"'\g<0>", row[name]) for name in ("label", "method", "score")]
        writer.writerow([*texts, len(row["seeds"]), *itertools.chain(*_numbers(row))])
    return file.getvalue()


def show(record: dict[str, Any], out: Path) -> None:
    """Prints the tables; those of all coverages are in compare.md."""
    headings, rows = table(record)
    kept = [i for i, name in enumerate(headings) if name in CONSOLE_COLUMNS]
    cells = [
        [rich.text.Text(row[i][0], style="bold" if row[i][1] else "") for i in kept] for row in rows
    ]
    title, shown = "Selective error % on test, by coverage", [headings[i] for i in kept]
    best = record["rows"][0]["label"]
    differences = zip(record["differences"], _differences(record), strict=True)
    parts: list[tables.Table | str] = [tables.Table(title, shown, cells), *NOTES]
    parts += [f"  {line}" for entry, line in differences if entry["a"] == best]
    if record["ignored"]:
        parts.append(
            f"These runs differ in more than method and seed: {'; '.join(record['ignored'])}"
        )
    tables.show(parts)
    say(f"All coverages and pairs: {out / 'compare.md'}, .json, .csv, .png")


def plot(
    rows: dict[str, tuple[list[FinishedRun], str]], record: dict[str, Any], path: Path
) -> None:
    """Draws each row's mean test risk-coverage curve with a band of one standard deviation."""
    axes = reports.new_axes(8, 5)
    for i, label in enumerate(row["label"] for row in record["rows"]):
        runs, score = rows[label]
        ranked = [run.of(score) for run in runs]
        risks = [metrics.selective_risk(c, loss=wrong, coverage=GRID) for c, wrong in ranked]
        std = 100 * np.nan_to_num(_std(np.array(risks)))
        mean = 100 * np.mean(risks, axis=0)
        style = "-" if score == "softmax_response" else "--"
        axes.plot(100 * GRID, mean, style, color=f"C{i % 10}", label=label)
        axes.fill_between(100 * GRID, mean - std, mean + std, color=f"C{i % 10}", alpha=0.15)
    axes.set_ylim(bottom=0)
    for text in axes.legend(loc="upper left", fontsize=8).get_texts():
        text.set_parse_math(False)  # a label is no formula
    reports.save_plot(axes, path, "Mean over seeds; bands: one standard deviation")


def ensemble(
    patterns: Sequence[str], out: Path, *, mixed: bool = False, scores: Sequence[str] = ()
) -> dict[str, Any]:
    """Evaluates the mean of finished runs' class probabilities (Lakshminarayanan et al., 2017).

    `out` becomes a finished run of the method "ensemble", which `compare` takes like any other; its
    report, which is returned, names the `members`. Arguments as of `compare`.
    """
    runs = load_runs(patterns, scores)
    if len(runs) < 2:
        raise InputError(f"an ensemble takes two runs or more, and --runs names {len(runs)}")
    own = os.path.exists(out / "config.json")
    if own or out.resolve() in {run.workdir.resolve() for run in runs}:
        raise InputError(f"--workdir={out} holds a run of its own; name another")
    differing = differing_fields(runs)
    if differing and not mixed:
        raise InputError(f"these runs differ: {'; '.join(differing)}; --mixed combines them too")
    test = combine([run.test for run in runs])
    paths = [run.workdir / "predictions_calibration.npz" for run in runs]
    calibration = combine([Predictions.load(path) for path in paths])
    config = ConfigDict(runs[0].report["config"])
    config.method = "ensemble"
    config.evaluation.scores = tuple(scores)
    record = evaluation_record(calibration, test, config, score="softmax_response")
    training = [run.report["training"] for run in runs]
    record["training"] = {
        name: None if None in (values := [entry[name] for entry in training]) else sum(values)
        for name in ("steps", "seconds")
    }
    record["members"] = [str(run.workdir) for run in runs]
    with writing(out):
        calibration.save(out / "predictions_calibration.npz")
        test.save(out / "predictions_test.npz")
        report = reports.write_report(record, test, config, out)
    reports.show_report(report, out)
    return report


def combine(members: Sequence[Predictions]) -> Predictions:
    """The logarithms of the members' mean probabilities, as logits, and their mean entropy.

    So the softmax response is that of the mean, and expected_entropy `[n]` gives the mutual
    information.
    """
    first = members[0]
    for other in members[1:]:
        shapes = {each.outputs["logits"].shape for each in (other, first)}
        if not other.same_examples(first) or len(shapes) > 1:
            raise InputError("the runs have other examples or classes than one another")
    # A mean probability is 0 only where all are; its logarithm is kept finite.
    mean = np.mean([member.probabilities for member in members], axis=0)
    logits = np.log(np.maximum(mean, np.finfo(np.float64).tiny))
    entropy = np.mean([-member.confidence("negative_entropy") for member in members], axis=0)
    return Predictions({"logits": logits, "expected_entropy": entropy}, first.labels, first.index)
