"""What is freed stays with the process; in processes of their own, for it cannot be undone."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = 10_000  # 40 MB: smaller blocks glibc learns to keep by itself

PROGRAM = """
import resource, sys, threading
from sync_jax.runtime.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def touch():
    for _ in range(10):
        b"x" * ({pages} * 4096)  # NumPy asks for huge pages, XLA does not

for thread in [threading.Thread(target=touch) for _ in range(2)]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(),
    reason="this system has huge pages for all, and too few faults to count",
)
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or bool(importlib.metadata.entry_points(group="jax_plugins")),
    reason="nothing happens there",
)
def test_memory_is_used_again_instead_of_asked_for():
    """Ten blocks, one after the other, in a thread that is not the first."""
    faults = [
        int(subprocess.check_output([sys.executable, "-c", PROGRAM.format(pages=PAGES), mode]))
        for mode in ("give back", "keep")
    ]
    assert faults[0] > 5 * PAGES
    assert faults[1] < PAGES
