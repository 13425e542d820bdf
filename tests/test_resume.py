"""Runs that are killed, in real processes, end as undisturbed ones do, bit for bit."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from sync_jax import steps, train
from sync_jax.data import registry
from sync_jax.data.loading import load_data
from sync_jax.data.placement import Placement
from sync_jax.errors import InputError, NonFiniteError
from sync_jax.evaluation.record import Predictions
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import Checkpoints
from sync_jax.runtime.processes import Processes
from sync_jax.runtime.training_log import NonFiniteSteps
from sync_jax.steps import TrainState
from tests import faulty, processes, tiny
from tests.curves import check_close, curve

pytestmark = pytest.mark.slow

MAKE_MESH = sharding.make_mesh
METHOD = "self_adaptive"  # its table of targets is part of the state, as ccl_sc's queues are
TOTAL = 18  # steps; a checkpoint after every sixth, so that most kills cost some
FILE = "nonfinite.jsonl"
NONE, NAN = "none:never:0", "nan:step:9"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def live(data_dir: Path, workdir: Path, *harms: str, placement: str = "device") -> list[str]:
    """One life of a job, a process for each harm: what they printed.

    A process that is killed must have been, and takes the job with it; of others the status is 75
    if one of them is asked to stop, 1 if the disk is full, and else 0.
    """
    options = {"method": METHOD, "data.placement": placement, "train.on_nonfinite": "skip"}
    flags = [f"--config.{name}={value}" for name, value in options.items()]
    arguments = tiny.command(data_dir, workdir, *flags)[3:]
    children = processes.start(
        [[sys.executable, "-m", "tests.faulty", harm, *arguments] for harm in harms],
        devices=1,
        XLA_FLAGS=os.environ["XLA_FLAGS"] if len(harms) > 1 else "",  # once as users have it
    )
    killed = [child for child, harm in zip(children, harms, strict=True) if "kill" in harm]
    for child in killed:
        assert child.wait(900) == -signal.SIGKILL
    if killed:
        for child in children:
            child.kill()
    printed = processes.finish(children)
    if not killed:
        status = 75 if any("term" in harm for harm in harms) else int("full:disk:0" in harms)
        assert [child.returncode for child in children] == [status] * len(harms), printed
    assert (workdir / "report.json").exists() == (set(harms) <= {NONE, NAN})
    return printed


def final_state(config: ConfigDict, workdir: Path) -> TrainState:
    mesh = MAKE_MESH(jax.devices()[:1])
    like = tiny.trainer(config, mesh).state_like
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


def cut_power(workdir: Path) -> None:
    """What was not on the disk yet is zeros: the latest checkpoint's arrays, the end of the log."""
    steps = [int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    latest = workdir / "checkpoints" / str(max(steps))
    for path in (path for path in (latest / "state").rglob("*") if path.is_file()):
        path.write_bytes(bytes(path.stat().st_size))
    log = workdir / "metrics.jsonl"
    *lines, last = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines) + last[:20] + bytes(len(last) - 20))


def test_one_process_killed_anywhere_ends_with_the_same_bits(data_dir, tmp_path):
    """While it reads data, saves, evaluates, trains and writes its report; or the disk is full.

    Of a failed write and of damage one line is printed, and a log has the rest.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    live(data_dir, whole, NONE)
    (printed,) = live(data_dir, broken, "term:data:0")
    assert "no training under way; the same command goes on" in printed
    (printed,) = live(data_dir, broken, "full:disk:0")
    line = rf"\nsync_jax: {broken}/checkpoints cannot be written: .*; {broken}/orbax.log has more\n"
    assert re.search(line + "$", printed)
    assert "Traceback" not in printed
    assert "Traceback" in (broken / "orbax.log").read_text()
    live(data_dir, broken, "kill:saving:1")
    (half,) = (broken / "checkpoints").glob("*.orbax-checkpoint-tmp*")
    (printed,) = live(data_dir, broken, "kill:evaluating:1")
    assert f"{half} was half written when its process ended, and is removed" in printed
    (printed,) = live(data_dir, broken, f"term:step:{TOTAL - 5}")
    assert f"saved at step {TOTAL - 5}; the same command goes on" in printed
    live(data_dir, broken, "kill:predictions:2")
    cut_power(broken)
    (printed,) = live(data_dir, broken, NONE)
    assert "is put aside as" in printed
    assert "Traceback" not in printed
    assert f"resuming at step {TOTAL - 5} of {TOTAL}" in printed
    check_the_same(whole, broken, tiny.config(data_dir, method=METHOD))


def test_two_processes_that_are_stopped_end_with_the_same_bits(data_dir, tmp_path):
    """One of two is asked to stop and both do, at the same step; then the power fails.

    Of the ninth step's batch a pixel is NaN, and all skip it.
    """
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert "skipped; 9 skips left" in live(data_dir, whole, NAN, NAN)[0]
    printed = live(data_dir, broken, NAN, f"{NAN},term:step:13")
    saved = {text.partition("saved at step ")[2].partition(";")[0] for text in printed}
    assert len(saved) == 1, printed
    assert 13 <= int(saved.pop()) <= TOTAL - 1
    cut_power(broken)
    printed = live(data_dir, broken, NAN, NAN)
    assert "is put aside as" in printed[0]
    assert "resuming at step 12" in printed[0]
    assert [(e["step"], e["action"]) for e in noted(broken)] == [(9, "skip")]
    assert noted(whole) == noted(broken)
    check_the_same(whole, broken, tiny.config(data_dir, method=METHOD))


@pytest.mark.usefixtures("alone")
def test_two_processes_that_decode_their_own_shares_are_killed_while_saving(data_dir, tmp_path):
    """From the host pipeline, each its own half of a batch."""
    whole, broken, single = (tmp_path / name for name in ("whole", "broken", "single"))
    live(data_dir, whole, NONE, NONE, placement="host")
    live(data_dir, broken, "kill:saving:2", NONE, placement="host")
    assert "resuming at step 6" in live(data_dir, broken, NONE, NONE, placement="host")[0]
    config = tiny.config(data_dir, method=METHOD)
    check_the_same(whole, broken, config)
    # And a single process that has them on its device sees the same examples, augmented alike.
    train.train_and_evaluate(config, single)
    check_close(whole, single)


# --- Steps that are not finite --------------------------------------------------------------------


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device, and whatever `faulty.spoil` changes is changed back."""
    monkeypatch.setattr(sharding, "make_mesh", lambda: MAKE_MESH(jax.devices()[:1]))
    monkeypatch.setattr(steps, "train_step", steps.train_step)


