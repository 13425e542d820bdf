"""A training's speed: where the time goes, the share of the machine's arithmetic, and traces."""

import contextlib
import re
import resource
import sys
import threading
import time
import timeit
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sync_jax.errors import InputError
from sync_jax.runtime.console import one_line

_STAGE = "/jax/core/compile/"  # before JAX's name of a stage of compilation; they nest
PHASES = ("training", "data", "compiling", "evaluating", "saving")
_MOST = 1000  # steps of a trace: more make a file that is too large to be opened


class Stopwatch:
    """Seconds of a loop by phase. A context manager, which the loop runs in.

    It waits for no device. Training is the time that the other phases leave, known at the end.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Stands still until it is entered."""
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._clock, self._began = clock, clock()
        self._compiled: list[tuple[float, float]] = []  # intervals apart from each other, in order
        self._thread = threading.get_ident()

    @contextlib.contextmanager
    def spent(self, phase: str, *, busy: Callable[[], bool] | None = None) -> Iterator[None]:
        """Adds the time inside to a phase of `PHASES`, without compilation.

        If `busy` returns True at the end, the device had something to do, and it is training.
        """
        began, compiling = self._clock(), self.seconds["compiling"]
        try:
            yield
        finally:
            taken = self._clock() - began - (self.seconds["compiling"] - compiling)
            if busy is None or not busy():
                self.seconds[phase] += taken

    def _note(self, event: str, duration_secs: float, **_: Any) -> None:
        if not event.startswith(_STAGE) or threading.get_ident() != self._thread:
            return
        end = self._clock()
        start = max(end - duration_secs, self._began)
        # A stage that encloses others ends after them, and takes their place.
        while self._compiled and self._compiled[-1][0] >= start:
            inner = self._compiled.pop()
            self.seconds["compiling"] -= inner[1] - inner[0]
        self._compiled.append((start, end))
        self.seconds["compiling"] += end - start

    def __enter__(self) -> "Stopwatch":
        self._began = self._clock()
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)
        self.seconds["training"] = self._clock() - self._began - sum(self.seconds.values())


def speed(
    seconds: dict[str, float], *, steps: int, batch_size: int, train_size: int, flops: float,
    peak: float,
) -> dict[str, Any]:  # fmt: skip
    """Computes the entries on a training's speed in a report.

    From the seconds of `Stopwatch`, the steps in them, the FLOP for an image, and the FLOP/s of
    all devices. Images per second are those while training and waiting for data.
    """
    images, total = steps * batch_size, sum(seconds.values())
    rate = images / max(seconds["training"] + seconds["data"], 1e-9)
    return {
        "steps": steps,
        "images_per_second": rate,
        "seconds_per_epoch": total * train_size / images,
        "flops_per_image": flops,
        "matmul_flops_per_second": peak,
        "share_of_matmul": rate * flops / peak,
        "shares": {name: x / total for name, x in seconds.items()},
        "peak_host_bytes": peak_host_bytes(),
        "peak_device_bytes": peak_device_bytes(),
    }


def describe(speed: dict[str, Any]) -> str:
    """Three lines on a training's `speed`."""
    shares, device = speed["shares"], speed["peak_device_bytes"]
    names = {"data": "waiting for data"}
    parts = ", ".join(f"{names.get(x, x)} {100 * shares[x]:.1f} %" for x in PHASES)
    memory = "" if device is None else f"{device / 1e9:.2f} GB of a device, "
    return (
        f"Training: {speed['images_per_second']:,.0f} images/s, "
        f"{100 * speed['share_of_matmul']:.0f} % of the devices' matrix products "
        f"({speed['flops_per_image'] / 1e6:,.0f} MFLOP an image, "
        f"{speed['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s).\n"
        f"An epoch in all: {speed['seconds_per_epoch']:.3g} s; {parts}.\n"
        f"Peak memory: {memory}{speed['peak_host_bytes'] / 1e9:.2f} GB of the host."
    )


