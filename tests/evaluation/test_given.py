"""Predictions of other programs: the same report as of a run, and a decision to take along."""

import csv
import json
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import sync_jax
from sync_jax import metrics
from sync_jax.errors import InputError
from sync_jax.evaluation.decision import Decision, fitted_temperature
from sync_jax.evaluation.given import evaluate_logits
from sync_jax.scores import log_odds, softmax


def numbers(seed, n=600, classes=4, strength=3.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    return rng.normal(size=(n, classes)) + strength * np.eye(classes)[labels], labels


CALIBRATION, TEST = numbers(0), numbers(1)


def named(split, **more):
    return {"logits": split[0], "labels": split[1]} | more


def test_the_report_and_the_decision_agree_with_metrics_of_our_own():
    found = evaluate_logits(CALIBRATION, TEST)
    logits, labels = TEST
    wrong = logits.argmax(axis=1) != labels
    confidence = log_odds({"logits": logits})
    assert found.report["test"]["accuracy"] == pytest.approx(1 - wrong.mean())
    area = found.report["scores"]["softmax_response"]["aurc"]["mean"]
    assert area == pytest.approx(metrics.aurc(confidence, loss=wrong))
    assert found.report["recommended"]["feasible"]
    answers = found.decision(logits)
    known = found.report["recommended"]["test"]
    assert answers.accepted.sum() == known["n_accepted"]
    assert wrong[answers.accepted].sum() == known["n_errors"]
    np.testing.assert_array_equal(answers.accepted, answers.confidence >= known["threshold"])
    np.testing.assert_array_equal(answers.label, logits.argmax(axis=1))


@pytest.mark.parametrize("kind", ["npz", "npy", "csv", "parquet", "run"])
def test_files_hold_what_arrays_do(tmp_path, kind):
    expected = evaluate_logits(CALIBRATION, TEST).report
    names = ("cat", "dog", "owl", "yak")
    paths = []
    for split, (logits, labels) in {"calibration": CALIBRATION, "test": TEST}.items():
        path = tmp_path / f"{split}.{kind}"
        if kind == "npz":
            np.savez(path, logits=logits, labels=labels)
        elif kind == "run":  # as a run of ours saves them
            path = tmp_path / f"{split}.npz"
            np.savez(path, **{"outputs/logits": logits}, labels=labels, index=labels)
        elif kind == "npy":
            np.save(path, logits)
            np.save(tmp_path / f"{split}.labels.npy", labels)
        else:
            rows = []
            for row, label in zip(logits.tolist(), labels, strict=True):
                values = {f"logit_{x}": repr(v) for x, v in zip(names, row, strict=True)}
                rows.append({"label": names[label], **values})
            if kind == "csv":
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, rows[0])
                    writer.writeheader()
                    writer.writerows(rows)
            else:
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        paths.append(path)
    found = evaluate_logits(*paths, workdir=tmp_path / "out")
    assert found.report["scores"] == json.loads(json.dumps(expected["scores"]))
    decision = Decision.load(tmp_path / "out" / "decision.json")
    if kind in ("csv", "parquet"):
        assert set(decision(TEST[0]).label) == set(names)
    for name in ("report.html", "report.json", "risk_coverage.png"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_probabilities_rank_as_their_logits_and_have_no_scale_of_their_own():
    splits = [{"probabilities": softmax(x), "labels": y} for x, y in (CALIBRATION, TEST)]
    scores = evaluate_logits(*splits).report["scores"]
    expected = evaluate_logits(CALIBRATION, TEST).report["scores"]
    assert expected.keys() - scores.keys() == {"max_logit", "max_logit_pnorm", "energy"}
    for name, score in scores.items():
        assert score["aurc"]["mean"] == pytest.approx(expected[name]["aurc"]["mean"], rel=1e-9)


def test_confidence_and_correctness_alone():
    """Classes are not known; thresholds are in the user's own float64, which are kept apart."""
    splits = []
    for logits, labels in (CALIBRATION, TEST):
        confidence = 1 - 1e-12 * np.exp(-log_odds({"logits": logits}))
        splits.append({"confidence": confidence, "correct": logits.argmax(axis=1) == labels})
    found = evaluate_logits(*splits)
    expected = evaluate_logits(CALIBRATION, TEST).report
    assert found.report["recommended"]["n_accepted"] == expected["recommended"]["n_accepted"]
    assert [*found.report["scores"]] == ["confidence"]
    assert "brier" not in found.report["test"]
    answers = found.decision(splits[1]["confidence"])
    assert answers.label is answers.probabilities is None
    assert answers.accepted.sum() == found.report["recommended"]["test"]["n_accepted"]
    again = Decision.from_json(json.loads(json.dumps(found.decision.to_json())))
    np.testing.assert_array_equal(again(splits[1]["confidence"]).accepted, answers.accepted)


def test_one_split_is_divided_by_class_and_in_whole_groups(tmp_path, capsys):
    groups = np.arange(600) // 5
    evaluate_logits(named(CALIBRATION, groups=groups), workdir=tmp_path, verbose=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert "Only one split was given: 300 examples of it are for calibration, and 300" in shown
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["groups"] == 60
    assert report["recommended"]["n_calibration"] == 60
    assert report["note"] in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": None}, "must hold logits or probabilities with labels, or confidence"),
        ({"labels": None}, "calibration holds logits and no labels"),
        ({"logits": np.zeros(600)}, r"logits is float64 \(600,\), not \[n\] or \[n, classes\]"),
        ({"logits": np.full((600, 4), np.nan)}, "not finite"),
        ({"labels": np.zeros(599)}, r"labels is float64 \(599,\), not 600 numbers"),
        ({"labels": np.full(600, 4)}, r"labels must lie in \[0, 3\]"),
        ({"labels": np.full(600, 0.5)}, "labels must be whole numbers"),
        ({"groups": np.zeros(3)}, r"groups has shape \(3,\)"),
        ({"logits": np.zeros((600, 3)), "labels": np.zeros(600, int)}, "the same kind of array"),
        ({"probabilities": np.ones((600, 4)), "logits": None}, "probabilities"),
    ],
)
def test_bad_arrays(changes, message):
    given = {k: x for k, x in (named(CALIBRATION) | changes).items() if x is not None}
    with pytest.raises(ValueError, match=message):
        evaluate_logits(given, TEST)


