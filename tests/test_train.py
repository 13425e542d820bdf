import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sync_jax import errors, steps, train
from sync_jax.data import registry
from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.loading import load_data
from sync_jax.errors import InputError, TerminatedError, WriteError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.evaluation.report import read_report
from sync_jax.methods import METHODS
from sync_jax.runtime import sharding, signals
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import Progress
from sync_jax.runtime.workdir import owned
from sync_jax.steps import Metrics, TrainState
from sync_jax.trainer import Trainer
from tests import tiny
from tests.curves import check_close, curve

ROOT = Path(__file__).parents[1]


MESH_OF_ALL = sharding.make_mesh


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session has eight simulated devices; a run uses all it sees."""
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


def final_state(config, workdir: Path) -> TrainState:
    run = tiny.trainer(config, sharding.make_mesh())
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        assert checkpoints.latest_step() == run.total_steps
        return checkpoints.restore(run.state_like).state


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_reports(method, data_dir, tmp_path, capsys):
    config = tiny.config(data_dir, method=method, train__epochs=4.0)
    train.train_and_evaluate(config, tmp_path / "run")
    report = read_report(tmp_path / "run")
    assert report is not None
    assert report["test"]["accuracy"] > 0.5  # chance is 0.1
    assert report["test"]["n"] == tiny.NUM_TEST
    assert report["calibration"]["n"] == tiny.NUM_CALIBRATION
    assert report["method_score"] == METHODS[method].score
    assert report["training"]["steps"] == round(4.0 * 190 / 16)
    speed = report["training"]["speed"]
    assert speed["steps"] == report["training"]["steps"]
    assert sum(speed["shares"].values()) == pytest.approx(1)
    assert min(speed["shares"].values()) > 0
    assert speed["flops_per_image"] > 2 * 3 * 16 * 10  # of the last layer alone
    expected = {"softmax_response", "margin", "negative_entropy", METHODS[method].score}
    if method == "mc_dropout":
        expected |= {"mutual_information"}
    else:
        expected |= {"max_logit", "max_logit_pnorm", "energy"}
    assert set(report["scores"]) == expected
    assert report["scores"]["softmax_response"]["failure_auroc"] > 0.5
    assert (tmp_path / "run" / "risk_coverage.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))
    assert "Selective error" in capsys.readouterr().out


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


def test_the_test_split_is_read_once_and_last(data_dir, tmp_path, monkeypatch):
    reads = []
    load = FashionMnist.load

    def recorded(self, split, *, decode):
        reads.append((split, (tmp_path / "predictions_calibration.npz").exists()))
        return load(self, split, decode=decode)

    monkeypatch.setattr(FashionMnist, "load", recorded)
    train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert reads == [("train", False), ("test", True)]


def test_same_seed_same_run_other_seed_other_run(data_dir, tmp_path):
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        train.train_and_evaluate(tiny.config(data_dir, seed=seed), tmp_path / name)
    a, b, c = (Predictions.load(tmp_path / name / "predictions_test.npz") for name in "abc")
    chex.assert_trees_all_equal(a.outputs, b.outputs)
    assert curve(tmp_path / "a") == curve(tmp_path / "b")
    assert not np.array_equal(a.outputs["logits"], c.outputs["logits"])
    # The seed does not move the hold-out: runs of different seeds share their examples.
    calibration = [
        Predictions.load(tmp_path / name / "predictions_calibration.npz") for name in "ac"
    ]
    np.testing.assert_array_equal(calibration[0].index, calibration[1].index)


@pytest.mark.slow
def test_the_host_pipeline_resumes_to_the_same_bits_on_eight_devices(
    data_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sharding, "make_mesh", MESH_OF_ALL)
    config = tiny.config(data_dir, data__placement="host")
    train.train_and_evaluate(config, tmp_path / "whole")
    assert "images in the host's memory, copied for each batch: " in capsys.readouterr().out
    step = Progress.step

    def stop_at_eleven(self, done):
        if done == 11:
            raise KeyboardInterrupt
        step(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop_at_eleven)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(config, tmp_path / "broken")
    train.train_and_evaluate(config, tmp_path / "broken")
    assert "resuming at step 6 of 18" in capsys.readouterr().out
    whole, broken = (
        Predictions.load(tmp_path / name / "predictions_test.npz") for name in ("whole", "broken")
    )
    chex.assert_trees_all_equal(whole.outputs, broken.outputs)
    # The examples, their order and their augmentation are those of images on the devices.
    train.train_and_evaluate(tiny.config(data_dir), tmp_path / "device")
    check_close(tmp_path / "whole", tmp_path / "device")


def test_a_finished_run_says_so_and_trains_no_more(data_dir, tmp_path, capsys, monkeypatch):
    config = tiny.config(data_dir)
    train.train_and_evaluate(config, tmp_path)
    before = (tmp_path / "report.json").read_bytes()
    capsys.readouterr()
    monkeypatch.setattr(train, "fit", None)
    train.train_and_evaluate(config, tmp_path)
    assert "holds a finished run" in capsys.readouterr().out
    assert (tmp_path / "report.json").read_bytes() == before


def test_another_experiment_in_the_workdir_is_refused(data_dir, tmp_path):
    config = tiny.config(data_dir)
    train.train_and_evaluate(config, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    changed = tiny.config(data_dir, train__epochs=2.0, loss__alpha=0.25)
    for action in (train.train_and_evaluate, train.evaluate_finished):
        with pytest.raises(InputError, match=r"config\.loss\.alpha is 0\.5 there and 0\.25 here"):
            action(changed, tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_checkpoints_know_their_config(data_dir, tmp_path):
    """A folder whose config.json was lost is another experiment's all the same."""
    config = tiny.config(data_dir, method="ce")
    train.train_and_evaluate(config, tmp_path)
    for name in ("config.json", "report.json"):
        (tmp_path / name).unlink()
    changed = tiny.config(data_dir, method="ce", optimizer__momentum=0.5)
    with pytest.raises(
        InputError, match=r"config\.optimizer\.momentum is 0\.9 there and 0\.5 here"
    ):
        train.train_and_evaluate(changed, tmp_path)
    assert not (tmp_path / "config.json").exists()
    train.train_and_evaluate(config, tmp_path)  # its own


