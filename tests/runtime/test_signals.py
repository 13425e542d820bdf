import re
import subprocess
import sys
import threading
import time

import pytest

from sync_jax.runtime.signals import watchdog


def test_the_watchdog_prints_stacks_when_nothing_happens_for_too_long(capfd):
    with watchdog(1.0) as happened:
        quiet, last = 0.0, time.monotonic()
        enough = last + 60
        while quiet < 2.0:  # twice too long, but never 0.5 s without anything
            time.sleep(0.02)
            happened()
            now = time.monotonic()
            quiet, gap, last = quiet + now - last, now - last, now
            if gap > 0.5:  # on a busy machine: what was printed meanwhile shows nothing
                capfd.readouterr()
                quiet = 0.0
            assert now < enough, "no two seconds in which this process was left alone"
        assert capfd.readouterr().err == ""
        deadline = time.monotonic() + 60
        shown = ""
        while "Thread" not in shown and time.monotonic() < deadline:
            time.sleep(0.05)
            shown += capfd.readouterr().err
    assert re.search(r"sync_jax: no step has finished for \d+ s; what each thread is doing:", shown)
    assert "test_the_watchdog_prints_stacks" in shown  # this thread's, among others


@pytest.mark.parametrize("seconds", [0.0, 5.0])
def test_the_watchdog_watches_only_within_its_block(seconds):
    def watched() -> bool:
        return any(thread.name == "watchdog" for thread in threading.enumerate())

    with watchdog(seconds) as happened:
        happened()
        assert watched() == (seconds > 0)
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
