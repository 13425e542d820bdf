"""Runs that are killed, in real processes, end as those that were left alone: bit for bit."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sync_jax import train
from sync_jax import trainer as run
from sync_jax.data import registry
from sync_jax.data.loading import load_data
from sync_jax.data.placement import Placement
from sync_jax.errors import NonFiniteError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.nonfinite import FILE
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.progress import Progress
from sync_jax.steps import TrainState
from sync_jax.trainer import Run
from tests import faulty, processes, tiny
from tests.curves import check_close, curve

pytestmark = pytest.mark.slow

MAKE_MESH = sharding.make_mesh
METHOD = "self_adaptive"  # its table of targets is part of the state, as ccl_sc's queues are
TOTAL = 18  # steps; a checkpoint after every sixth, so that most kills cost some
OPTIONS = {"process.wait_seconds": 600.0}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def command(data_dir: Path, workdir: Path, harm: str, method: str, placement: str) -> list[str]:
    options = [f"--config.{name}={value}" for name, value in OPTIONS.items()]
    options.append(f"--config.data.placement={placement}")
    if "nan" in harm:
        options.append("--config.train.on_nonfinite=rollback")
    _, _, _, *rest = tiny.command(data_dir, workdir, f"--config.method={method}", *options)
    return [sys.executable, "-m", "tests.faulty", harm, *rest]


def live(
    data_dir: Path,
    workdir: Path,
    *harms: str,
    devices: int = 1,
    method: str = METHOD,
    placement: str = "device",
) -> tuple[list[int], list[str]]:
    """One life of a job, a process for each harm: their exit statuses and what they printed."""
    children = processes.start(
        [command(data_dir, workdir, harm, method, placement) for harm in harms],
        devices=devices,
        # Once with the usual optimisations is enough; they take long.
        XLA_FLAGS="" if len(harms) == 1 and method == METHOD else os.environ["XLA_FLAGS"],
    )
    if any("kill" in harm for harm in harms):  # what kills one host takes the job with it
        killed = next(i for i, harm in enumerate(harms) if "kill" in harm)
        assert children[killed].wait(900) == -signal.SIGKILL
        for child in children:
            child.kill()
    printed = processes.finish(children)
    return [child.returncode for child in children], printed


def make_config(data_dir: Path, method: str) -> ConfigDict:
    """What fits their checkpoints."""
    changes = {name.replace(".", "__"): value for name, value in OPTIONS.items()}
    return tiny.config(data_dir, method=method, **changes)


def final_state(config: ConfigDict, workdir: Path) -> TrainState:
    mesh = MAKE_MESH(jax.devices()[:1])
    like = Run(config, mesh, train_size=tiny.NUM_TRAIN - tiny.NUM_CALIBRATION).state_like
    with Checkpoints(workdir / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(like)
    assert restored.step == TOTAL
    return restored.state


def check_the_same(whole: Path, broken: Path, config) -> None:
    """Bit-equal in all that a run leaves, but times and dates."""
    states = [final_state(config, workdir) for workdir in (whole, broken)]
    chex.assert_trees_all_equal(*states)
    assert curve(whole) == curve(broken)
    for name in ("predictions_calibration.npz", "predictions_test.npz"):
        predictions = [Predictions.load(workdir / name) for workdir in (whole, broken)]
        chex.assert_trees_all_equal(predictions[0].outputs, predictions[1].outputs)
    reports = [json.loads((workdir / "report.json").read_text()) for workdir in (whole, broken)]
    assert reports[0]["scores"] == reports[1]["scores"]
    # Negative control: the comparison would notice one bit.
    leaves, tree = jax.tree.flatten(states[0])
    for i, leaf in enumerate(leaves):
        if leaf.dtype == jnp.float32:
            spoilt = [*leaves]
            spoilt[i] = jnp.nextafter(leaf, jnp.inf)
            with pytest.raises(AssertionError):
                chex.assert_trees_all_equal(jax.tree.unflatten(tree, spoilt), states[1])


def random_steps(seed: int, count: int) -> list[int]:
    return sorted(random.Random(seed).sample(range(2, TOTAL), count))


def half_written(workdir: Path) -> list[Path]:
    """Checkpoints that a kill left incomplete, which the next life clears away."""
    return list((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def cut_power(workdir: Path) -> None:
    """What was not on the disk yet is zeros: the latest checkpoint's arrays, the end of the log."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    latest = workdir / "checkpoints" / str(max(steps))
    for path in (path for path in (latest / "state").rglob("*") if path.is_file()):
        path.write_bytes(bytes(path.stat().st_size))
    log = workdir / "metrics.jsonl"
    *lines, last = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines) + last[:20] + bytes(len(last) - 20))


