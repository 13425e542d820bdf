"""Several processes that train one network: how they find each other, and agree.

Devices exchange arrays by XLA's collectives. What is here goes over JAX's coordination service
instead, which needs no device: who has arrived, and whether all may go on. A process that fails
where the others do not would otherwise leave them waiting in a collective for ever.
"""

import contextlib
import importlib.util
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed as jax_distributed  # the service has no public client

from sync_jax.errors import (
    FailedError,
    InputError,
    NonFiniteError,
    TerminatedError,
    WriteError,
)
from sync_jax.runtime.console import printable, say
from sync_jax.runtime.roll_call import roll_call

T = TypeVar("T")

_GRACE = 5.0  # seconds for processes to end by themselves, after one failed
_OUTLAST = 15.0  # seconds for all to hear of a SIGTERM, which may have been to one alone
_BEYOND = 60.0  # seconds for JAX's own meeting, once all have come to ours
_INTERVAL = 1.0  # seconds after which a wait looks whether a signal has come

# What Slurm's srun gives each process; a script under sbatch alone has not all of them.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_AGREED = (InputError, WriteError, TerminatedError, NonFiniteError, FailedError)


def initialize(
    coordinator: str | None, processes: int | None, process: int | None, *, seconds: float
) -> None:
    """Joins the other processes; before JAX computes anything.

    By itself where a TPU slice or Slurm's `srun` says who they are, else by the three arguments;
    with neither, this process is alone.

    Args:
        coordinator: HOST:PORT, a free port of process 0's host; the same for all.
        processes: how many there are.
        process: which one this is, from 0.
        seconds: how long to wait for the others.

    Raises:
        InputError: the arguments are incomplete, or no such process or port is possible.
        FailedError: the others cannot be met; it names those that did not come in time. Where
            JAX's meeting hangs though all have come, the process ends, with a line and status 1;
            when it is interrupted meanwhile, with status 130.
    """
    given = (coordinator, processes, process)
    if given != (None, None, None):
        _check(*given)
    elif not all(name in os.environ for name in _SLURM) and not _on_tpu():
        return
    # Its handler of SIGTERM would keep ours, and the system's, from ever seeing one.
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    local_devices = None
    try:
        if coordinator is None:
            coordinator, processes, process, local_devices = (
                jax_distributed.clusters.ClusterEnv.auto_detect_unset_distributed_params(
                    None, None, None, None, None, int(seconds)
                )
            )
        if coordinator is None or processes is None or process is None:
            return  # a TPU's library, but no slice
        missing = roll_call(coordinator, processes, process, seconds=seconds)
    except (RuntimeError, ValueError, OSError) as error:
        where = f" at {coordinator}" if coordinator else ""
        raise FailedError(
            f"the other processes cannot be met{where}: {_one_line(error)}"
        ) from error
    if missing:
        raise FailedError(
            f"process {', '.join(map(str, missing))} of {processes} did not come to the meeting at "
            f"{coordinator} within {seconds:g} s; its own log says why"
        )
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def meet() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                local_devices,
                cluster_detection_method="deactivate",
                # Its own limit ends the process with a stack of C++, so ours comes first.
                initialization_timeout=2 * int(_BEYOND),
                # A process that died is noticed within this time, and the others are ended.
                heartbeat_timeout_seconds=max(int(min(seconds, 100)), 1),
                shutdown_timeout_seconds=max(int(min(seconds, 60)), 1),
            )
            ended.put(None)
        except Exception as error:
            ended.put(error)

    # In a thread of its own, for nothing can interrupt the call, a signal neither.
    threading.Thread(target=meet, daemon=True).start()
    try:
        failure = ended.get(timeout=_BEYOND)
    except queue.Empty:
        _give_up(
            f"all {processes} processes came to {coordinator}, but JAX did not connect them within "
            f"{_BEYOND:g} s",
            1,
        )
    except KeyboardInterrupt:
        _give_up("interrupted", 130)
    if isinstance(failure, RuntimeError | ValueError):
        raise FailedError(
            f"the other processes cannot be met at {coordinator}: {_one_line(failure)}"
        ) from failure
    if failure is not None:
        raise failure