def test_evaluate_recomputes_for_another_delta_without_training(data_dir, tmp_path, monkeypatch):
    config = tiny.config(data_dir, evaluation__target_risks=(0.5,))
    train.train_and_evaluate(config, tmp_path)
    first = read_report(tmp_path)
    monkeypatch.setattr(train, "fit", None)
    changed = tiny.config(data_dir, evaluation__target_risks=(0.5,), evaluation__delta=0.2)
    train.evaluate_finished(changed, tmp_path)
    second = read_report(tmp_path)
    assert first is not None
    assert second is not None
    assert first["test"] == second["test"]
    assert first["training"] == second["training"]
    for name in ("softmax_response", "selection"):
        pairs = zip(*(r["scores"][name]["certificates"] for r in (first, second)), strict=True)
        for strict, loose in pairs:
            if strict["method"] == "conformal_risk_control":  # it has no delta
                assert strict == loose
                continue
            assert (strict["delta"], loose["delta"]) == (0.05, 0.2)
            assert strict["coverage"] <= loose["coverage"]
        classes = [r["scores"][name]["class_certificates"] for r in (first, second)]
        assert {c["delta"] for c in classes[0]} == {0.05 / 10}
        assert {c["delta"] for c in classes[1]} == {0.2 / 10}


def test_evaluate_without_a_trained_run_says_what_is_missing(data_dir, tmp_path):
    with pytest.raises(InputError, match=r"predictions_calibration\.npz is missing"):
        train.evaluate_finished(tiny.config(data_dir), tmp_path)


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


def test_batch_that_cannot_be_split_is_refused_with_the_arithmetic(data_dir, tmp_path, monkeypatch):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), (sharding.BATCH_AXIS,))
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    workdir = tmp_path / "run"
    with pytest.raises(InputError, match=r"train\.batch_size=12 .* 8 devices: 12 / 8 = 1\.50"):
        train.train_and_evaluate(tiny.config(data_dir, train__batch_size=12), workdir)
    assert not workdir.exists()


