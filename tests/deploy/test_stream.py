"""Predictions of any number of pictures into a table."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest

from sync_jax import SelectiveClassifier
from sync_jax.deploy import stream
from sync_jax.errors import InputError
from tests.command_line import run as command


@pytest.fixture(scope="module")
def classifier(run):
    return SelectiveClassifier.load(run)


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pyarrow.parquet.read_table(path).to_pylist()


@pytest.fixture
def album(run, tmp_path):
    """The test split, one file of which is broken and one no picture, and a folder inside."""
    shutil.copytree(run.parent / "pictures" / "test", tmp_path / "album")
    (tmp_path / "album" / "bee" / "03.jpg").write_bytes(b"broken")
    (tmp_path / "album" / "notes.txt").write_text("none")
    return tmp_path / "album"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_row_for_every_picture(album, classifier, suffix):
    out = album.parent / f"out{suffix}"
    done = stream.stream(classifier, album, out)
    rows = rows_of(out)
    files = sorted(path for path in album.rglob("*") if path.suffix in (".png", ".jpg"))
    assert [row["path"] for row in rows] == [str(path) for path in files]
    assert (done.rows, done.unreadable, len(rows)) == (21, 1, 21)
    assert "bee/03.jpg: unreadable: it is no picture" in done.examples[0]
    good = [path for path in files if path.name != "03.jpg" or path.parent.name != "bee"]
    expected = classifier.predict(good)
    readable = [row for row in rows if not row["reason"].startswith("unreadable")]
    for row, label, confidence, accepted, probabilities in zip(readable, *expected, strict=True):
        assert row["label"] == row["label_1"] == label
        assert float(row["confidence"]) == pytest.approx(confidence, rel=1e-4)
        assert str(row["accepted"]) == str(accepted)
        assert row["reason"] == ("" if accepted else "confidence below the threshold")
        assert float(row["threshold"]) == classifier.threshold
        assert float(row["probability_1"]) == pytest.approx(probabilities.max(), rel=1e-4)
        assert row["certificate"] == classifier.decision.certificate
    assert sorted(x.name for x in album.parent.iterdir()) == ["album", out.name]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_killed_prediction_goes_on(album, classifier, suffix, monkeypatch):
    """After the last whole row; begun anew where the threshold or the pictures are others."""
    monkeypatch.setattr(stream, "BATCH", 4)
    out, whole = album.parent / f"out{suffix}", album.parent / f"whole{suffix}"
    stream.stream(classifier, album, whole)

    def kill(done):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream.stream(classifier, album, out, progress=kill)
    (partial,) = album.parent.glob(f"out{suffix}.incomplete*")
    assert not out.exists()
    text = partial.read_text()
    partial.write_text(text[:-9])  # in the middle of a row
    done = stream.stream(classifier, album, out)
    assert (done.resumed, done.rows) == (7, 21)
    assert rows_of(out) == rows_of(whole)
    for change in ("threshold", "pictures"):
        with pytest.raises(KeyboardInterrupt):
            stream.stream(classifier, album, out, progress=kill)
        if change == "pictures":
            (album / "ant" / "00.png").rename(album / "ant" / "0.png")
        changed = classifier.with_threshold(coverage=0.4) if change == "threshold" else classifier
        done = stream.stream(changed, album, out)
        assert (done.resumed, done.rows) == (0, 21)


def test_arrays_lists_and_single_pictures(album, classifier):
    files = sorted(album.rglob("*.png"))
    images = classifier.preprocessing.batch(files)
    np.save(album.parent / "x.npy", images)
    (album.parent / "x.txt").write_text("".join(f"{x.relative_to(album.parent)}\n" for x in files))
    found = {}
    for name in ("x.npy", "x.txt"):
        stream.stream(classifier, album.parent / name, album.parent / "out.jsonl")
        found[name] = rows_of(album.parent / "out.jsonl")
    assert [row["path"] for row in found["x.npy"]][1] == f"{album.parent / 'x.npy'}[1]"
    assert found["x.txt"][0]["path"] == "album/ant/00.png"
    pairs = zip(found["x.npy"], found["x.txt"], strict=True)
    assert all(a["confidence"] == b["confidence"] for a, b in pairs)
    assert stream.stream(classifier, files[0], album.parent / "one.csv").rows == 1


@pytest.mark.parametrize(
    ("given", "output", "message"),
    [
        ("gone", "out.csv", "gone does not exist: a folder of pictures"),
        ("album/notes.txt", "out.txt", "must end with one of .csv, .jsonl, .parquet"),
        ("empty", "out.csv", "holds no picture"),
        ("album", "none/out.csv", "cannot be written"),
        ("x.pdf", "out.csv", "is none of these"),
    ],
)
def test_what_cannot_be_predicted(album, classifier, given, output, message):
    (album.parent / "empty").mkdir()
    (album.parent / "x.pdf").touch()
    with pytest.raises(InputError, match=message):
        stream.stream(classifier, album.parent / given, album.parent / output)


def test_by_the_command_line(run, album, capsys):
    """From a run to an export to a table; each mistake is one line and exit 2."""
    exported, out = album.parent / "exported", album.parent / "out.csv"
    assert (
        command("--mode=export", f"--workdir={run}", f"--output={exported}", "--coverage=0.5") == 0
    )
    assert command("--mode=check", f"--workdir={run}", f"--artifact={exported}") == 0
    shown = capsys.readouterr().out
    assert shown.count("answers as") == 2
    assert "50 % of the calibration examples" in shown
    options = f"--workdir={exported}", f"--input={album}", f"--output={out}"
    assert command("--mode=predict", *options) == 0
    shown = capsys.readouterr().out
    assert "21 pictures: " in shown
    assert "1 unreadable" in shown
    assert len(rows_of(out)) == 21
    for bad, message in {
        ("--mode=predict", *options[:2]): "needs --input and --output",
        ("--mode=predict", *options[1:]): "--mode=predict needs --workdir",
        ("--mode=export", options[0]): "needs --output",
        ("--mode=predict", f"--workdir={album}", *options[1:]): "neither a run nor an exported",
        ("--mode=predict", *options, "--risk=0.001"): "no threshold can be chosen: no threshold is",
        ("--mode=predict", *options, "--risk=0.1", "--coverage=0.5"): "give one of coverage",
        ("--mode=train", "--artifact=x"): "--artifact belongs to --mode=check",
        ("--mode=evaluate", "--coverage=0.5"): "--coverage belongs to --mode=predict",
        ("--mode=predict", *options, "--cost=1"): "no threshold can be chosen",
        ("--mode=predict", *options, "--cost=a,b"): "no threshold can be chosen",
    }.items():
        assert command(*bad) == 2
        assert message in capsys.readouterr().err