def _check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    if coordinator is None or processes is None or process is None:
        raise InputError("--coordinator, --processes and --process belong together")
    if not 0 <= process < processes:
        raise InputError(f"--process={process} must be between 0 and --processes={processes} - 1")
    host, _, port = coordinator.rpartition(":")
    number = int(port) if port.isascii() and port.isdecimal() and len(port) < 6 else 0
    if not host or not 0 < number < 65536:
        raise InputError(f"--coordinator={coordinator} must be HOST:PORT, a port from 1 to 65535")


def _give_up(text: str, status: int) -> NoReturn:
    print(f"sync_jax: {text}", file=sys.stderr, flush=True)
    os._exit(status)  # an orderly end would wait for the call that is still under way


def outlast_others() -> None:
    """Lets those that end too, at the same SIGTERM, do so before the process that they meet at.

    As soon as that is gone, JAX aborts them. So they say that they end, and it waits for that.
    """
    known = jax_distributed.global_state
    client: Any = known.client
    if client is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody else ends, or it is gone already
        if known.service is None:
            client.key_value_set(f"sync_jax/ended/{known.process_id}", "")
            return
        deadline = time.monotonic() + _OUTLAST
        for process in range(1, known.num_processes):
            left = max(int(1000 * (deadline - time.monotonic())), 1)
            client.blocking_key_value_get(f"sync_jax/ended/{process}", left)
        time.sleep(1.0)  # from their word to their end, with nothing in between


def _on_tpu() -> bool:
    platforms = os.environ.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None