@pytest.mark.parametrize("method", [METHOD, "ccl_sc"])
def test_one_process_killed_anywhere_ends_with_the_same_bits(method, data_dir, tmp_path):
    first, second = random_steps(0, 2)
    harms = [f"kill:step:{first}", f"kill:step:{second}"]
    if method == METHOD:
        # Before training, while a checkpoint is being written, while evaluating, by SIGTERM, and
        # when all is done but the report.
        harms = ["term:data:0", harms[0], "kill:saving:1", "kill:evaluating:1"]
        harms += [f"term:step:{TOTAL - 5}", "kill:predictions:2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert live(data_dir, whole, "none:never:0", method=method)[0] == [0]
    for harm in harms:
        status, printed = live(data_dir, broken, harm, method=method)
        if harm.startswith("kill"):
            assert status == [-signal.SIGKILL], printed
        else:
            assert status == [75], printed
            where = "no training under way" if "data" in harm else f"saved at step {TOTAL - 5}"
            assert f"{where}; the same command goes on" in printed[0]
        assert half_written(broken) or "saving" not in harm
        assert not (broken / "report.json").exists()
    if method == METHOD:
        cut_power(broken)
    status, printed = live(data_dir, broken, "none:never:0", method=method)
    assert status == [0], printed
    assert "resuming at step" in printed[0]
    assert ("is damaged and put aside" in printed[0]) == (method == METHOD), printed
    check_the_same(whole, broken, make_config(data_dir, method))


def test_two_processes_killed_anywhere_end_with_the_same_bits(data_dir, tmp_path):
    """Two processes of two devices; one is asked to stop and both do, at the same step.

    Of the ninth step's batch a pixel is NaN in each life, and all roll back before it.
    """
    (step,) = random_steps(5, 1)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    nan = "nan:step:9"
    unharmed = (nan, nan)
    status, printed = live(data_dir, whole, *unharmed, devices=2)
    assert status == [0, 0], printed
    assert "going back, to leave it out" in printed[0]
    live(data_dir, broken, nan, f"{nan},kill:step:{step}", devices=2)
    live(data_dir, broken, f"{nan},kill:saving:1", nan, devices=2)
    assert half_written(broken)
    _, printed = live(data_dir, broken, nan, f"{nan},kill:evaluating:1", devices=2)
    assert "was half written when its process ended, and is removed" in printed[0]
    status, printed = live(data_dir, broken, nan, f"{nan},term:step:13", devices=2)
    assert status == [75, 75], printed
    saved = {text.partition("saved at step ")[2].partition(";")[0] for text in printed}
    assert len(saved) == 1, printed
    assert 13 <= int(saved.pop()) <= TOTAL - 1
    live(data_dir, broken, f"{nan},kill:predictions:2", nan, devices=2)
    assert not (broken / "report.json").exists()
    cut_power(broken)
    status, printed = live(data_dir, broken, *unharmed, devices=2)
    assert status == [0, 0], printed
    assert "is damaged and put aside" in printed[0]
    assert "resuming at step" in printed[0]
    assert "Report: " in printed[0]
    assert not any(word in printed[1] for word in ("resuming", "Report: ")), "one speaks for all"
    assert [(e["step"], e["action"]) for e in noted(broken)] == [(9, "rollback")]
    assert noted(whole) == noted(broken)
    check_the_same(whole, broken, make_config(data_dir, METHOD))


def test_two_processes_that_decode_their_own_shares_are_killed_likewise(data_dir, tmp_path):
    """From the host pipeline, each its own half of a batch; with CCL-SC's queues and encoder."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    (step,) = random_steps(7, 1)
    options = {"devices": 2, "method": "ccl_sc", "placement": "host"}
    unharmed = ("none:never:0",) * 2
    status, printed = live(data_dir, whole, *unharmed, **options)
    assert status == [0, 0], printed
    # Asked to end before there is anything to save, each does by itself.
    term = ("term:data:0",) * 2
    assert live(data_dir, broken, *term, **options)[0] == [75, 75]
    live(data_dir, broken, f"kill:step:{step}", "none:never:0", **options)
    status, printed = live(data_dir, broken, *unharmed, **options)
    assert status == [0, 0], printed
    assert "resuming at step" in printed[0]
    check_the_same(whole, broken, make_config(data_dir, "ccl_sc"))
    # And a single process that has them on its device sees the same examples, augmented alike.
    alone = tmp_path / "alone"
    assert live(data_dir, alone, "none:never:0", method="ccl_sc")[0] == [0]
    check_close(whole, alone)


# --- Steps that are not finite --------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device, and whatever `faulty.spoil` changes is changed back."""
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))
    monkeypatch.setattr(run, "train_step", run.train_step)


