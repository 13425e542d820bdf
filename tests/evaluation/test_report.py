import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.evaluation import report
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.guarantees import Certificate
from sync_jax.metrics import Interval
from sync_jax.scores import SCORES

ROOT = Path(__file__).parents[2]


def predictions(seed: int, n: int = 300, *, perfect: bool = False) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n).astype(np.int32)
    logits = rng.normal(size=(n, 4)) + (20 if perfect else 2) * np.eye(4)[labels]
    outputs = {"logits": logits, "selection_logits": rng.normal(size=n)}
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
    "rank_based": {"coverage", "selective_risk"},
    "coverage_at_risk": {"risk", "coverage"},
    "deployed": DEPLOYED_FIELDS,
    "operating_point": DEPLOYED_FIELDS,
    "certificates": CERTIFICATE_FIELDS,
    "class_certificates": CERTIFICATE_FIELDS | {"predicted_class"},
    "calibration_plans": {"target_risk", "coverage", "expected_risk", "n_calibration", "power"},
}
OF_TWO_SCORES = {"bootstrap_95", "certificates", "class_certificates", "calibration_plans"}
FIELDS = {
    "schema": None,
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


def test_a_feasible_certificate_is_shown_with_what_it_gives_on_test(written, capsys):
    content, folder = written[True]
    report.show_report(content, folder)
    shown = capsys.readouterr().out
    certificate = content["scores"]["selection"]["certificates"][-4]
    assert (certificate["method"], certificate["target_risk"]) == ("sgr", 0.05)
    assert certificate["feasible"]
    row = next(line for line in shown.splitlines() if line.split()[:2] == ["g", "5"])
    assert row.split()[2:5] == [f"{100 * certificate['test']['coverage']:.2f}", ":", "0.00"]
    assert "Calibration examples for one threshold at 80 % coverage by g" in shown


def test_tables_show_both_protocols_and_the_certificates(written, capsys):
    content, folder = written[False]
    report.show_report(content, folder)
    shown = capsys.readouterr().out
    for words in ("rank-based SR", "rank-based g", "deployed SR", "deployed g", "infeasible"):
        assert words in shown
    row = next(line for line in shown.splitlines() if line.split()[:1] == ["70"])
    entry = {
        name: {
            "rank": score["rank_based"][9]["selective_risk"],
            "deployed": score["deployed"][9]["selective_risk"],
            "coverage": score["deployed"][9]["coverage"],
        }
        for name, score in content["scores"].items()
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
