"""Several training steps in one dispatch beside one: images per second, and whether bits differ.

    python -m benchmarks.dispatch --clock cpu               # the cnn; on a GPU VGG16-BN too
    python -m benchmarks.dispatch --networks vgg16_bn --together 1 4 8 16 32

Each case is `Run.step` as the trainer calls it: as many dispatches as steps, or fewer of several,
one after the other, and one wait at the end. All take turns in one process; ratios are of
neighbours within a round, with the median and the tenth and ninetieth percentile over rounds. On a
CPU the steps are unrolled, on an accelerator they are a loop. Bits are compared after as many steps
from the same state.
"""

import argparse
import runpy
from typing import Any

import jax
import numpy as np

from benchmarks.step import CLOCKS, Step, describe_machine, row, take_turns
from benchmarks.trainer import Trainer
from sync_jax.runtime.memory import keep_freed_memory

CONFIGS = {"cnn": "configs/fashion_mnist.py", "vgg16_bn": "configs/cifar10.py"}


def measure(network: str, batch: int, arguments: argparse.Namespace) -> None:
    """Prints one network's table."""
    config = runpy.run_path(CONFIGS[network])["get_config"]()
    config.model.name = network
    config.model.width = arguments.width
    config.train.batch_size = batch
    config.model.dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    trainer = Trainer(config, arguments.examples, CLOCKS[arguments.clock])
    run, data = trainer.run, next(trainer.run.feed(trainer.parts[0], 0))
    steps = max(arguments.together)

    def do(state: Any, together: int) -> Any:
        for _ in range(steps // together):
            state, _ = run.step(state, data, skips=(False,) * together)
        return jax.block_until_ready(state)

    def case(together: int) -> Step:
        state = run.create_state()

        def some() -> None:
            nonlocal state
            state = do(state, together)

        return some

    same = {x: do(run.create_state(), x) for x in arguments.together}
    one = jax.device_get(same.pop(1))
    cases = {f"{x} together": case(x) for x in arguments.together}
    taken = take_turns(cases, arguments.rounds, arguments.seconds, CLOCKS[arguments.clock])
    print(
        f"\n{network}, batch {batch}, {config.model.dtype}, {steps} steps a turn, "
        f"{arguments.rounds} rounds, {arguments.clock} time"
    )
    for name, values in taken.items():
        low, median, high = np.percentile(values / steps, (10, 50, 90)) * 1e3
        print(
            f"  {name:24} {median:9.3f} ms a step   {low:9.3f} to {high:9.3f} "
            f"{batch / median * 1e3:10,.0f} images/s"
        )
    for together, state in same.items():
        equal = jax.tree.all(jax.tree.map(np.array_equal, one, jax.device_get(state)))
        row(
            f"4  {together} together / 1, images per second",
            taken["1 together"] / taken[f"{together} together"],
            "the same bits" if equal else "other bits",
        )


def main() -> None:
    """Prints the tables."""
    keep_freed_memory()
    gpu = jax.default_backend() != "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--networks", nargs="+", choices=CONFIGS, default=list(CONFIGS) if gpu else ["cnn"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[128, 1024] if gpu else [128])
    parser.add_argument(
        "--together", nargs="+", type=int, default=[1, 4, 8, 16, 32] if gpu else [1, 4],
        help="1, and divisors of the largest",
    )  # fmt: skip
    parser.add_argument("--width", type=int, default=0, help="of the network; 0: its own")
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=0.2, help="of a case in a round")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    if 1 not in arguments.together or any(max(arguments.together) % x for x in arguments.together):
        parser.error("--together must have 1, and divisors of its largest")
    print(describe_machine())
    for network in arguments.networks:
        for batch in arguments.batch:
            measure(network, batch, arguments)


if __name__ == "__main__":
    main()
