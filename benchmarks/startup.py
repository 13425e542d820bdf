"""From the start of a process to its first training step: cold and warm, and where the time goes.

    python -m benchmarks.startup                    # cnn; on a GPU VGG16-BN too; some minutes
    python -m benchmarks.startup --networks vgg16_bn --rounds 3

Each round starts `--mode=train` anew, once with an empty compilation cache, once with what that
left there, and ends it after its first step. The images are made up, in the form of CIFAR-10 for
VGG16-BN and of Fashion-MNIST for the cnn, and prepared beforehand. Parts follow each other; the
table has medians and the least and most over rounds. The ratio is of the first step: tracing,
compiling or loading, and running it.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CONFIGS = {"cnn": "quickstart", "vgg16_bn": "cifar10"}
DATASETS = {"cnn": "fashion_mnist", "vgg16_bn": "cifar10"}
_MARK = "startup: "


def child(arguments: list[str]) -> None:
    """Does what the command line says, notes when what began and ended, and ends."""
    began = _process_start()
    parts: dict[str, float] = {"starting Python": time.time() - began}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            start = time.time()
            try:
                return function(*args, **options)
            finally:
                parts[name] = parts.get(name, 0.0) + time.time() - start

        return wrapped

    def imported(label: str, *modules: str) -> None:
        start = time.time()
        for module in modules:
            __import__(module)
        parts[f"importing {label}"] = time.time() - start

    # What sync_jax.main imports, in the order in which it is needed first.
    imported("JAX", "jax", "jax.numpy")
    imported("Flax and Optax", "flax.linen", "optax")
    imported("TFDS and Grain", "tensorflow_datasets", "grain")
    imported("Orbax", "orbax.checkpoint")
    imported("SciPy", "scipy.special", "scipy.io")
    imported("Rich and TensorBoardX", "rich.progress", "tensorboardX")
    imported("the rest of sync_jax", "sync_jax.main", "sync_jax.train")

    import jax
    from absl import app

    from sync_jax import main, train
    from sync_jax.runtime import sharding
    from sync_jax.runtime.checkpoint import Checkpoints
    from sync_jax.runtime.memory import keep_freed_memory
    from sync_jax.trainer import Trainer

    keep_freed_memory()
    sharding.check_devices = timed("finding devices", sharding.check_devices)
    train.load_data = timed("reading the data", train.load_data)
    Trainer.__init__ = timed("building the trainer", Trainer.__init__)  # type: ignore[method-assign]
    Checkpoints.__init__ = timed(  # type: ignore[method-assign]
        "opening the checkpoints", Checkpoints.__init__
    )
    Trainer.create_state = timed("initial state", Trainer.create_state)  # type: ignore[method-assign]
    feed = Trainer.feed

    def first(*args: Any) -> Any:
        data = feed(*args)
        get = timed("images to the device", lambda: next(data))
        yield get()
        yield from data

    Trainer.feed = first  # type: ignore[method-assign]
    step = Trainer.step

    def first_step(*args: Any, **options: Any) -> Any:
        compiling: dict[str, float] = {}

        def note(event: str, seconds: float, **_: Any) -> None:
            compiling[event] = compiling.get(event, 0.0) + seconds

        jax.monitoring.register_event_duration_secs_listener(note)
        start = time.time()
        jax.block_until_ready(step(*args, **options))
        taken = time.time() - start
        backend = compiling.get("/jax/core/compile/backend_compile_duration", 0.0)
        lowered = compiling.get("/jax/core/compile/jaxpr_to_mlir_module_duration", 0.0)
        parts["first step: XLA, or loading"] = backend
        parts["first step: to StableHLO"] = lowered
        parts["first step: tracing and running"] = taken - backend - lowered
        total = time.time() - began
        parts["everything else"] = total - sum(parts.values())
        print(_MARK + json.dumps({"parts": parts, "first": taken, "total": total}), flush=True)
        os._exit(0)

    Trainer.step = first_step  # type: ignore[method-assign]
    sys.argv = ["main.py", *arguments]
    app.run(main.main, flags_parser=main.parse_flags)


def _process_start() -> float:
    import psutil

    return psutil.Process().create_time()


def measure(network: str, rounds: int, more: list[str]) -> None:
    """Prints one network's table."""
    from benchmarks import made_up  # not above: a child's imports are measured

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made_up.prepare(DATASETS[network], folder / "data")
        found: dict[str, list[dict[str, Any]]] = {"cold": [], "warm": []}
        for _ in range(rounds):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for state, results in found.items():
                shutil.rmtree(folder / "run", ignore_errors=True)
                command = [
                    *(sys.executable, "-m", "benchmarks.startup", "--child"),
                    f"--config=configs/{CONFIGS[network]}.py",
                    f"--config.model.name={network}",
                    f"--config.data.data_dir={folder / 'data'}",
                    f"--config.process.compilation_cache={folder / 'cache'}",
                    f"--workdir={folder / 'run'}",
                    *more,
                ]
                environment = {
                    k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"
                }
                done = subprocess.run(
                    command, check=True, capture_output=True, text=True, env=environment
                )
                line = next(x for x in done.stdout.splitlines() if x.startswith(_MARK))
                results.append(json.loads(line.removeprefix(_MARK)))
                print(f"  {network} {state}: first step {results[-1]['first']:.2f} s", flush=True)
    print(f"\n{network}: seconds, median (least to most) of {rounds} rounds")
    names = list(found["cold"][0]["parts"])
    for name in [*names, "first", "total"]:
        cells = []
        for state in ("cold", "warm"):
            values = [x["parts"].get(name, x.get(name)) for x in found[state]]
            cells.append(
                f"{statistics.median(values):7.2f} ({min(values):.2f} to {max(values):.2f})"
            )
        label = {"first": "first step", "total": "start to first step"}.get(name, name)
        print(f"  {label:34}" + "".join(f"{x:>28}" for x in cells))
    pairs = zip(found["warm"], found["cold"], strict=True)
    ratios = sorted(warm["first"] / cold["first"] for warm, cold in pairs)
    print(
        f"  10  first step, warm / cold: {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )


def main() -> None:
    """Prints the tables."""
    if "--child" in sys.argv:
        child([x for x in sys.argv[1:] if x != "--child"])
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=CONFIGS, default=["cnn"])
    parser.add_argument("--rounds", type=int, default=3)
    arguments, more = parser.parse_known_args()
    from benchmarks.step import describe_machine

    print(describe_machine())
    for network in arguments.networks:
        measure(network, arguments.rounds, more)


if __name__ == "__main__":
    main()
