"""Several seeds in one job, beside as many single runs: from the command to the last report.

    python -m benchmarks.seeds --clock cpu                       # 4 seeds of the cnn; minutes
    python -m benchmarks.seeds --network vgg16_bn --seeds 8 --epochs 20       # on a GPU

The job is `--mode=sweep --vary=seed=0,1,...`, its table included; a single run is a process of its
own. Both take turns, in either order, on made-up images, and all find their compiled programs where
a run before the first round has left them. The table has the median ratio of a round, and the least
and the most.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import made_up
from benchmarks.startup import CONFIGS, DATASETS
from benchmarks.step import describe_machine


def processor_time() -> float:
    """Seconds that processes which have ended took of all cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.monotonic, "cpu": processor_time}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=CONFIGS, default="cnn")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epochs", type=float, default=1.0, help="of each run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments, more = parser.parse_known_args()
    clock, seeds = CLOCKS[arguments.clock], range(arguments.seeds)
    print(describe_machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        made_up.prepare(DATASETS[arguments.network], folder / "data")

        def run(workdir: str, *options: str) -> None:
            command = [
                *(sys.executable, "-m", "sync_jax.main"),
                f"--config=configs/{CONFIGS[arguments.network]}.py",
                f"--config.model.name={arguments.network}",
                f"--config.data.data_dir={folder / 'data'}",
                f"--config.train.epochs={arguments.epochs}",
                f"--config.optimizer.warmup_epochs={arguments.epochs / 5}",
                f"--config.process.compilation_cache={folder / 'cache'}",
                f"--workdir={folder / 'runs' / workdir}",
            ]
            environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
            subprocess.run(
                [*command, *options, *more], check=True, stdout=subprocess.DEVNULL, env=environment
            )

        def job() -> None:
            run("job", "--mode=sweep", f"--vary=seed={','.join(map(str, seeds))}")

        def singles() -> None:
            for seed in seeds:
                run(f"seed{seed}", f"--config.seed={seed}")

        run("first")
        ratios = []
        for i in range(arguments.rounds):
            shutil.rmtree(folder / "runs")
            taken = {}
            for what in (job, singles) if i % 2 else (singles, job):
                began = clock()
                what()
                taken[what] = clock() - began
            ratios.append(taken[job] / taken[singles])
            print(f"  one job {taken[job]:.1f} s, singly {taken[singles]:.1f} s", flush=True)
    low, median, high = min(ratios), statistics.median(ratios), max(ratios)
    print(
        f"  9  {len(seeds)} seeds of {arguments.network}, {arguments.epochs:g} epochs: one job / "
        f"singly, {arguments.clock} time: {median:.3f} ({low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()
