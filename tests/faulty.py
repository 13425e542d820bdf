"""`sync_jax.main` in a process that comes to harm at a moment of the test's choosing.

    python -m tests.faulty HARM:MOMENT:NUMBER[,HARM:MOMENT:NUMBER] ARGUMENT...

HARM is 'kill' (SIGKILL, as a power cut) or 'term' (SIGTERM); MOMENT 'data' (they are read), 'step'
(that step is under way), 'saving' (the so-manyth checkpoint's arrays are written, and it is not
complete), 'evaluating' (the so-manyth evaluation of the training is half done) or 'predictions'
(the so-manyth predictions are about to be written). 'nan:step:N' spoils a pixel of
that step's batch instead, and 'none:never:0' does no harm.
"""

import functools
import os
import signal
import sys
import time
from types import FunctionType, SimpleNamespace
from typing import Any

import jax.numpy as jnp
from absl import app
from jax._src import compiler
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from sync_jax import main, steps, train
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime.progress import Progress


def harm(how: str) -> None:
    """Sends this process the signal."""
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])


def prepare(how: str, moment: str, number: int) -> None:
    """Makes sure that it will come to that."""
    if how == "nan":
        spoil(number)
    elif moment == "step":
        step = Progress.step

        def stepped(self: Progress, done: int) -> None:
            step(self, done)
            if done == number:
                harm(how)

        Progress.step = stepped  # type: ignore[method-assign]
    elif moment == "data":
        load = train.load_data

        def loading(*arguments: Any) -> Any:
            if "--process=1" in sys.argv:  # to several hosts a signal comes one after the other
                time.sleep(1)
            harm(how)
            time.sleep(60)  # it must not come to more
            return load(*arguments)

        train.load_data = loading
    elif moment == "saving":
        finalize, count = AtomicRenameTemporaryPath.finalize, 0

        async def finalized(self: AtomicRenameTemporaryPath) -> None:
            nonlocal count
            count += self.get_final().name.isdigit()
            if count == number:
                harm(how)
            await finalize(self)

        AtomicRenameTemporaryPath.finalize = finalized
    elif moment == "evaluating":
        evaluate, begun = train.calibrate, 0

        def evaluated(job: train.Job, *arguments: Any) -> float:
            nonlocal begun
            begun += 1
            if begun == number:
                job.trainer._alive = functools.partial(harm, how)  # after the first batch
            return evaluate(job, *arguments)

        train.calibrate = evaluated
    elif moment == "predictions":
        write, written = Predictions.save, 0

        def wrote(self: Predictions, *arguments: Any) -> None:
            nonlocal written
            written += 1
            if written == number:
                harm(how)
            write(self, *arguments)

        Predictions.save = wrote  # type: ignore[method-assign]


def spoil(*numbers: int) -> None:
    """Spoils the batches of some steps, counted from 1."""
    train_step = steps.train_step

    def spoilt(state: Any, batch: Any, **options: Any) -> Any:
        bad = jnp.isin(state.step + 1, jnp.asarray(numbers))
        image = batch["image"].at[0, 0, 0, 0].add(jnp.where(bad, jnp.nan, 0.0))
        return train_step(state, batch | {"image": image}, **options)

    steps.train_step = spoilt


def every_process_caches() -> None:
    """JAX lets the first process alone write what it compiled, under a key that is its own.

    The others would compile the same again in each of their lives.
    """
    write = compiler._cache_write
    first = SimpleNamespace(global_state=SimpleNamespace(process_id=0))
    names = {**write.__globals__, "distributed": first}
    compiler._cache_write = FunctionType(write.__code__, names, argdefs=write.__defaults__)


if __name__ == "__main__":
    every_process_caches()
    for chosen in sys.argv.pop(1).split(","):
        how, moment, number = chosen.split(":")
        prepare(how, moment, int(number))
    app.run(main.main, flags_parser=main.parse_flags)
