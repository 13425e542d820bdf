"""One table of finished runs: methods and scores by coverage, over seeds, on the same examples.

compare.json is strict JSON; fractions, undefined values null. Fields:

    runs[]          workdir, method, seed of every run
    ignored[]       config fields that differ although the comparison needs them equal; only where
                    that was allowed
    coverages[]     the coverages of the table
    rows[]          a row per method and score, best AURC first: label, method, score, seeds,
                    target_coverage, and
                    mean, std (sample standard deviation, null for one run) of:
                    selective_risk (arrays, rank-based), aurc, excess_aurc, augrc (convention mean),
                    accuracy, seconds (of training); and at the row's own target_coverage: own_risk
                    (rank-based), deployed_risk and deployed_coverage (threshold from the
                    calibration split; the mean risk is null where a run accepted nothing)
    differences[]   per pair of rows a and b, by label: AURC of a minus that of b, each the mean of
                    its row's runs: a metrics.Interval; all rows see the same resamples of the test
                    examples

Runs of one method that differ in its own fields (`loss.*`, `target_coverage`) are rows of their
own, labelled with them.
"""

import csv
import dataclasses
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
import rich.box
import rich.console
import rich.table
import rich.text

from sync_jax import metrics
from sync_jax.config import default_config, upgraded
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import label_of, read_report, strict
from sync_jax.options import find, flatten
from sync_jax.runtime.console import printable
from sync_jax.runtime.files import write_atomically, write_text
from sync_jax.scores import SCORES, Score

# What may differ between the rows of a table: the methods with what belongs to them, the seed, and
# what moves no weight. The test ranking's coverages are this module's own.
OF_METHOD = ("method", "target_coverage", "loss.")
FREE = ("seed", "data.data_dir", "data.source", "log.", "checkpoint.", "evaluation.")
OWN = ("own_risk", "deployed_risk", "deployed_coverage")
COLUMNS = (*OWN, "aurc", "excess_aurc", "augrc", "accuracy", "seconds")
CONSOLE_COLUMNS = (
    *("method, score", "runs", "100 %", "90 %", "80 %", "70 %", "target %", "error % at target"),
    *("AURC x1000", "AUGRC x1000", "accuracy %", "seconds"),
)
GRID = np.linspace(0.01, 1, 100)  # coverages of the plot


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run that has its report.

    Attributes:
        workdir: where it is.
        config: its fields by path.
        report: of `report.write_report`.
        test: its predictions.
        own: scores of other packages that may be used, by name.
    """

    workdir: Path
    config: dict[str, Any]
    report: dict[str, Any]
    test: Predictions
    own: Mapping[str, Score] = dataclasses.field(default_factory=dict)

    def of(self, score: str) -> tuple[np.ndarray, np.ndarray]:
        """Confidence and error of the test examples, `[n]` each."""
        known = {**SCORES, **self.own}
        if score not in known:
            raise InputError(
                f"{self.workdir} uses the score {score}, which is not built in; name it in --scores"
            )
        parameters = self.report["scores"][score]["parameters"]
        return self.test.confidence(known[score], **parameters), self.test.wrong

    def numbers(self, score: str) -> dict[str, float]:
        """`COLUMNS` of a score, NaN where they are undefined."""
        record, (confidence, wrong) = self.report["scores"][score], self.of(score)
        point = record["operating_point"]
        found = {
            "own_risk": metrics.selective_risk(
                confidence, wrong, coverage=point["target_coverage"]
            ),
            "deployed_risk": point["selective_risk"],
            "deployed_coverage": point["coverage"],
            "aurc": record["aurc"]["mean"],
            "excess_aurc": record["excess_aurc"]["mean"],
            "augrc": record["augrc"],
            "accuracy": self.report["test"]["accuracy"],
            "seconds": self.report["training"]["seconds"],
        }
        return {k: float("nan") if value is None else float(value) for k, value in found.items()}


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

    Returns:
        The record.

    Raises:
        InputError: a pattern matches no finished run; the runs cannot be compared; `out` cannot be
            written.
    """
    runs = load_runs(patterns, scores)
    ignored = differing_fields(runs)
    if ignored and not mixed:
        raise InputError(
            f"these runs differ in more than method and seed: {'; '.join(ignored)}; compare "
            "others, or add --mixed to compare them all the same"
        )
    groups = grouped(runs)
    record = comparison(groups)
    record["ignored"] = ignored
    record = strict(record)
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text).writerows(csv_rows(record))
        for name, content in {
            "compare.json": json.dumps(record, indent=1, allow_nan=False) + "\n",
            "compare.md": markdown(record),
            "compare.csv": text.getvalue(),
        }.items():
            write_text(out / name, content)
        plot(groups, record, out / "compare.png")
    except OSError as error:
        raise InputError(f"--workdir={out} cannot be written: {error.strerror}") from error
    show(record, out)
    return record


