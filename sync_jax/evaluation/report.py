"""report.json (its fields: docs/report.md), the console's tables and risk_coverage.png."""

import contextlib
import datetime
import json
import math
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.box
import rich.console
import rich.table
from ml_collections import ConfigDict

import sync_jax
from sync_jax import metrics
from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions, Ranked
from sync_jax.evaluation.record import known_scores
from sync_jax.runtime.console import printable
from sync_jax.runtime.files import write_atomically, write_text
from sync_jax.runtime.profiling import describe
from sync_jax.scores import SCORES

SCHEMA = 2
CERTIFICATE_LABELS = {
    "sgr": "SGR",
    "learn_then_test/bonferroni": "LTT Bonferroni",
    "learn_then_test/fixed_sequence": "LTT fixed sequence",
    "conformal_risk_control": "CRC (joint)",
}


@metrics.unchecked()
def write_report(
    record: dict[str, Any], test: Predictions, config: ConfigDict, workdir: Path
) -> dict[str, Any]:
    """Writes risk_coverage.png, then report.json: where that is, the run is finished.

    `record` is of `record.evaluation_record`, with `training`; `test` are the predictions that it
    was made from. Returns the report as `read_report` reads it back.
    """
    report = {
        "schema": SCHEMA,
        "config": config.to_dict(),
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sync_jax": sync_jax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": [device.device_kind for device in jax.devices()],
        },
        **record,
    }
    known = known_scores(config, record["method_score"])
    curves = {
        name: test.ranked(known[name], **score["parameters"])
        for name, score in main_scores(record).items()
    }
    plot(record, curves, workdir / "risk_coverage.png")
    report = strict(report)
    write_text(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def read_report(workdir: Path) -> dict[str, Any] | None:
    """The report of a finished run, its strings `printable`; None where there is none."""
    path = workdir / "report.json"
    if not path.exists():
        return None
    with undamaged(path):
        content = json.loads(path.read_text())
        report = converted(content, lambda x: printable(x) if isinstance(x, str) else x)
        if (schema := report["schema"]) != SCHEMA:
            found = f"{path} has schema {schema}, this version reads {SCHEMA}"
            raise InputError(f"{found}; --mode=evaluate renews it")
        _shown(report)
        default_config().update(report["config"])
    return report


@contextlib.contextmanager
def undamaged(path: Path, guess: str = "") -> Iterator[None]:
    """Raises an InputError for whatever goes wrong with the contents of a report."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # whatever the report lacks, or has of another type
        found = f"{path} is damaged{guess} ({type(error).__name__}: {error})"
        raise InputError(f"{found}; --mode=evaluate makes it anew") from error


def speed_before(workdir: Path) -> dict[str, Any] | None:
    """Reads the speed of the training from the report that is about to be replaced."""
    try:
        report = read_report(workdir)
    except InputError:  # which is why it is being replaced
        return None
    return report["training"].get("speed") if report else None


def show_report(report: dict[str, Any], workdir: Path) -> None:
    """Prints the report's tables."""
    paths = (printable(workdir / name) for name in ("report.json", "risk_coverage.png"))
    show((*_shown(report), f"Report: {', '.join(paths)}"), width=120)


def show(parts: Iterable[rich.table.Table | str], *, width: int) -> None:
    """Prints tables and lines; piped output, which has no width of its own, takes `width`."""
    console = rich.console.Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = width
    for part in parts:
        console.print(part)


def table(title: str, headings: Iterable[str], rows: Iterable[Sequence[Any]]) -> rich.table.Table:
    """A table for the console, its columns aligned on the right."""
    columns = (rich.table.Column(heading, justify="right") for heading in headings)
    made = rich.table.Table(*columns, title=title, box=rich.box.SIMPLE_HEAD)
    for row in rows:
        made.add_row(*row)
    return made


def _shown(report: dict[str, Any]) -> list[rich.table.Table | str]:
    """The tables and lines that are printed."""
    parts: list[rich.table.Table | str] = [
        _coverage_table(report),
        "Rank-based: coverage imposed on the test ranking, as in published tables.",
        "Deployed: threshold from the calibration split; what a user would get.\n",
        _ranking_table(report),
        _certificate_table(report),
        "SGR, LTT: error of the answers at most the target, with confidence 1 - delta over the "
        "calibration split; the fixed\nsequence provided that errors are no likelier where "
        "confidence is higher. CRC: P(answered and wrong) at most the\ntarget, on average. Each "
        "holds by itself: choose score, target and method before looking.\n",
        *_certificate_notes(report),
    ]
    test, training, calibration = (report[name] for name in ("test", "training", "calibration"))
    seconds = "" if training["seconds"] is None else f", trained in {training['seconds']:.0f} s"
    parts.append(
        f"Test accuracy {number(test['accuracy'])} % on {test['n']:,} images{seconds}. "
        f"NLL {test['negative_log_likelihood']:.3f}, Brier {test['brier']:.3f}, "
        f"ECE {number(test['ece_15_bins_of_equal_width'])} % (15 bins of equal width)."
    )
    if training.get("speed"):
        parts.append(describe(training["speed"]))
    if "aurc_minus_softmax_response" in report:
        difference = report["aurc_minus_softmax_response"]
        low, high = (number(difference[end], 1000) for end in ("lower", "upper"))
        parts.append(
            f"AURC x1000 of {label_of(report, report['method_score'])} minus that of SR: "
            f"{number(difference['estimate'], 1000)} (95 % paired bootstrap: {low} to {high})."
        )
    if "mean_selection" in calibration:
        target = report["config"]["target_coverage"]
        parts.append(
            f"Mean g {calibration['mean_selection']:.3f} on calibration data, "
            f"{test['mean_selection']:.3f} on test, for a target of {target:g}."
        )
    return parts


def label_of(record: dict[str, Any], name: str) -> str:
    """A score's label; reports of version 0.1 have none, and built-in scores alone."""
    known = SCORES[name].label if name in SCORES else name
    return record["scores"][name].get("label", known)


def main_scores(record: dict[str, Any]) -> dict[str, Any]:
    """The softmax response and the method's own score, which may be the same."""
    names = dict.fromkeys(("softmax_response", record["method_score"]))
    return {name: record["scores"][name] for name in names}


def _coverage_table(report: dict[str, Any]) -> rich.table.Table:
    scores = main_scores(report)
    labels = [label_of(report, name) for name in scores]
    headings = ["coverage %", *(f"rank-based {label}" for label in labels)]
    for label in labels:
        headings += [f"deployed {label}", "at coverage %"]
    rows = []
    for k, entry in enumerate(report["scores"]["softmax_response"]["rank_based"]):
        cells = [f"{100 * entry['coverage']:g}"]
        cells += [number(score["rank_based"][k]["selective_risk"]) for score in scores.values()]
        for score in scores.values():
            deployed = score["deployed"][k]
            cells += [number(deployed["selective_risk"]), number(deployed["coverage"])]
        rows.append(cells)
    return table("Selective error % on test", headings, rows)


def _ranking_table(report: dict[str, Any]) -> rich.table.Table:
    headings = ("score", "AURC x1000", "95 % interval", "E-AURC x1000", "AUGRC x1000")
    rows = []
    for name, score in report["scores"].items():
        label, parameters = label_of(report, name), score["parameters"]
        chosen = ", ".join(f"{name} {value}" for name, value in parameters.items())
        if chosen:
            label += " (SR)" if parameters.get("p", 0) is None else f" ({chosen})"
        aurc, interval = score["aurc"]["mean"], score.get("bootstrap_95", {"aurc": ()})["aurc"]
        ranking = aurc, *interval, score["excess_aurc"]["mean"], score["augrc"]
        area, *ends, excess, augrc = (number(value, 1000) for value in ranking)
        failure = (number(score[name], 1, ".4f") for name in ("failure_auroc", "fpr_at_95_tpr"))
        rows.append((label, area, " to ".join(ends), excess, augrc, *failure))
    title = "Ranking on test (AURC convention: mean, ties in random order)"
    return table(title, (*headings, "failure AUROC", "FPR@95TPR"), rows)


def _certificate_table(report: dict[str, Any]) -> rich.table.Table:
    rows = []
    for name, score in main_scores(report).items():
        cells: dict[float, dict[str, str]] = {}
        for certificate in score["certificates"]:
            test, cell = certificate["test"], "infeasible"
            if certificate["feasible"]:
                cell = f"{number(test['coverage'])} : {number(test['selective_risk'])}"
            cells.setdefault(certificate["target_risk"], {})[certificate["method"]] = cell
        for target, of_method in cells.items():
            of_methods = (of_method[key] for key in CERTIFICATE_LABELS)
            rows.append((label_of(report, name), f"{100 * target:g}", *of_methods))
    delta = report["config"]["evaluation"]["delta"]
    title = f"Certified thresholds at delta {delta:g}: test coverage % : test error %"
    return table(title, ("score", "target %", *CERTIFICATE_LABELS.values()), rows)


def _certificate_notes(report: dict[str, Any]) -> list[str]:
    """Why certificates are infeasible, and how many classes have one of their own."""
    notes = [
        f"{label_of(report, name)}, {CERTIFICATE_LABELS[certificate['method']]} at "
        f"{100 * certificate['target_risk']:g} %: {certificate['reason']}"
        for name, score in main_scores(report).items()
        for certificate in score["certificates"]
        if not certificate["feasible"]
    ]
    score, own = report["scores"][report["method_score"]], label_of(report, report["method_score"])
    plan = score["calibration_plans"][0]
    needs = ", ".join(
        f"{100 * plan['target_risk']:g} %: "
        + ("none is enough" if plan["n_calibration"] is None else f"{plan['n_calibration']:,}")
        for plan in score["calibration_plans"]
    )
    notes.append(
        f"Calibration examples for one threshold at {100 * plan['coverage']:g} % coverage by "
        f"{own}, where {number(plan['expected_risk'])} % of them are wrong: {needs}."
    )
    certified: dict[float, list[bool]] = {}
    for row in score["class_certificates"]:
        certified.setdefault(row["target_risk"], []).append(row["feasible"])
    counts = ", ".join(
        f"{sum(feasible)} of {len(feasible)} at {100 * target:g} %"
        for target, feasible in certified.items()
    )
    notes.append(
        f"Predicted classes with a certificate of their own, all together, by {own}: {counts}."
    )
    return notes


def plot(record: dict[str, Any], curves: dict[str, Ranked], path: Path) -> None:
    """Draws the test risk-coverage curve of each score, the oracle's, and the operating points."""
    axes = new_axes(7, 4.5)
    for color, (name, ranked) in zip(("C0", "C1"), curves.items(), strict=False):
        score, wrong = record["scores"][name], ranked.wrong
        curve = metrics.risk_coverage_curve(ranked.confidence, loss=wrong)
        label = f"{label_of(record, name)}, AURC x1000 = {1000 * score['aurc']['mean']:.2f}"
        axes.plot(100 * curve.coverage, 100 * curve.risk, color=color, label=label)
        point = score["operating_point"]
        if point["n_accepted"]:
            coverage, risk = 100 * point["coverage"], 100 * point["selective_risk"]
            axes.plot(coverage, risk, "o", color=color)
            axes.axvline(coverage, color=color, linestyle=":", linewidth=1)
            axes.annotate(
                f"{label_of(record, name)} deployed at {point['threshold']:.3f}:\n"
                f"{risk:.2f} % wrong of {coverage:.1f} % answered",
                (coverage, risk),
                xytext=(-8, 30 if color == "C1" else 10),
                textcoords="offset points",
                horizontalalignment="right",
                fontsize=8,
                color=color,
            )
    # The oracle ranks every correct prediction above every error.
    accuracy = 100 * (1 - wrong.mean())
    oracle_coverage = np.linspace(max(accuracy, 1e-9), 100, 100)
    axes.plot(
        np.concatenate([[0, accuracy], oracle_coverage]),
        np.concatenate([[0, 0], 100 - 100 * accuracy / oracle_coverage]),
        color="gray",
        linestyle="--",
        label="oracle",
    )
    axes.set_ylim(0, 1.1 * 100 * max(float(wrong.mean()), 1e-3))
    axes.legend(loc="upper left")
    save_plot(axes, path, "Risk-coverage curve; dots: thresholds chosen on calibration data")


def new_axes(width: float, height: float) -> Any:
    """The axes of a new figure."""
    # Here and not above: it takes two seconds, which a training need not wait for to begin.
    import matplotlib.figure

    # A Figure of its own, not pyplot's: no global state, no display needed.
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained", dpi=150)
    return figure.add_subplot()


def save_plot(axes: Any, path: Path, title: str) -> None:
    """Labels a risk-coverage plot and writes it as PNG."""
    axes.set(
        xlabel="coverage on test (%)",
        ylabel="selective error on test (%)",
        xlim=(0, 100),
        title=title,
    )
    axes.grid(alpha=0.3)
    write_atomically(path, lambda file: axes.figure.savefig(file, format="png"))


def number(value: float | None, factor: float = 100, spec: str = ".2f") -> str:
    """A number of a table, in percent if nothing else is said; undefined ones are a dash."""
    return "-" if value is None else format(factor * value, spec)


def converted(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """JSON-like values with every key and plain value through `leaf`, tuples as lists."""
    if isinstance(value, dict):
        return {leaf(key): converted(item, leaf) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [converted(item, leaf) for item in value]
    return leaf(value)


def strict(value: Any) -> Any:
    """Plain JSON values: tuples as lists, NaN as null, infinities as strings."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, float) or math.isfinite(value):
            return value
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    return converted(value, leaf)
