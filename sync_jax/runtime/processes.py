"""Several processes that train one network: how they meet, agree and end together.

Nothing can interrupt XLA's collectives: a process that fails leaves the others waiting in them. So
processes agree over JAX's coordination service instead, which needs no device.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax

# The only private import of JAX. Its coordination service has no public client, and the exchanges
# in jax.experimental.multihost_utils are collectives.
from jax._src.distributed import global_state

from sync_jax.errors import FailedError, InputError, NonFiniteError, TerminatedError, WriteError
from sync_jax.runtime.console import one_line, printable, say

T = TypeVar("T")

_GRACE = 5.0  # seconds for processes to end by themselves, after one failed
_OUTLAST = 15.0  # seconds for all to hear of a SIGTERM, which may have been to one alone
_INTERVAL = 1.0  # seconds after which a wait lets signals be handled
_NUMBERS = itertools.count(1)  # of the exchanges, which are the same on all processes

# The variables that Slurm's srun gives each process; a script under sbatch alone lacks some.
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_AGREED: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (InputError, WriteError, TerminatedError, NonFiniteError, FailedError)
}


def initialize(
    coordinator: str | None, processes: int | None, process: int | None, *, seconds: float
) -> None:
    """Joins the other processes; before JAX computes anything.

    On TPU slices and under Slurm's `srun` JAX finds the other processes; elsewhere the three
    arguments name them (HOST:PORT of process 0, their number, and this one's from 0), and without
    these the process is alone. When the others do not come in time, the process ends with a line
    and status 1; when it is interrupted meanwhile, with status 130. InputError for arguments that
    cannot be right; FailedError if the others cannot be met, because the port is in use perhaps.
    """
    given = (coordinator, processes, process)
    under_slurm = all(name in os.environ for name in _SLURM)
    if given != (None, None, None):
        _check(*given)
    elif not under_slurm and (
        "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu")
        or importlib.util.find_spec("libtpu") is None
    ):
        return
    # Its handler of SIGTERM would keep ours, and the system's, from ever seeing one.
    jax.config.update("jax_enable_preemption_service", False)
    limit = min(seconds, 1e7)  # what the types of JAX and Python can hold
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def meet() -> None:
        try:
            jax.distributed.initialize(
                *given,
                cluster_detection_method="deactivate" if coordinator else None,
                # JAX aborts the process then, with a stack of C++, so that our limit comes first.
                initialization_timeout=int(10 * limit) + 60,
                # A process that died is noticed within this time, and the others are ended.
                heartbeat_timeout_seconds=max(int(min(seconds, 100)), 1),
                shutdown_timeout_seconds=max(int(min(seconds, 60)), 1),
            )
            ended.put(None)
        except Exception as error:
            ended.put(error)

    # In a thread of its own, for nothing can interrupt the call, not even a signal.
    thread = threading.Thread(target=meet, daemon=True)
    thread.start()
    where = f" at {coordinator}" if coordinator else ""
    try:
        failure = ended.get(timeout=limit)
    except queue.Empty:
        count = f"all {processes} processes" if processes else "all processes"
        _give_up(
            f"not {count} came to the meeting{where} within {seconds:g} s; the log of the one that "
            "is missing says why",
            1,
        )
    except KeyboardInterrupt:
        _give_up("interrupted", 130)
    thread.join()  # or Python's end could meet it still in JAX's code
    if isinstance(failure, ValueError) and coordinator is None and not under_slurm:
        return  # a host with TPU chips of its own
    if isinstance(failure, RuntimeError | ValueError | OSError):
        raise FailedError(
            f"the other processes cannot be met{where}: {one_line(failure)}"
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
    if process > 0:
        return
    try:  # JAX makes a segmentation fault of a port that is in use
        socket.create_server(("", number)).close()
    except OSError as error:
        raise FailedError(
            f"the other processes cannot be met at {coordinator}: {os.strerror(error.errno or 0)}"
        ) from error


def _give_up(text: str, status: int) -> NoReturn:
    print(f"sync_jax: {text}", file=sys.stderr, flush=True)
    os._exit(status)  # an orderly end would wait for the call that is still under way


def outlast_others() -> None:
    """Lets the other processes end at the same SIGTERM before process 0: JAX aborts them then."""
    client: Any = global_state.client
    if client is None:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody else ends, or 0 is gone already
        if jax.process_index() > 0:
            client.key_value_set(f"sync_jax/ended/{jax.process_index()}", "")
            return
        deadline = time.monotonic() + _OUTLAST
        for process in range(1, jax.process_count()):
            left = max(int(1000 * (deadline - time.monotonic())), 1)
            client.blocking_key_value_get(f"sync_jax/ended/{process}", left)
        time.sleep(1.0)  # from their announcement to their end, with nothing in between


class Processes:
    """The processes of a run, and how they agree. All make the same calls in the same order.

    `index` is this process's, of `count`; the one that writes logs and reports is the `first`.
    """

    def __init__(self, *, seconds: float = 600.0):
        """Each call waits so long for the others."""
        self.index, self.count = jax.process_index(), jax.process_count()
        self.first = self.index == 0
        self.seconds = seconds
        self._failed = ""  # the key of an error

    def print(self, text: str) -> None:
        """Prints a line, once for all processes."""
        if self.first:
            say(text)

    def share(self, what: str, value: Any = None, *, after_first: bool = False) -> list[Any]:
        """Exchanges values of JSON's types, in the order of processes; waits until all have come.

        If `after_first`, it waits without limit for the first, and then for the others as usual.
        FailedError names the processes that did not come to `what` in time.
        """
        if self.count == 1:
            return [value]
        client: Any = global_state.client
        key = f"sync_jax/{next(_NUMBERS)}/{what}"
        client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        while after_first and _found(client, f"{key}/0", self.seconds) is None:
            # If process 0 dies, JAX ends the others.
            say(f"process {self.index} still waits for process 0: {what}")
        deadline = time.monotonic() + self.seconds
        texts = [
            # Also when the time is over, a process that has come must be found.
            _found(client, f"{key}/{process}", max(deadline - time.monotonic(), 2.0))
            for process in range(self.count)
        ]
        if missing := [str(process) for process, text in enumerate(texts) if text is None]:
            raise FailedError(
                f"process {', '.join(missing)} of {self.count} did not come to {what!r} within "
                f"{self.seconds:g} s; its own log says why"
            )
        return [json.loads(text or "") for text in texts]

    def together(self, what: str, function: Callable[[], T]) -> T:
        """Calls a function on every process; if it fails on one, it fails on all."""
        if self.count == 1:
            return function()
        result, failure, failed = _called(function)
        failures = self.share(what, failure)
        if failed is not None:
            raise failed
        for process, (name, message) in enumerate(failures):
            if name:
                raise _AGREED[name](f"process {process}: {message}")
        return result

    def from_first(self, what: str, function: Callable[[], Any]) -> Any:
        """Calls a function on the first process; all get its result, of JSON's types, or fail."""
        if self.count == 1:
            return function()
        mine = _called(function) if self.first else (None, ("", ""), None)
        result, (name, message) = self.share(what, mine[:2], after_first=True)[0]
        if mine[2] is not None:
            raise mine[2]
        if name:
            raise _AGREED[name](message)
        return result

    @contextlib.contextmanager
    def ending_together(self) -> Iterator[None]:
        """Ends all processes when one of them fails within, by a full disk or a bug for example.

        The others may be in a collective. They print the error and end with its status, wherever
        they are. A computation that failed here, as when another process is gone, is a FailedError.
        """
        if self.count == 1:
            yield
            return
        self._failed = f"sync_jax/{next(_NUMBERS)}/failed"
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
                raise FailedError(known or f"a computation failed: {one_line(error)}") from error
            raise
        finally:
            over.set()
            watch.join()

    def _tell(self, error: BaseException) -> str | None:
        """Tells the others of an error and waits until they know; returns an earlier error."""
        client: Any = global_state.client
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
        client: Any = global_state.client
        while not over.wait(_INTERVAL):
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


def _found(client: Any, key: str, seconds: float) -> str | None:
    """Waits for a key's value; None if there is none in time, FailedError if process 0 is gone."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            return client.blocking_key_value_get(key, int(1000 * min(left, _INTERVAL)))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise FailedError(
                    f"process 0, which the others meet at, is gone: {one_line(error)}"
                ) from error
    return None


def _called(function: Callable[[], Any]) -> tuple[Any, tuple[str, str], Exception | None]:
    """Calls a function; its result, and its error as kind and message, if any, and as it is."""
    try:
        return function(), ("", ""), None
    except Exception as error:
        return None, _described(error), error


def _described(error: BaseException) -> tuple[str, str]:
    for name, kind in _AGREED.items():
        if isinstance(error, kind):
            return name, str(error)
    return FailedError.__name__, f"{type(error).__name__}: {error}"
