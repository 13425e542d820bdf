"""Mistakes in the folder of a run, and in many of them."""

import os
import shutil

import numpy as np

from tests.bad_input.case import COMPARE, DONE, EVALUATE, TRAIN, Bad
from tests.bad_input.spoil import (
    compressed,
    cut,
    fifo,
    folder,
    nan_first,
    predictions,
    remove,
    report,
    same_seed,
    write,
)

CASES = {
    # The folder of the run.
    "workdir below a file": Bad(
        [*TRAIN, "--workdir=notes.txt/run"],
        "workdir=notes.txt/run is below .*notes.txt, which is n",
    ),
    "workdir of too long a name": Bad(
        [*TRAIN, f"--workdir={'x' * 300}"], "workdir=x* cannot be used: File name too long"
    ),
    "workdir of another experiment": Bad(
        [*TRAIN, "--workdir=runs/two"],
        "holds another experiment: config.seed is 1 there and 0 here",
    ),
    "workdir of an ensemble": Bad(
        DONE,
        "a report or predictions and no config.json, as an ens",
        remove("runs/done/config.json"),
    ),
    "checkpoints are a file": Bad(
        DONE, "done/checkpoints is not a folder; name another", write("runs/done/checkpoints", "")
    ),
    "report.json is a folder": Bad(EVALUATE, "report.json is no plain file", folder("report.json")),
    "config.json is a folder": Bad(DONE, "config.json is no plain file", folder("config.json")),
    "the lock is a folder": Bad(
        [*TRAIN, "--workdir=begun"],
        "begun/.lock is no plain file; move it away",
        lambda monkeypatch: os.makedirs("begun/.lock"),
    ),
    "the config is a FIFO": Bad(DONE, "config.json is no plain file", fifo("config.json")),
    "a checkpoint has a FIFO": Bad(
        DONE, "about/metadata is no plain file", fifo("checkpoints/9/about/metadata")
    ),
    "predictions are a FIFO": Bad(
        EVALUATE, "test.npz is no plain file", fifo("predictions_test.npz")
    ),
    "compare a FIFO": Bad(COMPARE, "done/report.json is no plain file", fifo("report.json")),
    "an ensemble of a FIFO": Bad(
        ["--mode=ensemble", "--runs=runs/*", "--workdir=table"],
        "calibration.npz is no plain file",
        fifo("predictions_calibration.npz"),
    ),
    "a table into a FIFO": Bad(
        [*COMPARE[:1], "--runs=runs/two", "--workdir=runs/done"],
        "compare.json.incomplete is no plain file",
        fifo("compare.json.incomplete"),
    ),
    "config.json of something else": Bad(
        DONE, "config.json cannot be read", write("runs/done/config.json", "[1, 2]")
    ),
    "metrics of another program": Bad(
        DONE, "metrics.jsonl: line 1 is no entry", write("runs/done/metrics.jsonl", "loss 3\n")
    ),
    "report cut short": Bad(DONE, "report.json is damaged", cut("runs/done/report.json")),
    "report of another schema": Bad(
        DONE, "report.json has schema 1, this version", report(lambda r: r.update(schema=1))
    ),
    "report without a field": Bad(
        DONE, "report.json is damaged .KeyError: 'brier'", report(lambda r: r["test"].pop("brier"))
    ),
    "report with a word for a number": Bad(
        COMPARE, "report.json is damaged", report(lambda r: r["test"].update(accuracy="high"))
    ),
    "predictions are missing": Bad(
        EVALUATE, "predictions_test.npz is missing", remove("runs/done/predictions_test.npz")
    ),
    "predictions cut short": Bad(
        EVALUATE, "predictions_test.npz is damaged", cut("runs/done/predictions_test.npz")
    ),
    "predictions with NaN": Bad(
        EVALUATE, "test.npz is damaged: logits holds a number that", predictions(logits=nan_first)
    ),
    "predictions of another shape": Bad(
        EVALUATE,
        r"selection_logits is float32 \(70, 1\), no output",
        predictions(selection_logits=lambda x: x[:, None]),
    ),
    "predictions of fractional labels": Bad(
        EVALUATE, "labels is float64", predictions(labels=lambda x: x + 0.5)
    ),
    "predictions of a label out of range": Bad(
        EVALUATE, "labels are 1 to 10, of 10 classes", predictions(labels=lambda x: x + 1)
    ),
    "predictions without the score's": Bad(
        EVALUATE, "do not go with the score selection", predictions(selection_logits=None)
    ),
    "predictions of fewer classes": Bad(
        EVALUATE,
        "do not go with the score selection: .* of 11 classes and .* of 10 classes",
        predictions(
            "calibration",
            logits=lambda x: np.hstack([x, x[:, :1]]),
            auxiliary_logits=lambda x: np.hstack([x, x[:, :1]]),
        ),
    ),
    "predictions that expand": Bad(EVALUATE, "test.npz is damaged: it is compressed", compressed),
    # Many runs.
    "compare what is not finished": Bad(
        COMPARE, "runs/two holds no finished run", remove("runs/two/report.json")
    ),
    "compare other examples": Bad(
        COMPARE, "has other test examples than", predictions(index=lambda x: x + 1)
    ),
    "compare the same run": Bad(COMPARE, "are the same run: seed 0", report(same_seed, "two")),
    "compare other networks": Bad(
        COMPARE,
        "differ in more than method and seed: config.model.width is 4 in .*, or add --mixed",
        report(lambda r: r["config"]["model"].update(width=7), "two"),
    ),
    "compare report and predictions of two runs": Bad(
        COMPARE, "report.json is damaged, or not of the pred", predictions(selection_logits=None)
    ),
    "an ensemble of one": Bad(["--mode=ensemble", "--runs=runs/two"], "takes two runs or more"),
    "an ensemble into a run": Bad(
        ["--mode=ensemble", "--runs=runs/*", "--workdir=runs/two"], "holds a run of its own"
    ),
    "a sweep into another experiment": Bad(
        [*TRAIN, "--mode=sweep", "--vary=seed=3,0", "--workdir=sweep"],
        "workdir=sweep/quickstart-sync-seed0 holds another experiment: config.seed is 1 there",
        lambda monkeypatch: shutil.copytree("runs/two", "sweep/quickstart-sync-seed0"),
    ),
    "a sweep of what changes nothing": Bad(
        [*TRAIN, "--mode=sweep", "--vary=data.source=../a,../b", "--workdir=sweep"],
        "vary=data.source=../a,../b: data.source changes no training",
    ),
    "a sweep of folders of one name": Bad(
        [*TRAIN, "--mode=sweep", "--vary=data.folder=a/b,a-b", "--workdir=sweep"],
        "two runs would have the same folder",
    ),
    "a sweep over batches for other devices": Bad(
        [*TRAIN, "--mode=sweep", "--vary=train.batch_size=16,12", "--workdir=sweep"],
        "train.batch_size=12 cannot be split over 8 devices",
    ),
}