class Processes:
    """The processes of a run, and how they agree. All must make the same calls in the same order.

    Attributes:
        index: which one this is.
        count: how many there are.
        first: whether this one writes what there is one of: logs, reports.
    """

    def __init__(self, *, seconds: float = 600.0, name: str = ""):
        """Finds out who is there.

        Args:
            seconds: how long each call waits for the others.
            name: of the run, if one process has several after each other.
        """
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0
        self._seconds = seconds
        self._name = name
        self._calls = 0

    def print(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.first:
            say(text)

    def share(self, what: str, value: Any = None, *, after_first: bool = False) -> list[Any]:
        """Every process's value, in order; waits until all have come.

        Args:
            what: is being waited for, for the error.
            value: of JSON's types.
            after_first: as long as the first takes for its own; and then for the others as usual.

        Raises:
            FailedError: naming those that did not come in time.
        """
        if self.count == 1:
            return [value]
        client: Any = jax_distributed.global_state.client
        self._calls += 1
        key = f"sync_jax/{self._name}/{self._calls}/{what}"
        client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        values, missing = [], []
        if after_first:
            until = time.monotonic() + self._seconds
            while _found(client, f"{key}/0", until) is None:  # if it dies, JAX ends the others
                say(f"process {self.index} still waits for process 0: {what}")
                until = time.monotonic() + self._seconds
        deadline = time.monotonic() + self._seconds
        for process in range(self.count):
            # Who has come must be found even when the time is over.
            text = _found(client, f"{key}/{process}", max(deadline, time.monotonic() + 2.0))
            if text is None:
                missing.append(str(process))
            else:
                values.append(json.loads(text))
        if missing:
            raise FailedError(
                f"process {', '.join(missing)} of {self.count} did not come to {what!r} within "
                f"{self._seconds:g} s; its own log says why"
            )
        return values

    def together(self, what: str, function: Callable[[], T]) -> T:
        """Calls a function on every process; if it fails on one, it fails on all.

        Args:
            what: it does, for errors.
            function: may raise one of our errors.

        Returns:
            What it returned on this process.
        """
        if self.count == 1:
            return function()
        result, failure, failed = None, None, None
        try:
            result = function()
        except Exception as error:
            failed, failure = error, _described(error)
        failures = self.share(what, failure)
        if failed is not None:
            raise failed
        for process, other in enumerate(failures):
            if other is not None:
                raise _error(f"process {process}: ", other)
        return result  # type: ignore[return-value]

    def from_first(self, what: str, function: Callable[[], Any]) -> Any:
        """Calls a function on the first process; all get what it returned, or fail as it did.

        Args:
            what: it does, for errors.
            function: returns a value of JSON's types; may raise one of our errors.
        """
        if self.count == 1:
            return function()
        result, failure, failed = None, None, None
        if self.first:
            try:
                result = function()
            except Exception as error:
                failed, failure = error, _described(error)
        result, failure = self.share(what, [result, failure], after_first=True)[0]
        if failed is not None:
            raise failed
        if failure is not None:
            raise _error("", failure)
        return result

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends all processes when one of them fails within: the others would wait for it.

        A disk that is full, a picture that cannot be decoded or a bug can meet one process alone,
        between two steps, while the others are in a collective that nothing can interrupt. They
        print its error and end with its status, wherever they are.

        Raises:
            FailedError: a computation failed here, as it does when another process is gone.
        """
        if self.count == 1:
            yield
            return
        over = threading.Event()
        watch = threading.Thread(target=self._end_with_others, args=(over,), daemon=True)
        watch.start()
        try:
            yield
        except (TerminatedError, NonFiniteError):
            raise  # all of them, at the same step, however long each has to save
        except BaseException as error:
            known = self._tell(error)
            if isinstance(error, jax.errors.JaxRuntimeError):
                reason = known or f"a computation failed: {_one_line(error)}"
                raise FailedError(reason) from error
            raise
        finally:
            over.set()
            watch.join()

    @property
    def _failed(self) -> str:
        return f"sync_jax/{self._name}/failed"

    def _tell(self, error: BaseException) -> str | None:
        """Tells the others of an error, and waits until they know; what another told before."""
        client: Any = jax_distributed.global_state.client
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others are gone
            try:
                client.key_value_set(self._failed, json.dumps([self.index, *_described(error)]))
            except jax.errors.JaxRuntimeError:
                other, _, message = json.loads(client.key_value_try_get(self._failed))
                return f"process {other} failed: {message}"
            deadline = time.monotonic() + _GRACE
            for process in set(range(self.count)) - {self.index}:
                left = max(deadline - time.monotonic(), 0.1)
                client.blocking_key_value_get(f"{self._failed}/{process}", int(1000 * left))
        return None

    def _end_with_others(self, over: threading.Event) -> None:
        """Ends this process a little after another has failed, unless it is `over` by then."""
        client: Any = jax_distributed.global_state.client
        while not over.wait(1):
            try:
                other, kind, message = json.loads(client.key_value_try_get(self._failed))
            except jax.errors.JaxRuntimeError:
                continue  # nobody has failed, or process 0 is gone, which JAX ends us for
            if other == self.index:
                return
            client.key_value_set(f"{self._failed}/{self.index}", "")
            if over.wait(_GRACE):
                return
            text = f"sync_jax: process {other} failed: {printable(message)}"
            print(text, file=sys.stderr, flush=True)
            sys.stdout.flush()
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                client.shutdown()  # or the other would wait for us
            os._exit(2 if kind == InputError.__name__ else 1)  # the main thread may be stuck


def _found(client: Any, key: str, deadline: float) -> str | None:
    """What is known by a key, waited for until the deadline; None if nothing is.

    Raises:
        FailedError: process 0 is gone.
    """
    while (left := deadline - time.monotonic()) > 0:
        try:
            return client.blocking_key_value_get(key, int(1000 * min(left, _INTERVAL)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise FailedError(
                    f"process 0, which the others meet at, is gone: {_one_line(error)}"
                ) from error
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _described(error: BaseException) -> list[str]:
    for kind in _AGREED:
        if isinstance(error, kind):
            return [kind.__name__, str(error)]
    return [FailedError.__name__, f"{type(error).__name__}: {error}"]


def _error(prefix: str, failure: list[str]) -> Exception:
    name, message = failure
    kind = next(kind for kind in _AGREED if kind.__name__ == name)
    return kind(prefix + message)
