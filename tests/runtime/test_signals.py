import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from sync_jax.runtime import signals


def watched() -> bool:
    return any(thread.name == "watchdog" for thread in threading.enumerate())


def test_the_watchdog_prints_stacks_when_nothing_happens_for_too_long(monkeypatch, capfd):
    now, shown = 0.0, ""
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with signals.watchdog(0.1) as happened:
        assert watched()
        for _ in range(5):
            now += 0.09
            happened()
            time.sleep(0.05)  # it looks every 0.01 s
        assert capfd.readouterr().err == ""
        now += 7.0
        deadline = time.monotonic() + 60
        while "Thread" not in shown and time.monotonic() < deadline:
            time.sleep(0.05)
            shown += capfd.readouterr().err
    assert "sync_jax: no step has finished for 7 s; what each thread is doing:" in shown
    assert "test_the_watchdog_prints_stacks" in shown  # this thread's, among others
    assert not watched()
    with signals.watchdog(0.0) as happened:
        happened()
        assert not watched()


COLLECTING = """
import gc, os, signal
from sync_jax.runtime.signals import ending_at_sigterm, terminated

def asked(phase, info):  # as JAX has one
    os.kill(os.getpid(), signal.SIGTERM)

with ending_at_sigterm():
    if {noted}:
        with terminated() as stopping:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping()
            print("saved", flush=True)
    gc.callbacks.append(asked)
    gc.collect()
    print("went on")
"""


@pytest.mark.parametrize("noted", [False, True])
def test_sigterm_is_not_lost(noted):
    """Not while garbage is collected, nor where it was noted and came too late to be heeded."""
    script = COLLECTING.format(noted=noted)
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 75, ended
    assert ended.stdout == ("saved\n" if noted else "")
    assert ended.stderr.startswith("sync_jax: stopped by SIGTERM, no training under way; the same")


INTERRUPTED = """
import hashlib, os, signal, threading, time
from sync_jax.runtime.signals import ending_at_ctrl_c

def ask():
    os.kill(os.getpid(), signal.SIGINT)

with ending_at_ctrl_c({seconds}):
    threading.Timer(0.2, ask).start()
    try:
        {work}
    finally:
        print("closing", flush=True)
        {closing}
"""
# Nothing interrupts it, as XLA's compilation; it takes hours.
IN_C = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)'


@pytest.mark.parametrize(("seconds", "work", "closing", "shown"), [
    (60, "time.sleep(60)", "", "closing\n"),
    (0.2, "time.sleep(60)", "time.sleep(60)", "closing\n"),
    (0.2, IN_C, "", ""),
    (60, "time.sleep(60)", "ask(); time.sleep(60)", "closing\n"),  # a second one
])  # fmt: skip
def test_ctrl_c_ends_in_time_with_one_line(seconds, work, closing, shown):
    code = INTERRUPTED.format(seconds=seconds, work=work, closing=closing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (130, shown)
    assert done.stderr == "sync_jax: interrupted; the same command goes on from what was saved\n"


def test_ctrl_c_that_is_ignored_stays_so():
    code = (
        "import os, signal\nfrom sync_jax.runtime.signals import ending_at_ctrl_c\n"
        "with ending_at_ctrl_c():\n    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print(signal.getsignal(signal.SIGINT))"
    )
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")  # SIG_IGN
