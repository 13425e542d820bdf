"""A classifier outside the training: it answers as the run did, or is refused."""

import json
import shutil
import subprocess
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sync_jax import SelectiveClassifier
from sync_jax.data.images import decode, square
from sync_jax.deploy.artifact import read_safetensors
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report
from sync_jax.predictor import check_artifact
from tests.deploy.conftest import CLASSES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def classifier(run):
    return SelectiveClassifier.load(run)


@pytest.fixture(scope="module")
def artifact(run, classifier):
    folder = run.parent / "exported"
    classifier.export(folder)
    return folder


@pytest.fixture(scope="module")
def files(run):
    return files_of(run)


def files_of(run):
    """The test split's files, in the order of predictions_test.npz."""
    lines = (run / "examples.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines if line.startswith("test,")]
    return [run.parent / "pictures" / row[3] for row in rows]


@pytest.mark.parametrize("pipeline", ["run", "host_run"])
def test_paths_and_pictures_give_the_bits_of_the_evaluation(request, pipeline):
    """PNG and JPEG, larger and smaller than what is stored, from both pipelines."""
    run = request.getfixturevalue(pipeline)
    classifier, files = SelectiveClassifier.load(run), files_of(run)
    saved = Predictions.load(run / "predictions_test.npz")
    found = classifier.outputs(files)
    assert found.keys() == saved.outputs.keys()
    for name, output in saved.outputs.items():
        np.testing.assert_array_equal(found[name], output)
    images = [Image.open(file) for file in files]
    np.testing.assert_array_equal(classifier.outputs(images)["logits"], saved.outputs["logits"])
    sizes = classifier.preprocessing
    stored = np.stack([square(decode(file), sizes.short_side, sizes.stored) for file in files])
    for arrays in (stored, stored[:, 1:-1, 1:-1]):  # of the stored size, and of the network's
        np.testing.assert_array_equal(classifier.outputs(arrays)["logits"], saved.outputs["logits"])


def test_it_decides_as_the_report_says(run, classifier, files):
    report = read_report(run)
    best = report["recommended"]
    point = report["scores"]["softmax_response"]["operating_point"]
    expected = best["test"] if best["feasible"] else point
    labels = np.array([file.parent.name for file in files])
    found = classifier.predict(files)
    assert found.accepted.sum() == expected["n_accepted"]
    assert (found.label != labels)[found.accepted].sum() == expected["n_errors"]
    judged = classifier.evaluate(files, labels)
    assert judged["coverage"] == expected["coverage"]
    assert judged["accuracy"] == pytest.approx(report["test"]["accuracy"])
    area = report["scores"]["softmax_response"]["aurc"]["mean"]
    assert judged["aurc"] == pytest.approx(area, rel=1e-6)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)


def test_any_number_in_any_company(classifier, files):
    every = classifier.predict(files)
    for count in (1, 3, 9):
        some = classifier.predict(files[:count])
        np.testing.assert_allclose(some.confidence, every.confidence[:count], rtol=1e-4)
    one = classifier.predict(str(files[0]))
    assert one.label.shape == (1,)
    with pytest.raises(ValueError, match="inputs are empty"):
        classifier.predict([])
    with pytest.raises(InputError, match=r"gone\.png cannot be read"):
        classifier.predict(["gone.png"])
    with pytest.raises(ValueError, match=r"uint8 \[n, height, width, 3\], got float64"):
        classifier.predict(np.zeros((2, 12, 12, 3)))
    with pytest.raises(ValueError, match="labels hold 'dodo', which is no class"):
        classifier.evaluate(files[:1], ["dodo"])


def test_other_thresholds(classifier, files):
    half = classifier.with_threshold(coverage=0.5)
    assert (half.decision.confidence >= half.threshold).mean() == 0.5
    assert "50 % of the calibration examples" in repr(half)
    cheap = classifier.with_threshold(cost=(100.0, 1.0))
    assert cheap.threshold > classifier.with_threshold(cost=(1.0, 1.0)).threshold
    assert "an error costs 100 and an abstention 1" in repr(cheap)
    np.testing.assert_array_equal(
        half.predict(files).confidence, classifier.predict(files).confidence
    )