def load_runs(patterns: Sequence[str], scores: Sequence[str] = ()) -> list[FinishedRun]:
    """The finished runs that the patterns name, each once, in the order of their names.

    Args:
        patterns: folders, or patterns of them.
        scores: of other packages that the runs may use, as package.module:NAME.

    Raises:
        InputError: a pattern matches nothing, or a folder that holds no finished run.
    """
    own = {name: find(name, SCORES, Score, "--scores") for name in scores}
    folders: dict[Path, None] = {}
    for pattern in patterns:
        matches = sorted(glob.glob(os.path.expanduser(pattern)))
        found = [Path(match) for match in matches if Path(match).is_dir()]
        if not found:
            raise InputError(f"--runs={pattern} matches no folder")
        folders |= dict.fromkeys(found)
    if not folders:
        raise InputError("--runs is missing; for example --runs='runs/quickstart-*'")
    runs = []
    defaults = dict(flatten(default_config().to_dict()))
    for folder in folders:
        report = read_report(folder)
        if report is None:
            raise InputError(f"{folder} holds no finished run: it has no report.json")
        test = Predictions.load(folder / "predictions_test.npz")
        # A field younger than the run counts with its default.
        config = defaults | upgraded(report["config"])
        run = FinishedRun(folder, config, report, test, own)
        try:
            for score in ("softmax_response", report["method_score"]):
                run.numbers(score)
            metrics.selective_risk(*run.of("softmax_response"), coverage=_coverages(run))
        except InputError:
            raise
        except Exception as error:  # whatever the report lacks, or has of another type
            raise InputError(
                f"{folder / 'report.json'} is damaged, or not of the predictions beside it "
                f"({type(error).__name__}: {error}); --mode=evaluate makes it anew"
            ) from error
        runs.append(run)
    first = runs[0]
    for run in runs[1:]:
        if not (
            np.array_equal(run.test.index, first.test.index)
            and np.array_equal(run.test.labels, first.test.labels)
        ):
            raise InputError(f"{run.workdir} has other test examples than {first.workdir}")
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


def grouped(runs: Sequence[FinishedRun]) -> dict[str, list[FinishedRun]]:
    """Runs that differ in their seed only, by a label: the method, and what sets it apart.

    Raises:
        InputError: two of them have the same seed.
    """
    groups: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        key = tuple((k, repr(v)) for k, v in sorted(run.config.items()) if not k.startswith(FREE))
        groups.setdefault(key, []).append(run)
    labelled: dict[str, list[FinishedRun]] = {}
    for key, members in groups.items():
        config = dict(key)
        rivals = [dict(other) for other in groups if dict(other)["method"] == config["method"]]
        apart = [
            f"{field}={value.strip(chr(39))}"
            for field, value in key
            if any(rival.get(field) != value for rival in rivals)
        ]
        method = members[0].config["method"]
        label = printable(f"{method} ({', '.join(apart)})" if apart else method)
        labelled[label] = members
        seen: dict[Any, Path] = {}
        for run in members:
            seed = run.config["seed"]
            if seed in seen:
                raise InputError(f"{run.workdir} and {seen[seed]} are the same run: seed {seed}")
            seen[seed] = run.workdir
    return labelled


