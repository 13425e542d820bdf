import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax import errors, steps, train
from sync_jax.config import default_config, from_saved, to_json
from sync_jax.data import registry
from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.loading import load_data
from sync_jax.data.placement import Placement
from sync_jax.data.recipe import Augmentation
from sync_jax.data.splits import Part
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report
from sync_jax.methods import METHODS
from sync_jax.runtime import sharding
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import Progress, read_metrics
from sync_jax.runtime.workdir import check_workdir, owned, prepare_workdir
from sync_jax.scores import selection, softmax_response
from sync_jax.steps import Metrics
from sync_jax.trainer import Trainer, choose_network
from tests import tiny


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    """The session has eight simulated devices; a run uses all it sees."""
    mesh = sharding.make_mesh(jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "make_mesh", lambda: mesh)
        yield


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory) -> Path:
    """A run that was trained to its end; reads.json tells when it read which split."""
    workdir, reads, load = tmp_path_factory.mktemp("finished"), [], FashionMnist.load

    def recorded(self, split, *, decode):
        reads.append((split, (workdir / "predictions_calibration.npz").exists()))
        return load(self, split, decode=decode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FashionMnist, "load", recorded)
        train.train_and_evaluate(tiny.config(data_dir), workdir)
    (workdir / "reads.json").write_text(json.dumps(reads))
    return workdir


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reports(method, data_dir, tmp_path, capsys):
    config = tiny.config(data_dir, method=method, train__epochs=4.0)
    train.train_and_evaluate(config, tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report["test"]["accuracy"] > 0.5  # chance is 0.1
    assert report["test"]["n"] == tiny.NUM_TEST
    assert report["calibration"]["n"] == tiny.NUM_CALIBRATION
    assert report["method_score"] == METHODS[method].score
    assert report["training"]["steps"] == round(4 * 190 / 16)
    speed = report["training"]["speed"]
    assert speed["steps"] == report["training"]["steps"]
    assert sum(speed["shares"].values()) == pytest.approx(1)
    assert min(speed["shares"].values()) > 0
    assert speed["flops_per_image"] > 2 * 3 * 16 * 10  # of the last layer alone
    expected = {"softmax_response", "log_odds", "margin", "negative_entropy", METHODS[method].score}
    of_logits = {"max_logit", "max_logit_pnorm", "energy"}
    if "selection" in METHODS[method].heads:
        expected |= {"selection_times_response", "mean_heads_response"}
    expected |= {"mutual_information"} if method == "mc_dropout" else of_logits
    assert set(report["scores"]) == expected
    assert report["scores"]["softmax_response"]["failure_auroc"] > 0.5
    assert (tmp_path / "run" / "risk_coverage.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    shown = capsys.readouterr().out
    assert "Selective error" in shown
    assert (
        0
        <= shown.index("40 calibration images cannot certify an error rate of 5 %")
        < shown.index("step 4/")
    )


def test_a_member_of_the_family_with_every_part_goes_on_with_the_same_bits(data_dir, tmp_path):
    """A table of averages, a second view, a learnt prior in g's logit and averaged weights."""
    options = {"prior_source": "average", "views": 2, "risk_weight": "rank", "divergence": "mse"}
    options |= {"sync_target": "correctness", "logit_prior": "learnt", "detach_features": True}
    config = tiny.config(
        data_dir,
        optimizer__average_decay=0.9,
        target_coverage=0.2,
        **{f"loss__{name}": value for name, value in options.items()},
    )
    train.train_and_evaluate(config, tmp_path)
    expected = Predictions.load(tmp_path / "predictions_test.npz")
    for name in ("report.json", "predictions_calibration.npz", "predictions_test.npz"):
        (tmp_path / name).unlink()
    shutil.rmtree(tmp_path / "checkpoints" / "18")
    train.train_and_evaluate(config, tmp_path)
    found = Predictions.load(tmp_path / "predictions_test.npz")
    for name, output in expected.outputs.items():
        np.testing.assert_array_equal(found.outputs[name], output)
    assert not np.allclose(selection(expected.outputs), softmax_response(expected.outputs))


def test_two_views_are_two_augmentations_of_the_same_examples(data_dir, tmp_path):
    """The first is what it would be alone; what the host has cropped is refused."""
    config, mesh = tiny.config(data_dir, loss__views=2), sharding.make_mesh()
    placed, part, _ = load_data(config, registry.dataset(config.data), mesh, tmp_path, Processes())
    run = tiny.trainer(config, mesh, placed)
    split, state = next(run.feed(part, 0)), run.create_state()[0]

    def batch(**changes):
        settings = dataclasses.replace(run.settings, **changes)
        return steps.input_batch(state, split, np.uint32(0), settings=settings)

    both, alone = batch(), batch(views=1)
    second = both.pop("second_image")
    chex.assert_trees_all_equal(both, alone)
    differ = np.any(np.asarray(second != alone["image"]), axis=(1, 2, 3))
    assert differ.sum() >= 12  # of 16, with 25 shifts and two flips each
    plain = batch(augmentation=Augmentation(0, False))
    chex.assert_trees_all_equal(plain["second_image"], plain["image"])
    cropping = tiny.config(data_dir, loss__views=2, data__min_crop_area=0.5)
    with pytest.raises(InputError, match=r"config\.loss\.views=2 augments an image twice"):
        tiny.trainer(cropping, mesh, Placement("host")).check()
    tiny.trainer(cropping, mesh, Placement("disk")).check()


def test_the_host_is_two_dispatches_ahead_at_most(data_dir, tmp_path, monkeypatch):
    """Or SIGTERM would wait for all that the device has been told to do."""
    step, wait = Trainer.step, jax.block_until_ready
    begun, ahead = [], []

    def begins(self, *arguments, **options):
        state, metrics = step(self, *arguments, **options)
        begun.append(metrics)
        return state, metrics

    def waits(x):
        if isinstance(x, Metrics):
            ahead.append(len(begun) - 1 - next(i for i, y in enumerate(begun) if y is x))
        return wait(x)

    monkeypatch.setattr(Trainer, "step", begins)
    monkeypatch.setattr(jax, "block_until_ready", waits)
    train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert len(begun) == 18
    assert ahead == [2] * 16  # of each step from the third on, before the next


def test_the_test_split_is_read_once_and_last(finished):
    reads = json.loads((finished / "reads.json").read_text())
    assert reads == [["train", False], ["test", True]]


def test_a_run_does_not_go_on_with_other_data(finished, tmp_path):
    """The digest decides, wherever the data lie; an earlier version's run has none."""
    known = json.loads((finished / "dataset.json").read_text())
    assert known["train_size"] == tiny.NUM_TRAIN - tiny.NUM_CALIBRATION
    config = from_saved(json.loads((finished / "config.json").read_text()))
    for digest, refused in ((known["digest"], False), ("", False), ("0" * 64, True)):
        dataset = SimpleNamespace(digest=lambda digest=digest: digest)
        expected = pytest.raises(InputError, match="holds a run on other data")
        with expected if refused else contextlib.nullcontext():
            train.check_same_data(config, dataset, finished)
    train.check_same_data(config, dataset, tmp_path)
    config.data.folder = "elsewhere"  # where nothing is known by digest, the place decides
    dataset = SimpleNamespace(digest=lambda: "")
    with pytest.raises(InputError, match=r"other data \(now config.data.folder='elsewhere'"):
        train.check_same_data(config, dataset, finished)


def test_what_no_calibration_split_of_a_size_can_certify_is_said():
    """Without an error 59 examples prove 5 % at delta 0.05, for 0.95^59 < 0.05 < 0.95^58."""
    config = default_config()

    def line(size, groups=None):
        return train.beyond_proof(
            config, Part(np.zeros(size), np.zeros(size), np.arange(size), groups)
        )

    assert line(299) == ""
    assert "rate of 1 % (at least 299 are needed, without an error) at" in line(298)
    assert "of 2 % (at least 149 are needed, without an error), 1 % (at least 299" in line(59)
    assert "of 5 % (at least 59 are needed, without an error), 2 % (at least 149" in line(58)
    twins = line(598, np.arange(598) % 298)
    assert twins.startswith("298 calibration groups of images cannot certify an error rate of 1 %")
    config.evaluation.delta = 0.5
    assert line(69) == ""  # 0.99^69 < 0.5 < 0.99^68


def test_auto_takes_what_the_machine_can_train_and_stays_with_it(data_dir, tmp_path, monkeypatch):
    def chosen(workdir, backend, **changes):
        config = tiny.config(data_dir, model__name="auto", **changes)
        assert config.model.name == "auto"
        with monkeypatch.context() as patch:
            patch.setattr(jax, "default_backend", lambda: backend)
            lines = choose_network(config, workdir)
        check_workdir(config, workdir)
        assert choose_network(config, workdir) == []
        return config, lines

    on_cpu, lines = chosen(tmp_path / "cpu", "cpu")
    assert lines == ["config.model.name=auto: cnn, without an accelerator"]
    assert (on_cpu.model.name, on_cpu.model.width) == ("cnn", tiny.OVERRIDES["model.width"])
    on_gpu, lines = chosen(tmp_path / "gpu", "gpu")
    assert lines[1:] == ["config.model.features is no option of resnet18, and is left out"]
    assert (on_gpu.model.name, on_gpu.model.width) == ("resnet18", on_cpu.model.width)
    assert chosen(tmp_path / "new", "cpu", model__pretrained="w.pth")[0].model.name == "resnet18"
    # Begun on one kind of machine, and resumed on the other.
    prepare_workdir(on_cpu, tmp_path / "cpu")
    prepare_workdir(on_gpu, tmp_path / "gpu")
    assert chosen(tmp_path / "cpu", "gpu")[0].model.name == "resnet18"  # nothing was trained
    for run in ("cpu", "gpu"):
        (tmp_path / run / "checkpoints" / "1").mkdir(parents=True)
    assert chosen(tmp_path / "cpu", "gpu")[0].model.name == "cnn"
    config, lines = chosen(tmp_path / "gpu", "cpu")
    assert config.to_dict() == on_gpu.to_dict()
    assert lines[0].endswith(f"resnet18, with which the run in {tmp_path / 'gpu'} began")
    with pytest.raises(InputError, match=r"model.name is 'resnet18' there and 'cnn' here"):
        check_workdir(on_cpu, tmp_path / "gpu")
    with pytest.raises(InputError, match=r"config.seed is 0 there and 1 here"):
        chosen(tmp_path / "cpu", "gpu", seed=1)
    with pytest.raises(InputError, match="has no option 'widht'"):
        tiny.config(data_dir, model__name="auto", model__widht=8)


def test_a_long_training_on_cpus_names_a_faster_network(data_dir):
    """By the FLOP of both; 3 x 3 convolutions of 64 channels on all pixels take far more."""

    def trainer(name, width):
        config = tiny.config(data_dir, model__name=name, model__width=width)
        return tiny.trainer(config, sharding.make_mesh())

    slow = trainer("resnet18", 64)
    assert slow.advice(300.0) == ""
    pattern = r" \(--config.model.name=cnn: 5\d times less arithmetic\)"
    assert re.fullmatch(pattern, slow.advice(1e6))
    assert trainer("resnet18", 1).advice(1e6) == ""  # faster than the cnn of its own width


def test_a_finished_run_says_so_and_trains_no_more(finished, data_dir, capsys, monkeypatch):
    before = (finished / "report.json").read_bytes()
    monkeypatch.setattr(train, "fit", None)
    train.train_and_evaluate(tiny.config(data_dir), finished)
    assert "holds a finished run" in capsys.readouterr().out
    assert (finished / "report.json").read_bytes() == before


def test_another_experiment_in_the_workdir_is_refused(finished, data_dir):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    changed = tiny.config(data_dir, train__epochs=2.0, loss__alpha=0.25)
    with pytest.raises(InputError, match=r"config\.loss\.alpha is 0\.5 there and 0\.25 here"):
        train.train_and_evaluate(changed, finished)
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_a_run_without_a_checkpoint_makes_way_for_another_without_mixing_logs(
    data_dir, tmp_path, monkeypatch, capsys
):
    def interrupt(self, done):
        if done == 5:
            raise KeyboardInterrupt

    first = tiny.config(data_dir, optimizer__learning_rate=0.05)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(first, tmp_path)
    (tmp_path / "nonfinite.jsonl").write_text('{"step": 2, "action": "skip"}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "part": "train", "seconds": 9000}\n')
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name(f"{events.name}.first"))  # or the next could have its name
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    config = tiny.config(data_dir)
    train.train_and_evaluate(config, tmp_path)
    assert "logs of another experiment, without a checkpoint: removed" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(to_json(config))
    assert max(entry["seconds"] for entry in read_metrics(tmp_path)) < 9000
    assert not (tmp_path / "nonfinite.jsonl").exists()
    assert [path.suffix == ".first" for path in (tmp_path / "tensorboard").iterdir()] == [False]


@pytest.mark.parametrize(
    "kept",
    ["checkpoints/6", "checkpoints/6.damaged", "predictions_test.npz", "report.json", None],
)
def test_what_a_training_has_left_is_protected_from_other_experiments(kept, data_dir, tmp_path):
    """Also the config.json of another program."""
    other = tiny.config(data_dir, loss__alpha=0.25)
    (tmp_path / "config.json").write_text(to_json(other) if kept else '{"architectures": []}')
    if kept:
        (tmp_path / kept).parent.mkdir(exist_ok=True)
        (tmp_path / kept).touch()
    with pytest.raises(InputError, match=r"holds another experiment: .*config\.loss\.alpha is"):
        train.check_workdir(tiny.config(data_dir), tmp_path)
    if kept:
        (tmp_path / kept).unlink()
        train.check_workdir(tiny.config(data_dir), tmp_path)


def test_lost_predictions_are_made_again_and_the_report_with_them(
    finished, data_dir, tmp_path, monkeypatch
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "predictions_test.npz").unlink()
    cut = tmp_path / "predictions_calibration.npz"
    cut.write_bytes(cut.read_bytes()[:500])
    with pytest.raises(InputError, match=r"is damaged: .*; give the training command again"):
        train.evaluate(tiny.config(data_dir), tmp_path)
    monkeypatch.setattr(Trainer, "step", None)
    train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    for split in ("calibration", "test"):
        found, expected = (
            Predictions.load(folder / f"predictions_{split}.npz") for folder in (tmp_path, finished)
        )
        chex.assert_trees_all_equal(found.outputs, expected.outputs)
        assert found.same_examples(expected)
    found, expected = read_report(tmp_path), read_report(finished)
    assert found["environment"].pop("date") >= expected["environment"].pop("date")
    assert found == expected


@pytest.mark.parametrize(
    ("lost", "is_finished", "said"),
    [
        (["predictions_test.npz", "checkpoints"], True, "holds a finished run"),
        (["predictions_calibration.npz"], False, "lacks predictions: they are made again from"),
        (["predictions_test.npz", "report.json"], False, ""),
        (["predictions_test.npz", "report.json", "checkpoints"], False, ""),
        (["report.json"], True, "was trained to its end: its report is made from its pred"),
        (["report.json", "checkpoints"], True, "was trained to its end"),
        (["report.json", "config.json"], True, "was trained to its end"),
        (["config.json"], True, "holds a finished run"),
    ],
)
def test_what_is_lost_of_a_finished_run_is_made_from_the_rest(
    lost, is_finished, said, finished, data_dir, tmp_path, capsys
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in lost:
        path = tmp_path / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert train.is_finished(tiny.config(data_dir), tmp_path) == is_finished
    shown = capsys.readouterr().out
    assert said in shown if said else not shown
    if "report.json" in lost and is_finished:
        assert read_report(tmp_path)["scores"] == read_report(finished)["scores"]
        assert (tmp_path / "config.json").exists()


def test_checkpoints_know_their_config(finished, data_dir, tmp_path):
    """Those of another experiment are refused where config.json was lost, or is this one's."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for name in ("config.json", "report.json"):
        (tmp_path / name).unlink()
    other = tiny.config(data_dir, optimizer__momentum=0.5)
    message = r"config\.optimizer\.momentum is 0\.9 there and 0\.5 here"
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(other, tmp_path)
    assert not (tmp_path / "config.json").exists()
    (tmp_path / "config.json").write_text(to_json(other))
    with pytest.raises(InputError, match=message):
        train.train_and_evaluate(other, tmp_path)
    (tmp_path / "config.json").unlink()
    train.check_workdir(tiny.config(data_dir), tmp_path)  # its own


def test_a_checkpoint_under_another_name_is_not_where_the_run_goes_on(
    finished, data_dir, tmp_path, capsys
):
    """One copied beyond the end is not reported as trained, nor is one renamed resumed wrongly."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "report.json", *tmp_path.glob("predictions_*")):
        path.unlink()
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(checkpoints / "12", checkpoints / "200")
    (checkpoints / "12").rename(checkpoints / "14")
    shutil.rmtree(checkpoints / "18")
    # Of fewer epochs the config says more than the steps do, also where config.json is edited.
    shorter = tiny.config(data_dir, train__epochs=1.0)
    (tmp_path / "config.json").write_text(to_json(shorter))
    with pytest.raises(InputError, match=r"config\.train\.epochs is 1\.5 there and 1\.0 here"):
        train.train_and_evaluate(shorter, tmp_path)
    assert {path.name for path in checkpoints.iterdir()} == {"6", "14", "200"}
    (tmp_path / "config.json").unlink()
    train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert "resuming at step 6 of 18" in capsys.readouterr().out
    assert {path.name for path in checkpoints.iterdir()} == {
        *("6", "12", "18"),
        *("14.damaged", "200.damaged"),
    }
    found, expected = (
        Predictions.load(folder / "predictions_test.npz") for folder in (tmp_path, finished)
    )
    np.testing.assert_array_equal(found.outputs["logits"], expected.outputs["logits"])


def test_evaluate_recomputes_for_another_delta_without_training(finished, data_dir, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    reports = []
    for delta in (0.05, 0.2):
        changes = {"evaluation__target_risks": (0.5,), "evaluation__delta": delta}
        train.evaluate_finished(tiny.config(data_dir, **changes), tmp_path)
        reports.append(read_report(tmp_path))
    first, second = reports
    assert first["test"] == second["test"]
    assert first["training"] == second["training"]
    scores = [report["scores"]["selection"] for report in reports]
    for strict, loose in zip(*(x["certificates"] for x in scores), strict=True):
        if strict["method"] == "conformal_risk_control":  # it has no delta
            assert strict == loose
            continue
        assert (strict["delta"], loose["delta"]) == (0.05, 0.2)
        assert strict["coverage"] <= loose["coverage"]
    found = [{c["delta"] for c in x["class_certificates"]} for x in scores]
    assert found == [{0.05 / 10}, {0.2 / 10}]


@pytest.mark.parametrize("log_every", [4, 1000])  # seen at a log line, or before calibrating
def test_divergence_stops_with_the_step_and_the_term_and_saves_nothing(
    log_every, data_dir, tmp_path
):
    config = tiny.config(
        data_dir,
        optimizer__learning_rate=1e30,
        optimizer__warmup_epochs=0.0,
        loss__sync_weight=0.0,
        log__every_steps=log_every,
        checkpoint__every_epochs=3.0,
    )
    with pytest.raises(errors.NonFiniteError, match=r"^step 1: parameter_norm=inf \(finite: loss="):
        train.train_and_evaluate(config, tmp_path)
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    assert not (tmp_path / "report.json").exists()


def test_a_folder_is_one_runs_alone(data_dir, tmp_path):
    with (
        owned(tmp_path, Processes()),
        pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*name another"),
    ):
        train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    with owned(tmp_path, Processes()):  # free again
        pass


def test_the_watchdog_hears_of_every_step(data_dir, tmp_path, monkeypatch):
    """runtime/test_signals.py shows what it prints when it hears nothing."""
    heard = []

    @contextlib.contextmanager
    def watchdog(seconds):
        assert seconds == 0.5
        yield lambda: heard.append(1)

    monkeypatch.setattr(train, "watchdog", watchdog)
    train.train_and_evaluate(tiny.config(data_dir, process__watchdog_seconds=0.5), tmp_path)
    # Steps, saves, and batches of 16: of two evaluations while training and of both splits at its
    # end, between which the test split is read.
    assert len(heard) == 18 + 3 + 2 * 3 + 3 + 1 + 5


@pytest.mark.parametrize("metric", ["accuracy", "aurc"])
def test_the_best_on_the_calibration_split_is_kept(metric, data_dir, tmp_path, monkeypatch):
    """The highest accuracy or the lowest AURC: here of step 6, neither the latest nor the worst."""
    given = iter([0.9, 0.2, 0.5] if metric == "accuracy" else [0.1, 0.8, 0.5])
    evaluate = train.calibration_metrics
    monkeypatch.setattr(train, "calibration_metrics", lambda x: evaluate(x) | {metric: next(given)})
    config = tiny.config(
        data_dir,
        checkpoint__keep=1,
        checkpoint__keep_best=1,
        checkpoint__best_metric=metric,
        log__calibration_every_epochs=0.5,
    )
    train.train_and_evaluate(config, tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"6", "18"}


@pytest.mark.parametrize(("placement", "cropped"), [("host", True), ("disk", False)])
def test_what_the_host_has_cropped_is_not_cropped_again(
    placement, cropped, data_dir, tmp_path, monkeypatch
):
    asked = []

    def augment(key, images, augmentation, **options):
        asked.append((augmentation.min_crop_area, images.dtype, options))
        return images.astype(jnp.float32)

    monkeypatch.setattr(steps, "augment", augment)
    config = tiny.config(data_dir, data__placement=placement, data__min_crop_area=0.5)
    mesh = sharding.make_mesh()
    placed, part, _ = load_data(config, registry.dataset(config.data), mesh, tmp_path, Processes())
    run = tiny.trainer(config, mesh, placed)
    run.step(run.create_state()[0], next(run.feed(part, 0)))
    assert asked == [(0.5, np.uint8, {"size": 28, "cropped": cropped})]
