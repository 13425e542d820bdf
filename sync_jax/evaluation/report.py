"""report.json (its fields: docs/report.md), the console's tables and risk_coverage.png."""

import contextlib
import datetime
import json
import math
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from scipy.stats import binomtest

import sync_jax
from sync_jax import metrics
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions, Ranked
from sync_jax.evaluation.record import known_scores
from sync_jax.evaluation.tables import Table, as_html, show
from sync_jax.runtime import page
from sync_jax.runtime.console import printable, say
from sync_jax.runtime.files import write_atomically, write_text
from sync_jax.scores import SCORES, Score

SCHEMA = 3
OLDER = 2  # has no recommended certificate, and its thresholds are float64's
_DUPLICATES = {
    "group": "Equal pictures are on one side only: in train, calibration or test. Of those in two "
    "split folders only the copies in one are used (config.data.duplicates='group').",
    "keep": "Equal pictures were left where they lie (config.data.duplicates='keep').",
}
CERTIFICATE_LABELS = {
    "sgr_fixed_sequence": "SGR + fixed sequence",
    "sgr": "SGR",
    "learn_then_test/bonferroni": "LTT Bonferroni",
    "learn_then_test/holm": "LTT Holm",
    "learn_then_test/fixed_sequence": "LTT fixed sequence",
}


