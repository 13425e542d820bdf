import copy
import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rich.console

from sync_jax.config import default_config
from sync_jax.data.prepare import copies
from sync_jax.errors import InputError
from sync_jax.evaluation import comparison, report
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.guarantees import Certificate
from sync_jax.metrics import Interval
from sync_jax.scores import SCORES
from tests.evaluation import test_comparison

ROOT = Path(__file__).parents[2]


def predictions(seed: int, n: int = 300, *, perfect: bool = False) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n).astype(np.int32)
    logits = rng.normal(size=(n, 4)) + (20 if perfect else 2) * np.eye(4)[labels]
    outputs = {"logits": logits, "selection_logits": rng.normal(size=n), "auxiliary_logits": logits}
    outputs = {name: value.astype(np.float32) for name, value in outputs.items()}
    return Predictions(outputs, labels, np.arange(n))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Reports of a fair and of a perfect network, and their folders."""
    reports = {}
    for perfect in (False, True):
        folder = tmp_path_factory.mktemp("run")
        test, held_out = (predictions(seed, perfect=perfect) for seed in (1, 0))
        record = evaluation_record(held_out, test, default_config(), score="selection")
        record["training"] = {"steps": 12, "seconds": 3.5}
        reports[perfect] = report.write_report(record, test, default_config(), folder), folder
    return reports


@pytest.mark.parametrize("perfect", [False, True])
def test_report_is_strict_json_and_reads_back(written, perfect):
    expected, folder = written[perfect]
    text = (folder / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == expected
    assert report.read_report(folder) == expected
    assert (folder / "risk_coverage.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.incomplete"))
    auroc = expected["scores"]["selection"]["failure_auroc"]
    assert (auroc is None) == perfect  # without errors there is nothing to detect


def test_the_page_shows_the_tables_and_believes_no_name(tmp_path, written):
    """report.html: self-contained, without a script, and what is in the console's tables."""
    expected, folder = written[False]
    shutil.copy(folder / "risk_coverage.png", tmp_path)
    hostile = "<script>alert(1)</script>"
    made = copy.deepcopy(expected)
    made["scores"]["selection"]["label"] = hostile
    made["config"]["data"]["name"] = hostile
    copies.write_report(tmp_path, copies.report(NO_COPIES), {})
    report.write_page(made, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 4
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=(?!\"data:)", page)
    assert "Answer when the log odds are at least" in page or "No threshold of the log" in page
    for entry in expected["scores"]["softmax_response"]["rank_based"]:
        assert f"<td>{100 * entry['selective_risk']:.2f}</td>" in page
    assert "<h2>Copies among the pictures</h2>" in page
    assert page.count("shown are 0 groups") == 2


NO_COPIES = copies.Table(
    *(np.array(["train"]), np.array(["1.png"]), np.array([0]), np.array(["x"]), np.array(["x"])),
    dhash=np.ones((1, 2), np.uint64),
    extra={},
)
SPLIT_FIELDS = {
    *("n", "accuracy", "negative_log_likelihood", "brier", "mean_selection"),
    *("ece_15_bins_of_equal_width", "ece_15_bins_of_equal_mass"),
}
DEPLOYED_FIELDS = {
    *("target_coverage", "threshold", "coverage", "selective_risk"),
    *("n_accepted", "n_errors", "n_rejected", "n_rejected_errors"),
}
CERTIFICATE_FIELDS = {field.name for field in dataclasses.fields(Certificate)} | {"test"}
SCORE_FIELDS = {
    "label": None,
    "aurc": {"mean", "fd_shifts", "torch_uncertainty"},
    "excess_aurc": {"mean", "fd_shifts"},
    **dict.fromkeys(("normalised_aurc", "augrc", "excess_augrc")),
    **dict.fromkeys(("failure_auroc", "fpr_at_95_tpr")),
    "bootstrap_95": {"aurc", "augrc", "failure_auroc"},
    "thresholds_on": None,
    "rank_based": {"coverage", "selective_risk"},
    "coverage_at_risk": {"risk", "coverage"},
    "deployed": DEPLOYED_FIELDS,
    "operating_point": DEPLOYED_FIELDS,
    "certificates": CERTIFICATE_FIELDS,
    "class_certificates": CERTIFICATE_FIELDS | {"predicted_class"},
    "calibration_plans": {"target_risk", "coverage", "expected_risk", "n_calibration", "power"},
}
OF_TWO_SCORES = {
    *("bootstrap_95", "thresholds_on", "deployed", "operating_point"),
    *("certificates", "class_certificates", "calibration_plans"),
}
FIELDS = {
    "schema": None,
    "recommended": CERTIFICATE_FIELDS | {"score", "calibration_plan"},
    "config": set(default_config()),
    "environment": {"date", "python", "jax", "sync_jax", "platform", "devices"},
    "training": {"steps", "seconds"},
    "method_score": None,
    "calibration": SPLIT_FIELDS,
    "test": SPLIT_FIELDS,
    "scores": {name for name in SCORES if name not in ("abstention", "mutual_information")},
    "aurc_minus_softmax_response": {field.name for field in dataclasses.fields(Interval)},
}


def test_fields_are_the_schemas_and_no_others(written):
    def fields(value):
        """A dict's keys, also as the element of a list; None for a plain value."""
        value = value[0] if isinstance(value, list) else value
        return set(value) if isinstance(value, dict) else None

    content, _ = written[False]
    assert list(content)[:2] == ["schema", "recommended"]
    assert {name: fields(value) for name, value in content.items()} == FIELDS
    for name, score in content["scores"].items():
        expected = SCORE_FIELDS | {"parameters": {"p"} if name == "max_logit_pnorm" else set()}
        if name not in ("softmax_response", "selection"):
            expected = {field: expected[field] for field in expected.keys() - OF_TWO_SCORES}
        assert {field: fields(value) for field, value in score.items()} == expected
    words = set(re.findall(r"\w+", (ROOT / "docs" / "report.md").read_text()))
    documented = (FIELDS, FIELDS["environment"], SPLIT_FIELDS, SCORE_FIELDS, DEPLOYED_FIELDS)
    for names in (*documented, SCORE_FIELDS["calibration_plans"]):
        assert words.issuperset(names)


def printed(content, folder, capsys):
    report.show_report(content, folder)
    return capsys.readouterr().out


def test_the_report_leads_with_the_recommended_certificate(written, capsys):
    """Feasible for the perfect network; 300 calibration images don't do for the fair one."""
    content, folder = written[True]
    found = content["recommended"]
    assert (found["score"], found["method"]) == ("log_odds", "sgr_fixed_sequence")
    assert (found["target_risk"], found["feasible"]) == (0.05, True)
    assert found.items() >= content["scores"]["softmax_response"]["certificates"][0].items()
    first = " ".join(printed(content, folder, capsys).split())
    threshold = re.match(
        r"Answer when the log odds are at least ([\d.]+): at most 5 % wrong with 95 % confidence; "
        r"answers ([\d.]+) % of the test examples",
        first,
    )
    assert np.float32(threshold[1]) == np.float32(found["threshold"])
    assert threshold[2] == f"{100 * found['test']['coverage']:.1f}"

    content, folder = written[False]
    found = content["recommended"]
    assert not found["feasible"]
    plan = found["calibration_plan"]
    assert plan["expected_risk"] <= 0.025
    assert plan["n_calibration"] > 300
    first = " ".join(printed(content, folder, capsys).split())
    assert first.startswith(
        "No threshold of the log odds is certified for at most 5 % wrong with 95 % confidence. "
        f"With about {plan['n_calibration']:,} calibration examples (there are 300) a threshold at "
        f"{100 * plan['coverage']:.0f} % coverage would be certified four times in five. "
    )


def test_certificates_are_shown_with_what_they_give_on_test(written, capsys):
    content, folder = written[True]
    shown = printed(content, folder, capsys)
    rows = [line.split() for line in shown.splitlines()]
    sgr, joint = (content["scores"]["selection"]["certificates"][k] for k in (1, 5))
    assert (sgr["method"], sgr["target_risk"], sgr["feasible"]) == ("sgr", 0.05, True)
    assert joint["method"] == "conformal_risk_control"
    of_sgr = [row[4:] for row in rows if row[:4] == ["logit", "of", "g", "SGR"]]
    (row,) = (row for row in of_sgr if row[0] != "+")  # which is the hybrid's
    assert row[:3] == [f"{100 * sgr['test']['coverage']:.2f}", ":", "0.00"]
    assert "Calibration examples for one threshold at 80 % coverage by g" in " ".join(shown.split())


def test_the_joint_risk_on_average_has_a_table_without_a_delta(written, capsys):
    content, folder = written[False]
    shown = printed(content, folder, capsys)
    before, _, after = shown.partition("Answered and wrong, on average (CRC)")
    assert "at delta 0.05" in before
    table = after.split("\n\n")[0]
    assert "CRC" not in before
    assert "delta" not in table
    test = content["scores"]["selection"]["certificates"][5]["test"]
    share = test["n_errors"] / 300  # of all examples
    assert share != test["selective_risk"]
    assert f"{100 * test['coverage']:.2f} : {100 * share:.2f}" in table


def test_at_80_columns_no_number_is_cut(tmp_path, monkeypatch, capsys):
    """Long labels, ensembles and comparisons, piped and in a terminal."""
    label = "an own score with a long label, and a wordwhichisverylongindeed"
    monkeypatch.setitem(SCORES, "selection", dataclasses.replace(SCORES["selection"], label=label))
    monkeypatch.chdir(tmp_path)
    for method, power in ("sync", 1.0), ("sync", 2.0), ("ce", 1.0):
        for seed in (0, 1):
            run = Path(f"{method}-{power}-{seed}")
            options = {"seed": seed, "seconds": 123456.7, "loss__prior_power": power}
            test_comparison.make_run(run, method, **options)
            test_comparison.predictions(seed, 2.0).save(run / "predictions_calibration.npz")
    comparison.ensemble(["ce-*"], Path("e"))
    record = comparison.compare(["*-*"], Path("c"))
    report.show_report(report.read_report(Path("sync-1.0-0")), Path("sync-1.0-0"))
    piped = capsys.readouterr().out
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    monkeypatch.setenv("COLUMNS", "80")
    comparison.show(record, Path("c"))
    report.show_report(report.read_report(Path("sync-1.0-0")), Path("sync-1.0-0"))
    in_terminal = re.sub("\x1b\\[.*?m", "", capsys.readouterr().out)
    headings, rows = comparison.table(record)
    for shown in (piped, in_terminal):
        assert "…" not in shown
        assert [line for line in shown.splitlines() if len(line) > 80] == []
        for row in rows:
            for heading, (text, _) in zip(headings[1:], row[1:], strict=True):
                assert text in shown or heading not in comparison.CONSOLE_COLUMNS
        assert "123457 ± 0" in shown
    row = ["12345678"] * 7  # which leave three columns for a label, shorter than its heading
    report.show([report.Table("", ["method, score", *row], [["ce, SR", *row]])])
    assert "method," in re.sub("\x1b\\[.*?m", "", capsys.readouterr().out).split()


def test_where_every_prediction_is_wrong_no_warning_is_given(tmp_path, capsys):
    test, held_out = (predictions(seed) for seed in (1, 0))
    for part in (test, held_out):
        part.labels[:] = (part.predicted + 1) % 4
    record = evaluation_record(held_out, test, default_config(), score="selection")
    record["training"] = {"steps": 12, "seconds": 3.5}
    shown = printed(report.write_report(record, test, default_config(), tmp_path), tmp_path, capsys)
    assert "The error is too high at every" in shown
    assert "Test accuracy 0.00 %" in shown
    assert (tmp_path / "risk_coverage.png").exists()


def test_tables_show_both_protocols_and_the_certificates(written, capsys):
    content, folder = written[False]
    shown = printed(content, folder, capsys)
    (at,) = (k for k, line in enumerate(shown.splitlines()) if "rank-based" in line)
    headings = [line.split() for line in shown.splitlines()[at : at + 2]]
    assert headings[0] == ["coverage", "rank-based", "rank-based", "deployed", "deployed"]
    assert headings[1] == ["%", "SR", "g", "SR", "covers", "%", "g", "covers", "%"]
    assert "infeasible" in shown
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["70"])
    entry = {
        name: {
            "rank": score["rank_based"][9]["selective_risk"],
            "deployed": score["deployed"][9]["selective_risk"],
            "coverage": score["deployed"][9]["coverage"],
        }
        for name, score in report.main_scores(content).items()
    }
    sr, g = entry["softmax_response"], entry["selection"]
    values = (sr["rank"], g["rank"], sr["deployed"], sr["coverage"], g["deployed"], g["coverage"])
    assert row.split()[1:] == [f"{100 * value:.2f}" for value in values]


def test_undefined_and_infinite_values_become_json():
    values = {"a": [math.nan, math.inf, -math.inf, 1.5], "b": (1, "x", None, True)}
    assert report.strict(values) == {
        "a": [None, "Infinity", "-Infinity", 1.5],
        "b": [1, "x", None, True],
    }


def test_damaged_or_foreign_report_is_named(tmp_path):
    assert report.read_report(tmp_path) is None
    path = tmp_path / "report.json"
    for text in ("", "{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"report\.json is damaged"):
            report.read_report(tmp_path)
    path.write_text('{"schema": 99}')
    with pytest.raises(InputError, match="schema 99"):
        report.read_report(tmp_path)
