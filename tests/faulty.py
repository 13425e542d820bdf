"""`sync_jax.main` in a process that comes to harm at a moment of the test's choosing.

    python -m tests.faulty HARM:MOMENT:NUMBER[,HARM:MOMENT:NUMBER] ARGUMENT...

HARM is 'kill' (SIGKILL) or 'term' (SIGTERM), at the moment NUMBER of its kind in `prepare`.
'nan:step:N' spoils a pixel of that step's batch instead, 'full:disk:0' has no file grow beyond
16 KiB, as on a disk that is full by then, and 'none:never:0' does no harm.
"""

import functools
import itertools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import jax.numpy as jnp
from absl import app
from jax._src import compiler
from orbax.checkpoint._src.path.atomicity import AtomicRenameTemporaryPath

from sync_jax import main, steps, train
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime.training_log import Progress


def before(owner: Any, name: str, harm: Callable[..., None]) -> None:
    """Has a function do some harm first."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def harmed(*arguments: Any, **options: Any) -> Any:
        harm(*arguments)
        return function(*arguments, **options)

    setattr(owner, name, harmed)


def prepare(how: str, moment: str, number: int) -> None:
    """Makes sure that it will come to that."""
    count = itertools.count(1)

    def harm(*_: Any) -> None:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[how])

    def at_last(do: Callable[[], None] = harm) -> None:
        if next(count) == number:
            do()

    moments: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "data": (train, "load_data", lambda *_: harm() or time.sleep(60)),  # and no more happens
        "step": (Progress, "step", lambda _, done: done == number and harm()),
        "saving": (  # the arrays of a checkpoint are written, and it is not complete
            AtomicRenameTemporaryPath,
            "finalize",
            lambda path: path.get_final().name.isdigit() and at_last(),
        ),
        "evaluating": (  # the first batch is done
            train,
            "calibrate",
            lambda job, *_: at_last(lambda: setattr(job.trainer, "_alive", harm)),
        ),
        "predictions": (Predictions, "save", lambda *_: at_last()),
    }
    if how == "nan":
        spoil(number)
    elif how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, resource.RLIM_INFINITY))
    elif how != "none":
        before(*moments[moment])


def spoil(*numbers: int) -> None:
    """Spoils the batches of some steps, counted from 1."""
    train_step = steps.train_step

    def spoilt(state: Any, batch: Any, **options: Any) -> Any:
        bad = jnp.isin(state.step + 1, jnp.asarray(numbers))
        image = batch["image"].at[0, 0, 0, 0].add(jnp.where(bad, jnp.nan, 0.0))
        return train_step(state, batch | {"image": image}, **options)

    steps.train_step = spoilt


def every_process_caches() -> None:
    """Has all processes keep what they compiled: JAX lets only the first, under a key of its own.

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