def comparison(groups: dict[str, list[FinishedRun]]) -> dict[str, Any]:
    """The record, apart from `ignored`; see the top of this file."""
    runs = [run for members in groups.values() for run in members]
    coverages = _coverages(runs[0])
    rows, resampled = [], {}
    for label, members in groups.items():
        for score in dict.fromkeys(("softmax_response", members[0].report["method_score"])):
            row = _row(label, score, members, coverages)
            rows.append(row)
            # The same seed: the same resamples of the test examples for every run.
            values = [metrics.bootstrap_values(metrics.aurc, *run.of(score)) for run in members]
            resampled[row["label"]] = np.mean(values, axis=0)
    rows.sort(key=lambda row: row["mean"]["aurc"])
    differences = []
    for a, b in itertools.combinations(rows, 2):
        interval = metrics.percentile_interval(
            a["mean"]["aurc"] - b["mean"]["aurc"], resampled[a["label"]] - resampled[b["label"]]
        )
        differences.append({"a": a["label"], "b": b["label"], **dataclasses.asdict(interval)})
    return {
        "runs": [
            {
                "workdir": str(run.workdir),
                "method": run.config["method"],
                "seed": run.config["seed"],
            }
            for run in runs
        ],
        "coverages": coverages,
        "rows": rows,
        "differences": differences,
    }


def _coverages(run: FinishedRun) -> list[float]:
    return [percent / 100 for percent in run.report["config"]["evaluation"]["coverages"]]


def _row(
    label: str, score: str, members: list[FinishedRun], coverages: list[float]
) -> dict[str, Any]:
    values: dict[str, list[Any]] = {"selective_risk": []}
    for run in members:
        confidence, wrong = run.of(score)
        risk = metrics.selective_risk(confidence, wrong, coverage=coverages)
        values["selective_risk"].append(risk)
        for name, number in run.numbers(score).items():
            values.setdefault(name, []).append(number)

    def std(numbers: list[Any]) -> Any:
        if len(numbers) == 1:
            return (np.asarray(numbers[0], dtype=np.float64) * np.nan).tolist()
        return np.std(numbers, axis=0, ddof=1).tolist()

    return {
        "label": f"{label}, {label_of(members[0].report, score)}",
        "method": members[0].config["method"],
        "score": score,
        "seeds": [run.config["seed"] for run in members],
        "target_coverage": members[0].config["target_coverage"],
        "mean": {name: np.mean(numbers, axis=0).tolist() for name, numbers in values.items()},
        "std": {name: std(numbers) for name, numbers in values.items()},
    }


def table(record: dict[str, Any]) -> tuple[list[str], list[list[tuple[str, bool]]]]:
    """Headings, and rows of (text, whether it is the best of its column)."""
    headings = ["method, score", "runs", *(f"{100 * c:g} %" for c in record["coverages"])]
    headings += ["target %", "error % at target", "deployed error %", "deployed coverage %"]
    headings += ["AURC x1000", "E-AURC x1000", "AUGRC x1000", "accuracy %", "seconds"]
    columns: list[list[tuple[str, bool]]] = [
        [(row["label"], False) for row in record["rows"]],
        [(str(len(row["seeds"])), False) for row in record["rows"]],
    ]
    for k in range(len(record["coverages"])):
        pairs = [
            (row["mean"]["selective_risk"][k], row["std"]["selective_risk"][k])
            for row in record["rows"]
        ]
        columns.append(_column(pairs, 100, 2, best=min))
    # Rows of different targets do not compete for the best of these.
    targets = {row["target_coverage"] for row in record["rows"]}
    same_target = min if len(targets) == 1 else None
    columns.append([(f"{100 * row['target_coverage']:g}", False) for row in record["rows"]])
    formats: dict[str, tuple[float, int, Any]] = {
        **dict.fromkeys(("own_risk", "deployed_risk"), (100, 2, same_target)),
        "deployed_coverage": (100, 2, None),
        **dict.fromkeys(("aurc", "excess_aurc", "augrc"), (1000, 2, min)),
        "accuracy": (100, 2, max),
        "seconds": (1, 0, min),
    }
    for name in COLUMNS:
        factor, digits, best = formats[name]
        pairs = [(row["mean"][name], row["std"][name]) for row in record["rows"]]
        columns.append(_column(pairs, factor, digits, best=best))
    return headings, [list(cells) for cells in zip(*columns, strict=True)]


def _column(
    pairs: list[tuple[float | None, float | None]], factor: float, digits: int, *, best: Any
) -> list[tuple[str, bool]]:
    """'mean ± std' of each row; the best are those that read no worse than the best, if any is."""

    def text(value: float | None) -> str:
        return "-" if value is None else f"{factor * value:.{digits}f}"

    means = [float(text(mean)) for mean, _ in pairs if mean is not None]
    cells = []
    for mean, std in pairs:
        shown = text(mean) if std is None else f"{text(mean)} ± {text(std)}"
        is_best = best is not None and mean is not None and float(text(mean)) == best(means)
        cells.append((shown, is_best))
    return cells