def training_flops(network: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOP for an image of a step: of all convolutions and dense layers of the plain network.

    Forward once and back twice, but for the first layer, whose input needs no gradient. A method's
    own second network, and microbatches' second forward pass, are not counted.
    """
    return 3 * sum(layers := layer_flops(network, image_shape)) - layers[0]


def layer_flops(network: nn.Module, image_shape: tuple[int, ...]) -> list[int]:
    """FLOP for an image going forward, of each layer with a kernel, in order."""
    layers: list[int] = []

    def count(forward: Any, arguments: Any, keywords: Any, context: Any) -> Any:
        result = forward(*arguments, **keywords)
        kernel = context.module.variables.get("params", {}).get("kernel")
        if kernel is not None and context.method_name == "__call__":
            layers.append(2 * result.size * (kernel.size // kernel.shape[-1]))
        return result

    def run(images: jax.Array) -> Any:
        with nn.intercept_methods(count):
            return network.init_with_output(jax.random.key(0), images, train=False)

    jax.eval_shape(run, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32))
    return layers


def matmul_flops(dtype: str) -> float:
    """FLOP/s of a large square matrix product on one device, measured in a fraction of a second."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    while True:
        try:
            return _matmul_flops(size, dtype)
        except jax.errors.JaxRuntimeError as error:  # the training has left no room for it
            if "RESOURCE_EXHAUSTED" not in str(error) or size <= 512:
                raise
            size //= 2


def _matmul_flops(size: int, dtype: str) -> float:
    a = jnp.ones((size, size), dtype)
    product = jax.jit(jnp.dot)
    times = timeit.repeat(lambda: jax.block_until_ready(product(a, a)), number=1, repeat=6)
    return 2 * size**3 / min(times)  # the first compiles


def peak_host_bytes() -> int:
    """The most memory that this process has had, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_device_bytes() -> int | None:
    """The most that any of this process' devices has held; None where they do not tell."""
    found = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [x["peak_bytes_in_use"] for x in found if "peak_bytes_in_use" in x]
    return max(peaks, default=None)


def parse_steps(text: str) -> range:
    """Reads '100-110', or '100', as steps counted from 1, and '' as none; InputError otherwise."""
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    steps = range(int(found[1]), int(found[2] or found[1]) + 1) if found else range(0)
    if text and not 1 <= steps.start < steps.stop <= steps.start + _MOST:
        raise InputError(
            f"config.profile.steps={text!r} must be steps of the run, as '100-110', from 1 and at "
            f"most {_MOST:,} of them"
        )
    return steps


class Trace(contextlib.ExitStack):
    """A trace of some steps, for TensorBoard's profile plugin or Perfetto. A context manager."""

    def __init__(self, steps: range, folder: Path, log: Callable[[str], None]):
        """Records nothing yet; the trace goes to plugins/profile/<time>/ in the folder."""
        super().__init__()
        self._steps, self._folder, self._log = steps, folder, log
        self._on = False
        self.callback(self._end)

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        """Context of a step's dispatch; begins the trace if it is time."""
        if number not in self._steps:
            return contextlib.nullcontext()
        if not self._on:
            jax.profiler.start_trace(self._folder)
            self._on = True
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def done(self, number: int, values: Any) -> None:
        """Ends the trace if this step was its last; waits for the step's values then."""
        if self._on and number == self._steps[-1]:
            jax.block_until_ready(values)
            self._end()

    def _end(self) -> None:
        if not self._on:
            return
        self._on = False
        first, last = self._steps[0], self._steps[-1]
        text = (
            f"profile of steps {first} to {last}: tensorboard --logdir={self._folder}, or its "
            ".trace.json.gz in ui.perfetto.dev"
        )
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError, ValueError) as error:  # a full disk costs no training
            text = f"no profile: {one_line(error)}"
        self._log(text)