def test_bad_files_and_options(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"nothing")
    (tmp_path / "x.csv").write_text("label,logit_a,logit_b\nc,1,2\n")
    (tmp_path / "object.npy").write_bytes(b"")
    for name, message in {
        "x.npz": "cannot be read",
        "x.csv": "the label 'c' is no class",
        "x.pt": "is of no known kind; choose from .npz",
        "object.npy": "cannot be read",
        "gone.npz": "cannot be read",
    }.items():
        with pytest.raises(InputError, match=message):
            evaluate_logits(tmp_path / name)
    with pytest.raises(InputError, match="risks: no such option; there are target_coverage"):
        evaluate_logits(CALIBRATION, TEST, risks=(0.1,))
    with pytest.raises(InputError, match="delta=2 must be a finite number in"):
        evaluate_logits(CALIBRATION, TEST, delta=2)


def test_without_jax(tmp_path):
    """From Python and from the command line: one process, in which importing JAX would fail."""
    for name, (logits, labels) in {"c": CALIBRATION, "t": TEST}.items():
        np.savez(tmp_path / f"{name}.npz", logits=logits, labels=labels)
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None\n"
        "import numpy as np, sync_jax\n"
        "x = np.load('c.npz'); sync_jax.evaluate_logits((x['logits'], x['labels']))\n"
        "from absl import app\n"
        "from sync_jax.main import main, parse_flags\n"
        "sys.argv = ['x', '--mode=evaluate', '--predictions=c.npz,t.npz', '--workdir=out']\n"
        "app.run(main, flags_parser=parse_flags)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Answer when the log odds are at least" in done.stdout
    assert (tmp_path / "out" / "decision.json").exists()


# --- The decision -------------------------------------------------------------------------------


def test_thresholds_by_hand():
    """Ten examples; accepted are the k most confident, of which the first errors are at 6 and 9."""
    decision = Decision(
        score="confidence",
        threshold=0.0,
        confidence=np.arange(10.0, 0, -1),
        correct=np.isin(np.arange(10), (6, 9), invert=True),
    )
    assert decision.with_threshold(coverage=0.3).threshold == 7.5
    # Accepting k costs 10 an error and 1 a look: 10 - k up to six, then 10 + 10 - k and more.
    assert decision.with_threshold(cost=(10, 1)).threshold == 4.5
    assert decision.with_threshold(cost=(1.5, 1)).threshold == 1.5  # 1.5 + 1 at nine
    assert decision.with_threshold(cost=(0.5, 1)).threshold == 1.0
    never = Decision(
        score="confidence", threshold=0.0, confidence=np.arange(3.0), correct=np.zeros(3, bool)
    ).with_threshold(cost=(10, 1))
    assert not never(np.array([1e9])).accepted.any()
    assert Decision.from_json(json.loads(json.dumps(never.to_json()))).threshold == np.inf
    with pytest.raises(ValueError, match=r"no threshold is certified for a risk of 0\.01: "):
        decision.with_threshold(risk=0.01)
    for wrong in ({}, {"coverage": 0.5, "risk": 0.1}, {"coverage": 2.0}, {"cost": (0, 1)}):
        with pytest.raises(ValueError, match=r"one of|coverage|cost"):
            decision.with_threshold(**wrong)


def test_a_certified_threshold_is_by_one_of_each_group():
    found = evaluate_logits(named(CALIBRATION, groups=np.arange(600) // 2), TEST).decision
    assert found.with_threshold(risk=0.05).chosen_by["n_calibration"] == 300


def test_a_decision_that_was_altered_is_refused(tmp_path):
    decision = evaluate_logits(CALIBRATION, TEST).decision
    decision.save(tmp_path / "d.json")
    good = json.loads((tmp_path / "d.json").read_text())
    again = Decision.load(tmp_path / "d.json")
    np.testing.assert_array_equal(again(TEST[0]).confidence, decision(TEST[0]).confidence)
    assert again.threshold == decision.threshold
    assert again.certificate == decision.certificate != ""
    for changes in (
        {"schema": 9},
        {"correct": [True] * 600},
        {"chosen_by": good["chosen_by"] | {"bound": 0.001}},
        {"score": "os:system"},
        {"threshold": None},
    ):
        with pytest.raises(InputError, match="no decision, or damaged"):
            Decision.from_json(good | changes)


def test_a_decision_refuses_other_outputs():
    decision = evaluate_logits(CALIBRATION, TEST, class_names=("a", "b", "c", "d")).decision
    assert set(decision(TEST[0]).label) == set("abcd")
    for outputs in (
        np.zeros(3),
        np.zeros((2, 5)),
        {"x": np.zeros((2, 4))},
        np.full((1, 4), np.inf),
    ):
        with pytest.raises(ValueError, match=r"dimensions|classes|not finite"):
            decision(outputs)


def test_the_temperature_that_was_put_in_is_found():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 5)) * 2
    labels = (softmax(logits).cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert fitted_temperature(logits * 3, labels) == pytest.approx(3, rel=0.05)
    assert fitted_temperature(logits / 4 + 1e6, labels) == pytest.approx(0.25, rel=0.05)
    assert sync_jax.Decision is Decision
