"""What is freed stays with the process; in processes of their own, for it cannot be undone."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = 10_000  # 40 MB: smaller blocks glibc learns to keep by itself
PROGRAM = f"""
import resource, sys, threading
from sync_jax.runtime.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()

def touch():
    for _ in range(10):
        b"x" * {PAGES * 4096}  # NumPy asks for huge pages, XLA does not

for thread in [threading.Thread(target=touch) for _ in range(2)]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text())
    or platform.libc_ver()[0] != "glibc"
    or bool(importlib.metadata.entry_points(group="jax_plugins")),
    reason="nothing happens there, or this system has huge pages, and too few faults to count",
)
def test_memory_is_used_again_instead_of_asked_for():
    """Ten blocks, one after the other, in a thread that is not the first."""
    programs = ([sys.executable, "-c", PROGRAM, mode] for mode in ("give back", "keep"))
    faults = [int(subprocess.check_output(program)) for program in programs]
    assert faults[0] > 5 * PAGES
    assert faults[1] < PAGES