def noted(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / FILE).read_text().splitlines()]


@pytest.mark.usefixtures("alone")
def test_a_bad_step_stops_the_run_and_is_noted(data_dir, tmp_path):
    faulty.spoil(9, 14)
    config = tiny.config(data_dir, train__on_nonfinite="stop")
    with pytest.raises(NonFiniteError, match=r"^step 9: .*selective_risk=nan.*examples are in"):
        train.train_and_evaluate(config, tmp_path)
    (entry,) = noted(tmp_path)
    assert (entry["step"], entry["action"]) == (9, "stop")
    assert {"loss", "selective_risk", "gradient_norm"} <= entry["bad"].keys()
    # The examples, found otherwise: by their order on the host.
    _, part, _ = load_data(
        config, registry.dataset(config.data), sharding.make_mesh(), tmp_path, Processes()
    )
    config = tiny.config(data_dir, data__placement="host")
    host = tiny.trainer(config, sharding.make_mesh(), Placement("host"))
    batch = next(host.feed(part, 8))
    np.testing.assert_array_equal(entry["indices"], part.index[np.asarray(batch["index"])])
    # The latest checkpoint is from before, and everything in it is finite.
    with Checkpoints(tmp_path / "checkpoints", keep=3) as checkpoints:
        restored = checkpoints.restore(host.state_like)
    assert restored.step == 6
    chex.assert_tree_all_finite(restored.state)


@pytest.mark.usefixtures("alone")
def test_steps_are_skipped_within_a_budget(data_dir, tmp_path, capsys):
    faulty.spoil(9, 14)
    changes = {"train__on_nonfinite": "skip", "train__nonfinite_budget": 1}
    config = tiny.config(data_dir, **changes)
    with pytest.raises(NonFiniteError, match=r"^step 14: .*nonfinite_budget=1 is spent"):
        train.train_and_evaluate(config, tmp_path)
    assert "step 9: " in (shown := capsys.readouterr().out)
    assert "skipped; 0 skips left in the budget" in shown
    assert [e["action"] for e in noted(tmp_path)] == ["skip", "stop"]
    # With more of it the same command goes on, also where version 0.1 has noted a rollback.
    notes = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(notes.replace('"skip"', '"rollback"', 1))
    config = tiny.config(data_dir, **changes | {"train__nonfinite_budget": 2})
    train.train_and_evaluate(config, tmp_path)
    assert [(e["step"], e["action"]) for e in noted(tmp_path)] == [(9, "rollback"), (14, "skip")]
    # The steps changed nothing but their count: the same as with those batches left out.
    chex.assert_tree_all_finite(final_state(config, tmp_path))
    assert [e["step"] for e in curve(tmp_path) if e["part"] == "train"] == [4, 8, 12, 16, 18]


def test_notes_that_are_damaged_are_refused(tmp_path):
    (tmp_path / FILE).write_text('{"step": "3", "action": "skip"}\n')
    with pytest.raises(InputError, match=rf"{FILE} is damaged .*move it away"):
        NonFiniteSteps(
            tmp_path, quickstart.get_config(), start_step=0, indices=np.arange,
            processes=Processes(),
        )  # fmt: skip