def test_an_export_answers_as_the_run(run, classifier, artifact, files):
    other = SelectiveClassifier.load(artifact)
    ours, theirs = classifier.predict(files), other.predict(files)
    np.testing.assert_allclose(theirs.confidence, ours.confidence, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(theirs.label, ours.label)
    np.testing.assert_array_equal(theirs.accepted, ours.accepted)
    np.testing.assert_array_equal(other.predict(files[:3]).label, ours.label[:3])
    assert "answers as" in check_artifact(run, artifact)
    card = json.loads((artifact / "card.json").read_text())
    assert card["classes"] == list(CLASSES)
    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["input"] == {"dtype": "uint8", "shape": ["batch", 12, 12, 3]}
    assert other.threshold == classifier.threshold
    with pytest.raises(InputError, match="exported already: copy the folder"):
        other.export(artifact / "again")
    with pytest.raises(InputError, match="holds other files; name another folder"):
        classifier.export(run)


@pytest.mark.parametrize(
    "name", ["card.json", "decision.json", "network.stablehlo", "weights.safetensors"]
)
def test_an_altered_export_is_refused(artifact, tmp_path, name):
    """Any byte of any file; and one that is missing."""
    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / name
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"altered|damaged|cannot be used"):
        SelectiveClassifier.load(tmp_path / "copy")
    path.unlink()
    with pytest.raises(InputError, match=r"damaged|cannot be used|neither a run nor"):
        SelectiveClassifier.load(tmp_path / "copy")


def test_another_run_is_noticed(run, classifier, artifact, tmp_path):
    """Weights that changed and digests to match: the check compares answers, not files alone."""
    import safetensors.numpy

    from sync_jax.deploy import artifact as artifacts

    shutil.copytree(artifact, tmp_path / "copy")
    path = tmp_path / "copy" / "weights.safetensors"
    weights = safetensors.numpy.load_file(path)
    read = read_safetensors(path.read_bytes())
    assert read.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array)
    name = "params/class_head/bias"
    safetensors.numpy.save_file(weights | {name: weights[name] + 1}, path)
    card = json.loads((tmp_path / "copy" / "card.json").read_text())
    kept = {k: x for k, x in card.items() if k not in ("schema", "digests", "card_digest")}
    artifacts.write_card(tmp_path / "copy", kept)
    with pytest.raises(InputError, match="answers otherwise than the run: logits differs"):
        check_artifact(run, tmp_path / "copy")


def test_a_damaged_safetensors_header():
    for data in (b"", b"\xff" * 8, (3).to_bytes(8, "little") + b"{}{"):
        with pytest.raises(ValueError, match=r"cut off|Extra data|Expecting"):
            read_safetensors(data)
    entry = {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}
    header = json.dumps(entry).encode()
    with pytest.raises(ValueError, match="x does not fit the file"):
        read_safetensors(len(header).to_bytes(8, "little") + header + bytes(8))


@pytest.mark.slow
def test_an_export_needs_jax_numpy_and_flatbuffers_alone(artifact, classifier, files, tmp_path):
    """In an environment of what `pip install jax flatbuffers` brings, by links."""
    venv.create(tmp_path / "venv", with_pip=False)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    import jax

    packages = Path(jax.__file__).parents[1]
    needed = ("jax", "jaxlib", "numpy", "numpy.libs", "scipy", "scipy.libs", "opt_einsum")
    needed += ("ml_dtypes", "flatbuffers", "zstandard")
    for name in needed:
        if (packages / name).exists():
            (site / name).symlink_to(packages / name)
    for info in packages.glob("*.dist-info"):
        if info.name.partition("-")[0] in ("jax", "jaxlib", "numpy", "ml_dtypes"):
            (site / info.name).symlink_to(info)
    (site / "sync_jax").symlink_to(ROOT / "sync_jax")
    inputs = classifier.preprocessing.batch(files)
    np.save(tmp_path / "inputs.npy", inputs)
    code = (
        "import sys, numpy as np\n"
        "from sync_jax import SelectiveClassifier\n"
        "found = SelectiveClassifier.load(sys.argv[1]).predict(np.load('inputs.npy'))\n"
        "np.savez('found.npz', confidence=found.confidence, accepted=found.accepted)\n"
        "print(*{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code, artifact],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    heavy = {"flax", "optax", "orbax", "tensorflow_datasets", "PIL", "ml_collections", "matplotlib"}
    assert not heavy & {*done.stdout.split()}
    expected, found = classifier.predict(files), np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["confidence"], expected.confidence, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["accepted"], expected.accepted)