@pytest.mark.slow
def test_eight_devices_train_as_one(data_dir, tmp_path, monkeypatch):
    """Up to the order of float32 sums, also CCL-SC's queues; the others are in test_topology."""
    config = tiny.config(data_dir, method="ccl_sc")
    train.train_and_evaluate(config, tmp_path / "one")
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:8]), (sharding.BATCH_AXIS,))
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    train.train_and_evaluate(config, tmp_path / "eight")
    one, eight = (curve(tmp_path / name) for name in ("one", "eight"))
    assert [entry["step"] for entry in one] == [entry["step"] for entry in eight]
    for a, b in zip(one, eight, strict=True):
        assert a["part"] == b["part"]
        values = [[v for k, v in entry.items() if k != "part"] for entry in (a, b)]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_sigterm_saves_and_the_run_ends_with_the_same_bits(data_dir, tmp_path, monkeypatch, capsys):
    # No checkpoint but the last and what SIGTERM asks for.
    config = tiny.config(data_dir, checkpoint__every_epochs=100.0)
    train.train_and_evaluate(config, tmp_path / "whole")
    step = Progress.step

    def terminated(self, done):
        step(self, done)
        if done == 11:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", terminated)
        with pytest.raises(TerminatedError, match="stopped by SIGTERM, saved at step 11"):
            train.train_and_evaluate(config, tmp_path / "broken")
    train.train_and_evaluate(config, tmp_path / "broken")
    assert "resuming at step 11 of 18" in capsys.readouterr().out
    states = [final_state(config, tmp_path / name) for name in ("whole", "broken")]
    chex.assert_trees_all_equal(*states)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was


def test_a_folder_is_one_runs_alone(data_dir, tmp_path):
    with (
        owned(tmp_path, Processes()),
        pytest.raises(InputError, match=rf"in use by process {os.getpid()} on .*name another"),
    ):
        train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    with owned(tmp_path, Processes()):  # free again
        pass


@pytest.mark.slow
def test_a_damaged_latest_checkpoint_costs_one_save_interval(data_dir, tmp_path, capsys):
    config = tiny.config(data_dir)
    train.train_and_evaluate(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "report.json").unlink()
    for path in (tmp_path / "broken" / "checkpoints" / "18").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-9])
    train.train_and_evaluate(config, tmp_path / "broken")
    shown = capsys.readouterr().out
    assert "checkpoints/18 is damaged and put aside as 18.damaged: " in shown
    assert "resuming at step 12 of 18" in shown
    states = [final_state(config, tmp_path / name) for name in ("whole", "broken")]
    chex.assert_trees_all_equal(*states)


def test_the_watchdog_hears_of_every_step_and_prints_stacks_when_one_hangs(
    data_dir, tmp_path, monkeypatch, capfd
):
    heard = []

    @contextlib.contextmanager
    def watchdog(seconds):
        with signals.watchdog(seconds) as happened:
            yield lambda: (heard.append(1), happened())

    step, shown = Progress.step, ""

    def hangs_at_nine(self, done):
        nonlocal shown
        if done == 9:
            capfd.readouterr()  # a compilation may have taken as long
            deadline = time.monotonic() + 60
            while "Thread" not in shown and time.monotonic() < deadline:
                time.sleep(0.05)
                shown += capfd.readouterr().err
        step(self, done)

    monkeypatch.setattr(train, "watchdog", watchdog)
    monkeypatch.setattr(Progress, "step", hangs_at_nine)
    train.train_and_evaluate(tiny.config(data_dir, process__watchdog_seconds=0.5), tmp_path)
    assert "sync_jax: no step has finished for" in shown
    assert "in hangs_at_nine" in shown
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


def test_a_disk_that_fills_up_is_one_line(data_dir, tmp_path, monkeypatch):
    """Seen on a small tmpfs: what Orbax raises then is a ValueError of TensorStore's."""

    def full(*arguments, **options):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device\nat 17")

    with monkeypatch.context() as patch:
        patch.setattr("orbax.checkpoint.CheckpointManager.save", full)
        with pytest.raises(WriteError, match=r"cannot be written: RES.*are intact") as caught:
            train.train_and_evaluate(tiny.config(data_dir), tmp_path)
    assert "\n" not in str(caught.value)
