from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from sync_jax.errors import InputError
from sync_jax.runtime import profiling
from sync_jax.runtime.profiling import Trace, parse_steps
from tests import tiny


def compiled(clock, event, seconds, after):
    """A stage that ends `after` seconds from now, and whose length is `seconds`."""
    clock.now += after
    jax.monitoring.record_event_duration_secs(f"/jax/core/compile/{event}_duration", seconds)


def test_seconds_go_where_they_are_spent():
    clock = SimpleNamespace(now=100.0)  # moves only when it is told to
    with profiling.Stopwatch(lambda: clock.now) as watch:
        clock.now += 1  # training
        with watch.spent("data"):
            clock.now += 2
        with watch.spent("data", busy=lambda: True):
            clock.now += 4  # the device had something to do
        with watch.spent("evaluating"):
            clock.now += 8
            # Two traces and a lowering inside a trace, then XLA: 5 + 3 seconds, not 5 + 2 + 1 + 3.
            compiled(clock, "jaxpr_trace", 1, after=1)
            compiled(clock, "jaxpr_trace", 2, after=2)
            compiled(clock, "jaxpr_to_mlir_module", 5, after=2)
            compiled(clock, "backend_compile", 3, after=3)
        with watch.spent("saving"):
            clock.now += 16
        compiled(clock, "backend_compile", 32, after=32)
    clock.now += 1000
    compiled(clock, "backend_compile", 10, after=10)  # nobody listens
    expected = {"training": 5, "data": 2, "compiling": 40, "evaluating": 8, "saving": 16}
    assert watch.seconds == expected
    with profiling.Stopwatch() as watch:
        jax.jit(lambda x: jnp.sin(x) + 123.0)(jnp.ones(3))
    assert 0 < watch.seconds["compiling"] <= sum(watch.seconds.values())


def test_speed_is_arithmetic():
    seconds = {"training": 6.0, "data": 2.0, "compiling": 1.0, "evaluating": 0.5, "saving": 0.5}
    speed = profiling.speed(seconds, steps=10, batch_size=8, train_size=40, flops=3e6, peak=1e9)
    assert speed["images_per_second"] == 10.0  # 80 images in 8 seconds
    assert speed["seconds_per_epoch"] == 5.0  # two epochs in 10 seconds
    assert speed["share_of_matmul"] == 0.03
    assert speed["shares"] == {name: x / 10 for name, x in seconds.items()}
    assert 50e6 < speed["peak_host_bytes"] < 1e12  # JAX alone takes more than 50 MB
    shown = profiling.describe(speed)
    assert shown.startswith("Training: 10 images/s, 3 % of the devices' matrix products (3 MFLOP")
    assert "An epoch in all: 5 s; training 60.0 %, " in shown
    assert "waiting for data 20.0 %, compiling 10.0 %" in shown


class Network(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(4, (3, 3))(x)  # 8 x 8 places, 9 x 2 inputs, 4 outputs
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(10)(x.reshape(len(x), -1))  # 256 inputs


def test_flops_by_hand():
    convolution, dense = 2 * 64 * 18 * 4, 2 * 256 * 10
    assert profiling.layer_flops(Network(), (8, 8, 2)) == [convolution, dense]
    assert profiling.training_flops(Network(), (8, 8, 2)) == 2 * convolution + 3 * dense


def test_a_matrix_product_is_measured_and_made_smaller_where_it_has_no_room(monkeypatch):
    assert 1e8 < profiling.matmul_flops("float32") < 1e15
    sizes = []

    def product(size, dtype):
        sizes.append(size)
        if size > limit:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return 7.0

    monkeypatch.setattr(profiling, "_matmul_flops", product)
    limit = 600
    assert profiling.matmul_flops("float32") == 7.0
    assert sizes == [1024, 512]


def test_steps_are_counted_from_one_and_checked_with_the_config(tmp_path):
    for text, steps in {"3-5": [3, 4, 5], "7": [7], "": []}.items():
        assert list(parse_steps(text)) == steps
    for text in ("5-3", "0", "1-1001", "all"):
        with pytest.raises(InputError, match=rf"config\.profile\.steps='{text}' must be steps"):
            tiny.config(tmp_path, profile__steps=text)


def test_a_full_disk_costs_the_trace_and_no_training(tmp_path, monkeypatch):
    calls: list[str] = []

    def stop():
        calls.append("stop")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    with Trace(range(5, 7), tmp_path, calls.append) as trace:
        for step in (4, 5, 6, 7):
            with trace.step(step):
                calls.append(f"{step}")
            trace.done(step, ())
    line = "no profile: [Errno 28] No space left on device"
    assert calls == ["4", "start", "5", "6", "stop", line, "7"]