def _differences(record: dict[str, Any], label: Callable[[str], str] = str) -> list[str]:
    lines = []
    for entry in record["differences"]:
        numbers = (f"{1000 * entry[key]:+.2f}" for key in ("estimate", "lower", "upper"))
        estimate, lower, upper = numbers
        verdict = "" if entry["lower"] <= 0 <= entry["upper"] else " (differ)"
        rows = f"{label(entry['a'])} minus {label(entry['b'])}"
        lines.append(f"{rows}: {estimate} [{lower}, {upper}]{verdict}")
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


def _cell(text: str) -> str:
    """The text with an apostrophe before what a spreadsheet would take for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def csv_rows(record: dict[str, Any]) -> list[list[Any]]:
    """A row per method and score, numbers as fractions."""
    names = [f"selective_risk_at_{coverage:g}" for coverage in record["coverages"]]
    columns = [f"{name}_{part}" for name in (*names, *COLUMNS) for part in ("mean", "std")]
    lines: list[list[Any]] = [["label", "method", "score", "runs", *columns]]
    for row in record["rows"]:
        names_of_row = [_cell(row[name]) for name in ("label", "method", "score")]
        line: list[Any] = [*names_of_row, len(row["seeds"])]
        for k in range(len(names)):
            line += [row[part]["selective_risk"][k] for part in ("mean", "std")]
        line += [row[part][name] for name in COLUMNS for part in ("mean", "std")]
        lines.append(line)
    return lines


def show(record: dict[str, Any], out: Path) -> None:
    """Prints the tables; those of all coverages are in compare.md."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = rich.console.Console(highlight=False, markup=False, emoji=False, width=140)
    headings, rows = table(record)
    kept = [i for i, name in enumerate(headings) if name in CONSOLE_COLUMNS]
    printed = rich.table.Table(
        title="Selective error % on test, by coverage", box=rich.box.SIMPLE_HEAD
    )
    for i in kept:
        printed.add_column(headings[i], justify="left" if i == 0 else "right")
    for row in rows:
        printed.add_row(
            *(rich.text.Text(row[i][0], style="bold" if row[i][1] else "") for i in kept)
        )
    console.print(printed)
    for note in NOTES:
        console.print(note)
    best = record["rows"][0]["label"]
    for entry, line in zip(record["differences"], _differences(record), strict=True):
        if entry["a"] == best:
            console.print(f"  {line}")
    if record["ignored"]:
        console.print(
            f"These runs differ in more than method and seed: {'; '.join(record['ignored'])}"
        )
    console.print(f"All coverages and pairs: {printable(out / 'compare.md')}, .json, .csv, .png")


def plot(groups: dict[str, list[FinishedRun]], record: dict[str, Any], path: Path) -> None:
    """Draws each row's mean test risk-coverage curve with a band of one standard deviation."""
    figure = matplotlib.figure.Figure(figsize=(8, 5), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    members = {
        f"{label}, {label_of(runs[0].report, score)}": (runs, score)
        for label, runs in groups.items()
        for score in runs[0].report["scores"]
    }
    for i, row in enumerate(record["rows"]):
        runs, score = members[row["label"]]
        risks = [metrics.selective_risk(*run.of(score), coverage=GRID) for run in runs]
        # The sample standard deviation, as in the table; of one run none.
        std = 100 * np.std(risks, axis=0, ddof=1) if len(runs) > 1 else np.zeros(len(GRID))
        mean = 100 * np.mean(risks, axis=0)
        style = "-" if score == "softmax_response" else "--"
        axes.plot(100 * GRID, mean, style, color=f"C{i % 10}", label=row["label"])
        axes.fill_between(100 * GRID, mean - std, mean + std, color=f"C{i % 10}", alpha=0.15)
    axes.set(
        xlabel="coverage on test (%)",
        ylabel="selective error on test (%)",
        xlim=(0, 100),
        title="Mean over seeds; bands: one standard deviation",
    )
    axes.set_ylim(bottom=0)
    for text in axes.legend(loc="upper left", fontsize=8).get_texts():
        text.set_parse_math(False)  # a label is no formula
    axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png"))
