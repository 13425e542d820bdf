"""The same training on one device, on eight, and on two processes of two devices each."""

import gzip
import json
import os
import shutil
from pathlib import Path

import jax
import pytest

from sync_jax import train
from sync_jax.runtime import sharding
from tests import processes, tiny
from tests.curves import check_close

MAKE_MESH = sharding.make_mesh


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.prepare(tmp_path_factory.mktemp("tiny"))


def cut_short(finished: Path, copy: Path) -> None:
    """The run as it was after its first checkpoint."""
    shutil.copytree(finished, copy)
    for path in (copy / "report.json", *copy.glob("predictions_*.npz")):
        path.unlink()
    for step in ("12", "18"):
        shutil.rmtree(copy / "checkpoints" / step)


def check_trace(profile: Path) -> None:
    """Steps 4 and 5, and no others, with what XLA executed in them."""
    (path,) = profile.glob("plugins/profile/*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))  # what TensorBoard's plugin reads
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(map(int, steps)) == [4, 5]
    computed = [e for e in events if "hlo_module" in e.get("args", {})]
    assert len({e["name"] for e in computed}) > 10
    assert sum(e["dur"] for e in computed) > 0


@pytest.mark.slow
def test_one_device_eight_and_two_processes_train_alike(data_dir, tmp_path, monkeypatch, capsys):
    """With BatchNorm, batches that straddle epochs, and a last batch of 40 examples by 16.

    Several devices divide the optimizer's state between them. The run that goes on with eight has
    CCL-SC's queues, and batches from the host.
    """

    def train_on(devices: int, method: str, name: str, **changes: object) -> Path:
        mesh = MAKE_MESH(jax.devices()[:devices])
        monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
        changes |= {"optimizer__sharded": devices > 1}
        train.train_and_evaluate(tiny.config(data_dir, method=method, **changes), tmp_path / name)
        return tmp_path / name

    sync = train_on(1, "sync", "sync")
    host = {"data__placement": "host"}
    queues = train_on(1, "ccl_sc", "ccl_sc", **host)
    two = tmp_path / "two"
    options = ("--config.method=sync", "--config.optimizer.sharded=True")
    children = processes.start(
        [tiny.command(data_dir, two, *options)] * 2, devices=2, XLA_FLAGS=os.environ["XLA_FLAGS"]
    )
    printed = processes.finish(children, timeout=1800)
    assert [child.returncode for child in children] == [0, 0], printed
    described = printed[0].index("4 CPU devices of 2 processes")
    # Devices were connected before: in the first step, for which each compiles, Gloo waits 30 s.
    assert "[Gloo]" in printed[0][:described]
    assert "[Gloo]" not in printed[0][described:]
    check_close(sync, two)
    # What one device saved, eight go on with; and one device with what two processes saved.
    for name, saved, whole, devices, changes in (
        ("8", queues, queues, 8, host),
        ("1", two, sync, 1, {}),
    ):
        cut_short(saved, tmp_path / name)
        capsys.readouterr()
        check_close(whole, train_on(devices, whole.name, name, **changes))
        assert "resuming at step 6 of 18" in capsys.readouterr().out
    # Negative control: another seed's curve is not close. And what is traced trains all the same.
    seed1 = train_on(1, "sync", "seed1", seed=1, profile__steps="4-5")
    with pytest.raises(AssertionError):
        check_close(sync, seed1)
    check_trace(seed1 / "profile")
    assert "profile of steps 4 to 5: tensorboard --logdir=" in capsys.readouterr().out


def test_a_sharded_optimiser_takes_a_part_of_the_memory(data_dir, tmp_path):
    states = []
    for sharded in (False, True):
        config = tiny.config(data_dir, method="ce", optimizer__sharded=sharded)
        run = tiny.trainer(config, MAKE_MESH())
        states.append(run.create_state()[0])
    momentum = [max(jax.tree.leaves(state.opt_state), key=lambda x: x.size) for state in states]
    assert momentum[0].size > 1024
    rows = [x.addressable_shards[0].data.size for x in momentum]
    assert rows == [momentum[0].size, momentum[0].size // 8]