@metrics.unchecked()
def write_report(
    record: dict[str, Any],
    test: Predictions,
    config: ConfigDict,
    workdir: Path,
    *,
    scores: Mapping[str, Score] | None = None,
) -> dict[str, Any]:
    """Writes risk_coverage.png, report.html, then report.json: where that is, a run is finished.

    `record` is of `record.evaluation_record`, with `training`; `test` are the predictions that it
    was made from, by `scores`, as there. Returns the report as `read_report` reads it back.
    """
    jax = sys.modules.get("jax")  # a report on given numbers does without
    report = {
        "schema": SCHEMA,
        **record,
        "config": config.to_dict(),
        "environment": {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "sync_jax": sync_jax.__version__,
            "jax": jax.__version__ if jax else None,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": [device.device_kind for device in jax.devices()] if jax else [],
        },
    }
    known = known_scores(config, record["method_score"]) if scores is None else scores
    curves = {
        name: test.ranked(known[name], **score["parameters"])
        for name, score in main_scores(record).items()
    }
    plot(record, curves, workdir / "risk_coverage.png")
    report = strict(report)
    write_page(converted(report, lambda x: printable(x) if isinstance(x, str) else x), workdir)
    write_text(workdir / "report.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
    return report


def write_page(report: dict[str, Any], workdir: Path) -> None:
    """Writes report.html: the decision, the plot, all tables, and copies among the pictures."""
    config, environment = report["config"], report["environment"]
    data = config.get("data", {})
    lead, *rest = as_html(_shown(report))
    alt = "Risk-coverage curves on test, and the operating points"
    parts = [lead, page.plot(workdir / "risk_coverage.png", alt), *rest]
    if (copies := workdir / "data_report.html").is_file():
        parts.append(page.heading("Copies among the pictures"))
        if data.get("name") == "image_folder" and data["duplicates"] in _DUPLICATES:
            parts.append(page.paragraph(_DUPLICATES[data["duplicates"]]))
        parts.append(page.inside(copies.read_text()))
    parts.append(page.paragraph(f"{environment['date']}, sync_jax {environment['sync_jax']}"))
    title = "Given predictions"
    if "method" in config:
        title = f"{config['method']} on {config['data']['name']}, seed {config['seed']}"
    write_text(workdir / "report.html", page.page(title, *parts))


def read_report(workdir: Path) -> dict[str, Any] | None:
    """The report of a finished run, its strings `printable`; None where there is none."""
    from sync_jax.config import default_config  # here, for that imports JAX

    path = workdir / "report.json"
    if not path.exists():
        return None
    with undamaged(path):
        content = json.loads(path.read_text())
        report = converted(content, lambda x: printable(x) if isinstance(x, str) else x)
        if (schema := report["schema"]) not in (OLDER, SCHEMA):
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
    show(_shown(report))
    say(f"Report: {workdir / 'report.html'}, report.json and risk_coverage.png beside it")


def _shown(report: dict[str, Any]) -> list[Table | str]:
    """The tables and lines that are printed."""
    certified, joint = _certificate_tables(report)
    parts: list[Table | str] = [
        _lead(report),
        *([report["note"]] if report.get("note") else []),
        "",
        _coverage_table(report),
        "Rank-based: coverage imposed on the test ranking, as in published tables. Deployed: "
        "threshold from the calibration split; what a user would get.\n",
        _ranking_table(report),
        "",
        certified,
        "Test coverage % : test error %. The error of the answers is at most the target, with "
        "confidence 1 - delta over the calibration split. A fixed sequence assumes that errors are "
        "no likelier where confidence is higher; SGR's and Holm's proofs take the thresholds "
        "tested for fixed in advance. Each holds by itself: choose score, target "
        "and method before looking. report.json has thresholds and reasons.\n",
        joint,
        "Test coverage % : answered and wrong, % of all test examples. That share is at most the "
        "target on average over calibration splits, and not with any confidence for one.\n",
        *_certificate_notes(report),
    ]
    test, training, calibration = (report[name] for name in ("test", "training", "calibration"))
    seconds = "" if training["seconds"] is None else f", trained in {training['seconds']:.0f} s"
    accuracy = f"Test accuracy {number(test['accuracy'])} % on {test['n']:,} examples{seconds}."
    if "softmax_response" in report["scores"]:  # not of confidences alone
        accuracy += (
            f" NLL {test['negative_log_likelihood']:.3f}, Brier {test['brier']:.3f}, "
            f"ECE {number(test['ece_15_bins_of_equal_width'])} % (15 bins of equal width)."
        )
    parts.append(accuracy)
    if training.get("speed"):
        from sync_jax.runtime.profiling import describe

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


def _lead(report: dict[str, Any]) -> str:
    """The recommended certificate in one sentence, or why there is none and what would do."""
    if report["schema"] == OLDER:
        return "An older report, with thresholds for float64 alone; --mode=evaluate renews it."
    found = report["recommended"]
    name = str(found["score"]).replace("_", " ")
    wrong, sure = (f"{100 * x:g} %" for x in (found["target_risk"], 1 - found["delta"]))
    if found["feasible"]:
        # All digits: the certificate is that of this threshold and of none beside it.
        value = float(found["threshold"])
        threshold = str(np.float32(value)) if np.float32(value) == value else str(value)
        covered = number(found["test"]["coverage"], spec=".1f")
        what = "log odds are" if found["score"] == "log_odds" else f"{found['score']} is"
        return (
            f"Answer when the {what} at least {threshold}: at most {wrong} wrong with {sure} "
            f"confidence; answers {covered} % of the test examples. (Its "
            "assumptions stand below the certificates.)"
        )
    what = "groups" if "groups" in report["calibration"] else "examples"
    if (plan := found["calibration_plan"]) is not None:
        advice = (
            f"With about {plan['n_calibration']:,} calibration {what} (there are "
            f"{found['n_calibration']:,}) a threshold at "
            f"{number(plan['coverage'], spec='.0f')} % coverage would be certified four times in "
            "five"
        )
    else:
        advice = "The error is too high at every coverage; more calibration data would not help"
    return (
        f"No threshold of the {name} is certified for at most {wrong} wrong with {sure} "
        f"confidence. {advice}."
    )


def shifted(before: dict[str, Any], there: dict[str, Any], folder: Path) -> list[Table | str]:
    """What the run's own thresholds give on its test split and on another folder's pictures."""

    def cells(test: dict[str, Any], there: dict[str, Any]) -> list[str]:
        pairs = [
            number(x, spec=spec)
            for entry in (test, there)
            for x, spec in ((entry["coverage"], ".1f"), (entry["selective_risk"], ".2f"))
        ]
        accepted = max(there["n_accepted"], 1)  # of none the interval is that of one right answer
        ends = binomtest(there["n_errors"], accepted).proportion_ci(0.95, "exact")
        return [*pairs, " to ".join(number(end, spec=".1f") for end in ends)]

    rows = []
    for name in main_scores(before):
        own, other = (x["scores"][name]["operating_point"] for x in (before, there))
        where = f"{100 * own['target_coverage']:g} % coverage by {label_of(before, name)}"
        rows.append([where, *cells(own, other)])
    certified, found = before["recommended"], there["recommended"]["test"]
    if certified["feasible"]:
        where = f"at most {100 * certified['target_risk']:g} % wrong"
        rows.append([where, *cells(certified["test"], found)])
    headings = ["threshold for", "test covers %", "wrong %"]
    headings += ["there covers %", "wrong %", "95 % interval"]
    lines = []
    if certified["feasible"]:
        low = binomtest(found["n_errors"], max(found["n_accepted"], 1)).proportion_ci(0.95).low
        kept = "is broken" if low > certified["bound"] else "does not look broken"
        lines.append(
            f"The certificate is about data as the calibration split's, and promises nothing of "
            f"{folder}; there it {kept}."
        )
    accuracy = [number(x["test"]["accuracy"]) for x in (before, there)]
    areas = [number(x["scores"]["softmax_response"]["aurc"]["mean"], 1000) for x in (before, there)]
    lines.append(
        f"Accuracy {accuracy[0]} % on test, {accuracy[1]} % there; AURC x1000 by SR {areas[0]} and "
        f"{areas[1]}."
    )
    return [Table(f"The run's own thresholds on {folder}", headings, rows), *lines]


def label_of(record: dict[str, Any], name: str) -> str:
    """A score's label; reports of version 0.1 have none, and built-in scores alone."""
    known = SCORES[name].label if name in SCORES else name
    return record["scores"][name].get("label", known)


def main_scores(record: dict[str, Any]) -> dict[str, Any]:
    """The softmax response, where there is one, and the method's own score; they may be one."""
    names = dict.fromkeys(("softmax_response", record["method_score"]))
    return {name: record["scores"][name] for name in names if name in record["scores"]}


def _coverage_table(report: dict[str, Any]) -> Table:
    scores = main_scores(report)
    labels = [label_of(report, name) for name in scores]
    headings = ["coverage %", *(f"rank-based {label}" for label in labels)]
    for label in labels:
        headings += [f"deployed {label}", "covers %"]
    rows = []
    for k, entry in enumerate(next(iter(scores.values()))["rank_based"]):
        cells = [f"{100 * entry['coverage']:g}"]
        cells += [number(score["rank_based"][k]["selective_risk"]) for score in scores.values()]
        for score in scores.values():
            deployed = score["deployed"][k]
            cells += [number(deployed["selective_risk"]), number(deployed["coverage"])]
        rows.append(cells)
    return Table("Selective error % on test", headings, rows)


def _ranking_table(report: dict[str, Any]) -> Table:
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
    return Table(title, (*headings, "failure AUROC", "FPR at 95 % TPR"), rows)


def _certificate_tables(report: dict[str, Any]) -> tuple[Table, Table]:
    """Certificates of the selective risk, and those that bound the joint risk on average."""
    targets = report["config"]["evaluation"]["target_risks"]
    certified: list[tuple[str, ...]] = []
    joint: list[tuple[str, ...]] = []
    for name, score in main_scores(report).items():
        label = score.get("thresholds_on", label_of(report, name))
        cells: dict[str, list[str]] = {}
        for certificate in score["certificates"]:  # target by target
            cells.setdefault(certificate["method"], []).append(_outcome(certificate))
        joint.append((label, *cells.pop("conformal_risk_control")))
        certified += [(label, CERTIFICATE_LABELS[method], *x) for method, x in cells.items()]
    headings = [f"{100 * target:g} %" for target in targets]
    title = f"Certified thresholds at delta {report['config']['evaluation']['delta']:g}"
    return (
        Table(title, ("score", "method", *headings), certified, keys=2),
        Table("Answered and wrong, on average (CRC)", ("score", *headings), joint),
    )


def _outcome(certificate: dict[str, Any]) -> str:
    """The coverage and the risk on test of a certified threshold."""
    if not certificate["feasible"]:
        return "infeasible"
    test = certificate["test"]
    risk = test["selective_risk"]
    if certificate["delta"] is None:  # of all examples, not of those answered
        risk = test["n_errors"] / (test["n_accepted"] + test["n_rejected"])
    return f"{number(test['coverage'])} : {number(risk)}"


def _certificate_notes(report: dict[str, Any]) -> list[str]:
    """Lines on the calibration examples needed, and on the classes that have certificates."""
    score, own = report["scores"][report["method_score"]], label_of(report, report["method_score"])
    plan = score["calibration_plans"][0]
    needs = ", ".join(
        f"{100 * plan['target_risk']:g} %: "
        + ("none is enough" if plan["n_calibration"] is None else f"{plan['n_calibration']:,}")
        for plan in score["calibration_plans"]
    )
    certified: dict[float, list[bool]] = {}
    for row in score["class_certificates"]:
        certified.setdefault(row["target_risk"], []).append(row["feasible"])
    lines, groups = [], report["calibration"].get("groups")
    if groups is not None:
        lines.append(
            f"The {report['calibration']['n']:,} calibration examples are of {groups:,} groups. "
            "Certificates are by one example of each, drawn at random; so every group weighs the "
            "same in the risk that they bound."
        )
    counts = ", ".join(
        f"{sum(feasible)} of {len(feasible)} at {100 * target:g} %"
        for target, feasible in certified.items()
    )
    what = "examples" if groups is None else "groups"
    lines.append(
        f"Calibration {what} for one threshold at {100 * plan['coverage']:g} % coverage by "
        f"{own}, where {number(plan['expected_risk'])} % of them are wrong: {needs}."
    )
    if counts:
        lines.append(
            f"Predicted classes with a certificate of their own, all together, by {own}: {counts}."
        )
    return lines


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
                f"{score['thresholds_on']} at least {point['threshold']:.3f}:\n"
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
