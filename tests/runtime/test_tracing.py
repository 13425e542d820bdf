import gzip
import json

import jax
import pytest

from sync_jax import train
from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.progress import read_metrics
from sync_jax.runtime.tracing import Trace, parse_steps
from tests import tiny


def test_steps_are_counted_from_one():
    assert list(parse_steps("3-5")) == [3, 4, 5]
    assert list(parse_steps("7")) == [7]
    assert list(parse_steps("")) == []
    with pytest.raises(InputError, match=r"config\.profile\.steps='5-3'"):
        parse_steps("5-3")


@pytest.mark.slow
def test_a_trace_holds_its_steps_and_no_others(tmp_path, monkeypatch, capsys):
    mesh = sharding.make_mesh(jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", lambda: mesh)
    config = tiny.config(tiny.prepare(tmp_path), profile__steps="4-6")
    train.train_and_evaluate(config, tmp_path / "run")
    (path,) = (tmp_path / "run" / "profile" / "plugins" / "profile").glob("*/*.trace.json.gz")
    assert list(path.parent.glob("*.xplane.pb"))  # what TensorBoard's plugin reads
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    assert sorted(map(int, steps)) == [4, 5, 6]
    # What XLA executed: the convolutions of the step's module, which took some time.
    computed = [e for e in events if e.get("args", {}).get("hlo_module") == "jit_steps"]
    assert len({e["name"] for e in computed}) > 10
    assert sum(e["dur"] for e in computed) > 0
    assert "profile of steps 4 to 6: tensorboard --logdir=" in capsys.readouterr().out
    assert max(entry["step"] for entry in read_metrics(tmp_path / "run")) == 18


def test_a_trace_that_cannot_be_written_costs_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)

    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", full)
    lines: list[str] = []
    with Trace(range(2, 3), tmp_path, lines.append) as trace, trace.step(2, 2):
        pass
    assert lines == ["no profile: [Errno 28] No space left on device"]


def test_steps_of_one_dispatch_are_traced_together(tmp_path, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    with Trace(range(5, 8), tmp_path, lambda line: None) as trace:
        for first, last in ((1, 4), (5, 8), (9, 12)):
            with trace.step(first, last):
                calls.append(f"{first}")
            trace.done(last, ())
    assert calls == ["1", "start", "5", "stop", "9"]
