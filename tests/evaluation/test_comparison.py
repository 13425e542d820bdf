"""Comparisons of runs that are made here: real reports of made-up predictions."""

import csv
import json
import shutil

import numpy as np
import pytest

from sync_jax import metrics
from sync_jax.config import default_config
from sync_jax.errors import InputError
from sync_jax.evaluation import comparison as compare
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.record import evaluation_record
from sync_jax.evaluation.report import write_report
from sync_jax.methods import METHODS

N = 150


def predictions(seed, strength, n=N):
    """The same labels for every seed; a stronger network is more often right."""
    labels = np.random.default_rng(99).integers(0, 4, n).astype(np.int32)
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, 4)) + strength * np.eye(4)[labels]
    outputs = {
        "logits": logits,
        "selection_logits": logits.max(axis=1) + rng.normal(size=n),
        "abstention_logits": rng.normal(size=n),
    }
    outputs = {name: value.astype(np.float32) for name, value in outputs.items()}
    return Predictions(outputs, labels, np.arange(n))


def make_run(folder, method="ce", seed=0, strength=2.0, n=N, seconds=10.0, **changes):
    config = default_config()
    config.method, config.seed = method, seed
    config.evaluation.coverages = (100, 80, 50)
    config.evaluation.target_risks = (0.1,)
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    folder.mkdir(parents=True)
    test = predictions(seed + 10, strength, n)
    if method == "ce":
        test.outputs.pop("selection_logits")
    score = METHODS[method].score
    record = evaluation_record(test, test, config, score=score)
    record["training"] = {"steps": 5, "seconds": seconds}
    write_report(record, test, config, folder)
    test.save(folder / "predictions_test.npz")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two seeds of ce, one of sync; and runs that must not be mixed with them."""
    root = tmp_path_factory.mktemp("runs")
    make_run(root / "ce-0", seconds=10.0)
    make_run(root / "ce-1", seed=1, seconds=14.0)
    make_run(root / "sync-0", "sync", strength=3.0)
    make_run(root / "other-loss", "sync", strength=2.5, loss__prior_power=1.0)
    make_run(root / "other-width", "selectivenet", model__width=7)
    make_run(root / "other-test", seed=3, n=N - 1)
    (root / "unfinished").mkdir()
    return root


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "a" / "b"
    return compare.compare([f"{folder}/ce-*", f"{folder}/sync-0"], out), out


def test_rows_are_means_and_deviations_of_the_runs(folder, compared):
    record, _ = compared
    rows = {row["label"]: row for row in record["rows"]}
    assert set(rows) == {"ce, SR", "sync, SR", "sync, g"}
    reports = [json.loads((folder / f"ce-{seed}" / "report.json").read_text()) for seed in (0, 1)]
    row = rows["ce, SR"]
    assert row["seeds"] == [0, 1]
    accuracies = [report["test"]["accuracy"] for report in reports]
    assert accuracies[0] != accuracies[1]
    assert row["mean"]["accuracy"] == pytest.approx(sum(accuracies) / 2)
    # The sample standard deviation of two numbers is their distance over the root of two.
    assert row["std"]["accuracy"] == pytest.approx(abs(np.subtract(*accuracies)) / 2**0.5)
    assert (row["mean"]["seconds"], row["std"]["seconds"]) == pytest.approx((12, 4 / 2**0.5))
    for k, coverage in enumerate((1.0, 0.8, 0.5)):
        risks = [
            report["scores"]["softmax_response"]["rank_based"][k]["selective_risk"]
            for report in reports
        ]
        assert record["coverages"][k] == coverage
        assert row["mean"]["selective_risk"][k] == pytest.approx(sum(risks) / 2)
    assert rows["sync, g"]["std"]["aurc"] is None  # of a single run
    areas = [row["mean"]["aurc"] for row in record["rows"]]
    assert areas == sorted(areas)


def test_differences_are_the_paired_bootstraps(folder, compared):
    """Test examples resampled, the same for every run; each row the mean over its runs."""
    record, _ = compared
    assert len(record["differences"]) == 3
    labels = {"ce, SR": "ce-?", "sync, SR": "sync-0"}
    difference = next(x for x in record["differences"] if {x["a"], x["b"]} == labels.keys())
    estimate, values = {}, {}
    for label, pattern in labels.items():
        tests = [Predictions.load(path / "predictions_test.npz") for path in folder.glob(pattern)]
        ranked = [(test.confidence("softmax_response"), test.wrong) for test in tests]
        estimate[label] = np.mean([metrics.aurc(c, loss=wrong) for c, wrong in ranked])
        values[label] = np.mean(
            [metrics.bootstrap_values(metrics.aurc, c, loss=wrong) for c, wrong in ranked], axis=0
        )
    a, b = difference["a"], difference["b"]
    assert difference["estimate"] == pytest.approx(estimate[a] - estimate[b])
    expected = np.quantile(values[a] - values[b], [0.025, 0.975])
    assert [difference["lower"], difference["upper"]] == pytest.approx(expected, abs=1e-12)


def test_files_say_the_same(compared):
    record, out = compared
    assert json.loads((out / "compare.json").read_text()) == record
    with (out / "compare.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["label"] for line in lines] == [row["label"] for row in record["rows"]]
    for line, row in zip(lines, record["rows"], strict=True):
        assert float(line["aurc_mean"]) == row["mean"]["aurc"]
        assert float(line["selective_risk_at_0.8_mean"]) == row["mean"]["selective_risk"][1]
        assert (line["aurc_std"] == "") == (row["std"]["aurc"] is None)
    text = (out / "compare.md").read_text()
    best = f"{1000 * record['rows'][0]['mean']['aurc']:.2f}"
    assert f"**{best}" in text  # the first row has the best AURC
    worst = f"{1000 * record['rows'][-1]['mean']['aurc']:.2f}"
    assert f"**{worst}" not in text
    for entry in record["differences"]:
        assert f"{entry['a']} minus {entry['b']}" in text
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list(out.glob("*.incomplete"))


def test_bold_is_what_reads_best():
    pairs = [(0.1, 0.01), (0.1004, None), (None, None), (0.2, 0.0)]
    assert compare._cells(pairs, compare.Column("", 100, ".1f", min)) == [
        ("10.0 ± 1.0", True), ("10.0", True), ("-", False), ("20.0 ± 0.0", False),
    ]  # fmt: skip
    cells = compare._cells(pairs, compare.Column("", best=max))
    assert [best for _, best in cells] == [False, False, False, True]


def test_runs_of_several_target_coverages_are_judged_at_their_own(folder, tmp_path):
    for target in (0.5, 0.8):
        make_run(tmp_path / f"sync-{target}", "sync", strength=3.0, target_coverage=target)
    record = compare.compare([f"{tmp_path}/sync-*"], tmp_path / "out")
    rows = {row["label"]: row for row in record["rows"]}
    assert len(rows) == 4
    for target in (0.5, 0.8):
        row = rows[f"sync (target_coverage={target}), g"]
        assert row["target_coverage"] == target
        k = record["coverages"].index(target)
        assert row["mean"]["own_risk"] == row["mean"]["selective_risk"][k]
        report = json.loads((tmp_path / f"sync-{target}" / "report.json").read_text())
        point = report["scores"]["selection"]["operating_point"]
        assert row["mean"]["deployed_risk"] == point["selective_risk"]
        assert row["mean"]["deployed_coverage"] == point["coverage"]
    headings, cells = compare.table(record)
    own = headings.index("error % at target")
    assert not any(line[own][1] for line in cells)  # they do not compete for the best
    assert {line[own - 1][0] for line in cells} == {"50", "80"}


def test_a_field_younger_than_a_run_counts_with_its_default(folder, tmp_path):
    old = tmp_path / "old"
    make_run(old, "sync", strength=3.0, seed=5)
    report = json.loads((old / "report.json").read_text())
    for field in ("contrast_weight", "queue_size"):
        del report["config"]["loss"][field]
    (old / "report.json").write_text(json.dumps(report))
    record = compare.compare([f"{folder}/sync-0", str(old)], tmp_path / "out")
    assert {row["label"]: row["seeds"] for row in record["rows"]} == {
        "sync, SR": [0, 5],
        "sync, g": [0, 5],
    }


def test_a_methods_own_fields_make_rows_of_their_own(folder, tmp_path):
    record = compare.compare([f"{folder}/sync-0", f"{folder}/other-loss"], tmp_path)
    assert {row["label"] for row in record["rows"]} == {
        f"sync (loss.prior_power={power}), {score}"
        for power in ("3.0", "1.0")
        for score in ("SR", "g")
    }
    assert record["ignored"] == []


def test_other_data_network_or_schedule_is_refused_unless_told_to(folder, tmp_path, capsys):
    patterns = [f"{folder}/ce-0", f"{folder}/other-width"]
    with pytest.raises(
        InputError, match=r"config.model.width is None in .*ce-0 and 7 in .*other-width"
    ):
        compare.compare(patterns, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    record = compare.compare(patterns, tmp_path / "out", mixed=True)
    assert len(record["ignored"]) == 1
    assert "config.model.width" in capsys.readouterr().out
    assert "config.model.width" in (tmp_path / "out" / "compare.md").read_text()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "--runs is missing"),
        (["nothing-*"], "matches no folder"),
        (["ce-0", "unfinished"], "unfinished holds no finished run"),
        (["ce-0", "other-test"], "other-test has other test examples than .*ce-0"),
    ],
)
def test_what_cannot_be_compared_is_named(names, message, folder, tmp_path):
    with pytest.raises(InputError, match=message):
        compare.compare([f"{folder}/{name}" for name in names], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_run_twice(folder, tmp_path):
    shutil.copytree(folder / "ce-0", tmp_path / "copy")
    patterns = [f"{folder}/ce-0", f"{tmp_path}/copy"]
    with pytest.raises(InputError, match="are the same run: seed 0"):
        compare.compare(patterns, tmp_path / "out")
    # But one folder named twice is one run.
    record = compare.compare([f"{folder}/ce-0", f"{folder}/ce-?"], tmp_path / "out")
    assert record["rows"][0]["seeds"] == [0, 1]


def test_a_folder_that_cannot_be_written_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file cannot be written"):
        compare.compare([f"{folder}/ce-0"], tmp_path / "file")
