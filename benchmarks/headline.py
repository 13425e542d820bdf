"""A full 300-epoch VGG16-BN SYNC run on 60,000 images of 32 pixels, and a fast one: minutes.

    python -m benchmarks.headline                       # one GPU, within ten minutes, no network
    python -m benchmarks.headline --data-dir=FOLDER     # CIFAR-10 that is prepared there
    python -m benchmarks.headline --quick               # a CPU: does it run?
    python -m benchmarks.headline --only fast --set train.batch_size=1024 --set train.epochs=20

Runs configs/cifar10_fast.py and then configs/cifar10.py in bfloat16, by the trainer from its start
to its report: checkpoints, calibration and evaluation included. Where no CIFAR-10 is prepared the
images are made up, and their accuracy says nothing but that something was learnt. Where --minutes
are too few for 300 epochs, as many are run as fit, and the table says what 300 would take at that
rate. The bound is the arithmetic of all epochs at the rate of the device's matrix products.
"""

import argparse
import dataclasses
import runpy
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import made_up
from benchmarks.step import describe_machine
from sync_jax import train
from sync_jax.data.datasets.cifar import Cifar10
from sync_jax.evaluation.report import read_report
from sync_jax.runtime import compilation_cache
from sync_jax.runtime.memory import keep_freed_memory
from sync_jax.sweep import combinations
from sync_jax.trainer import resolve

RUNS = {"fast": "configs/cifar10_fast.py", "full": "configs/cifar10.py"}
_AFTERWARDS = 45.0  # seconds that a run may take beside its epochs: compilation, evaluation
TRAIN, HELD_OUT, TEST = 60_000, 5_000, 10_000


def make_up(folder: Path, share: float) -> None:
    """Prepares images in CIFAR-10's form, and says so in its description."""
    info = Cifar10.INFO
    train_size, test = round((TRAIN + HELD_OUT) * share), round(TEST * share)
    Cifar10.INFO = dataclasses.replace(info, num_train=train_size, num_test=test)
    made_up.prepare("cifar10", folder, train=train_size, test=test)


def configure(name: str, data_dir: Path, arguments: argparse.Namespace) -> Any:
    """The config of a run."""
    config = runpy.run_path(RUNS[name])["get_config"]()
    config.data.data_dir = str(data_dir)
    config.model.dtype = "bfloat16"
    if arguments.quick:
        config.model.dtype, config.model.width, config.model.features = "float32", 4, 16
        config.train.batch_size, config.train.epochs = 32, 2.0
        config.data.calibration_size, config.evaluation.batch_size = 64, 64
        config.optimizer.warmup_epochs = 0.5
    resolve(config)
    if arguments.set:
        [(_, config)] = combinations(config, arguments.set, name=name)
    return config


def run(name: str, config: Any, folder: Path) -> dict[str, Any]:
    """Trains and evaluates; seconds from beginning to end, and the report."""
    resolve(config)
    began = time.perf_counter()
    train.train_and_evaluate(config, folder / name)
    seconds = time.perf_counter() - began
    report = read_report(folder / name)
    assert report is not None
    return {"seconds": seconds, "epochs": config.train.epochs, "report": report}


def show(name: str, result: dict[str, Any], asked: float, made: bool) -> None:
    """Prints a run's figures."""
    report, epochs = result["report"], result["epochs"]
    speed, test = report["training"]["speed"], report["test"]
    per_epoch = speed["steps"] * report["config"]["train"]["batch_size"] / epochs
    bound = asked * per_epoch * speed["flops_per_image"] / speed["matmul_flops_per_second"]
    score = report["scores"]["softmax_response"]
    at_80 = next(x for x in score["rank_based"] if abs(x["coverage"] - 0.8) < 1e-9)
    print(f"\n{name}: {epochs:g} epochs of {per_epoch:,.0f} images in {result['seconds']:.1f} s")
    print(f"  from the trainer's start to its report; of it the loop {_loop(report):.1f} s")
    if epochs < asked:
        rest = (asked - epochs) * speed["seconds_per_epoch"]
        print(
            f"  {asked:g} epochs, extrapolated by seconds per epoch: "
            f"{(result['seconds'] + rest) / 60:.2f} minutes"
        )
    print(f"  arithmetic bound of {asked:g} epochs: {bound:.1f} s")
    print(
        f"  {speed['images_per_second']:,.0f} images/s, {speed['seconds_per_epoch']:.3f} s an "
        f"epoch, {100 * speed['share_of_matmul']:.1f} % of the device's matrix products"
    )
    print("  shares: " + ", ".join(f"{k} {100 * v:.1f} %" for k, v in speed["shares"].items()))
    print(
        f"  test accuracy {100 * test['accuracy']:.2f} %, selective error at 80 % coverage "
        f"{100 * at_80['selective_risk']:.2f} %, AURC x1000 {1000 * score['aurc']['mean']:.2f}"
        f"{' (made-up images)' if made else ''}"
    )


def _loop(report: dict[str, Any]) -> float:
    speed = report["training"]["speed"]
    return speed["seconds_per_epoch"] * report["config"]["train"]["epochs"]


def main() -> None:
    """Prints the tables."""
    began = time.perf_counter()
    keep_freed_memory()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data-dir", default="", help="of a prepared CIFAR-10")
    parser.add_argument("--minutes", type=float, default=9.0, help="that all may take")
    parser.add_argument("--only", choices=RUNS, default=None)
    parser.add_argument("--set", action="append", default=[], help="a field, as seed=1")
    parser.add_argument("--quick", action="store_true", help="narrow, few images, two epochs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        compilation_cache.use(str(folder / "cache"))
        data_dir = Path(arguments.data_dir).expanduser() if arguments.data_dir else folder / "data"
        made = not made_up.dataset("cifar10", data_dir).is_prepared()
        if made:
            make_up(data_dir, 0.01 if arguments.quick else 1.0)
        results = {}
        for name in RUNS if arguments.only is None else [arguments.only]:
            config = configure(name, data_dir, arguments)
            asked = config.train.epochs
            if results and not arguments.quick:
                # At the other run's rate; a smaller batch is slower.
                per_epoch = (
                    1.5 * results["fast"][0]["report"]["training"]["speed"]["seconds_per_epoch"]
                )
                left = 60 * arguments.minutes - (time.perf_counter() - began) - _AFTERWARDS
                config.train.epochs = float(max(min(asked, int(left / per_epoch)), 1))
            results[name] = run(name, config, folder), asked
    print(f"\n{describe_machine()}")
    for name, (result, asked) in results.items():
        show(name, result, asked, made)
    print(f"\nall, from the script's start: {(time.perf_counter() - began) / 60:.2f} minutes")


if __name__ == "__main__":
    main()
