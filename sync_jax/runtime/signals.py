"""SIGTERM handling, and a watchdog for steps that hang."""

import contextlib
import faulthandler
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def ending_at_sigterm(before: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Ends the process at SIGTERM, with status 75, where nothing has to be saved.

    Exits immediately, after calling `before`: an exception raised during garbage collection would
    be swallowed. Inside, `terminated` takes precedence.
    """

    def end() -> None:
        with contextlib.suppress(RuntimeError):  # the signal came while it was being written
            sys.stdout.flush()
        text = "sync_jax: stopped by SIGTERM, no training under way; the same command goes on"
        os.write(2, f"{text}\n".encode())
        before()
        os._exit(75)

    with _on_sigterm(end):
        yield


@contextlib.contextmanager
def terminated() -> Iterator[Callable[[], bool]]:
    """Notes SIGTERM, of which the function that it yields tells; a second one kills.

    A signal that was noted and led to nothing is sent again at the end.
    """
    asked = threading.Event()
    with _on_sigterm(asked.set):
        yield asked.is_set
    if asked.is_set():
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def ending_at_ctrl_c(seconds: float = 3.0) -> Iterator[None]:
    """Ends the process, with status 130 and one line, at most `seconds` after Ctrl-C.

    KeyboardInterrupt is raised as always. But nothing interrupts XLA while it compiles or computes,
    and closing may wait for it, or for another Ctrl-C: a thread ends the process then.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, lambda *_: None)  # the thread hears of a second one
        raise KeyboardInterrupt

    def watch() -> None:
        while os.read(reader, 1)[0] != signal.SIGINT:
            pass
        select.select([reader], [], [], seconds)
        end()

    def end() -> NoReturn:
        os.write(2, b"sync_jax: interrupted; the same command goes on from what was saved\n")
        os._exit(130)

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # it is ignored, as in the background of a script
        return
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGINT, handle)
    threading.Thread(target=watch, name="Ctrl-C", daemon=True).start()
    try:
        yield
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        end()


@contextlib.contextmanager
def _on_sigterm(do: Callable[[], None]) -> Iterator[None]:
    """Calls a function at the first SIGTERM."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def handle(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        do()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Prints all stacks to stderr when the yielded function is not called for so long; 0: never."""
    last = time.monotonic()
    over = threading.Event()

    def happened() -> None:
        nonlocal last
        last = time.monotonic()

    def watch() -> None:
        warned_at = last
        while not over.wait(seconds / 10):
            if time.monotonic() - max(last, warned_at) > seconds:
                warned_at = time.monotonic()
                text = (
                    f"no step has finished for {warned_at - last:.0f} s; what each thread is doing:"
                )
                print(f"sync_jax: {text}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2, all_threads=True)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    if seconds:
        thread.start()
    try:
        yield happened
    finally:
        over.set()
        if seconds:
            thread.join()