def bad_config(data_dir: Path, action: str, **changes: object):
    return tiny.config(data_dir, method="sync", train__on_nonfinite=action, **changes)


def noted(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


@pytest.mark.usefixtures("alone")
def test_a_bad_step_stops_the_run_and_is_noted(data_dir, tmp_path):
    faulty.spoil(9)
    config = bad_config(data_dir, "stop")
    with pytest.raises(NonFiniteError, match=r"^step 9: .*selective_risk=nan.*examples are in"):
        train.train_and_evaluate(config, tmp_path)
    (entry,) = noted(tmp_path)
    assert (entry["step"], entry["action"]) == (9, "stop")
    assert {"loss", "selective_risk", "gradient_norm"} <= entry["bad"].keys()
    # The examples, found otherwise: by their order on the host.
    _, part, _ = load_data(
        config, registry.dataset(config.data), sharding.make_mesh(), tmp_path, Processes()
    )
    host = Run(tiny.config(data_dir, method="sync", data__placement="host"),
               sharding.make_mesh(), train_size=len(part.labels),
               placement=Placement("host"))  # fmt: skip
    batch = next(host.feed(part, 8))
    np.testing.assert_array_equal(entry["indices"], part.index[np.asarray(batch["index"])])
    # The latest checkpoint is from before, and everything in it is finite.
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(host.state_like)
    assert restored.step == 6
    chex.assert_tree_all_finite(restored.state)


@pytest.mark.usefixtures("alone")
def test_skipping_and_rolling_back_leave_the_same_steps_out(
    data_dir, tmp_path, monkeypatch, capsys
):
    faulty.spoil(9, 14)
    for action in ("skip", "rollback"):
        train.train_and_evaluate(bad_config(data_dir, action), tmp_path / action)
        assert [(e["step"], e["action"]) for e in noted(tmp_path / action)] == [
            (9, action), (14, action)
        ]  # fmt: skip
    shown = capsys.readouterr().out
    assert "step 9: " in shown
    assert "skipped; 9 more may be" in shown
    assert "going back, to leave it out; 8 more may follow" in shown
    assert "resuming at step 6 of 18" in shown

    # Killed between a rollback and its checkpoint, it still knows what to leave out.
    step = Progress.step

    def stop_at_seventeen(self, done):
        if done == 17:
            raise KeyboardInterrupt
        step(self, done)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop_at_seventeen)
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(bad_config(data_dir, "rollback"), tmp_path / "broken")
    train.train_and_evaluate(bad_config(data_dir, "rollback"), tmp_path / "broken")

    config = bad_config(data_dir, "skip")
    skipped, rolled, broken = (
        final_state(config, tmp_path / name) for name in ("skip", "rollback", "broken")
    )
    chex.assert_tree_all_finite(skipped)
    chex.assert_trees_all_equal(skipped, rolled)
    chex.assert_trees_all_equal(skipped, broken)
    assert curve(tmp_path / "skip") == curve(tmp_path / "rollback")
    assert curve(tmp_path / "skip") == curve(tmp_path / "broken")


@pytest.mark.usefixtures("alone")
def test_the_budget_of_bad_steps_can_be_spent(data_dir, tmp_path):
    faulty.spoil(3, 4, 5)
    config = bad_config(data_dir, "skip", train__nonfinite_budget=2)
    with pytest.raises(NonFiniteError, match=r"^step 5: .*nonfinite_budget=2 is spent"):
        train.train_and_evaluate(config, tmp_path)
    assert [e["action"] for e in noted(tmp_path)] == ["skip", "skip", "stop"]
    # More of it, and the same command goes on.
    config = bad_config(data_dir, "skip", train__nonfinite_budget=3)
    train.train_and_evaluate(config, tmp_path)
    assert [e["step"] for e in noted(tmp_path)] == [3, 4, 5]
    assert os.path.exists(tmp_path / "report.json")
