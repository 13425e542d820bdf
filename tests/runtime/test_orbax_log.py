import asyncio
import logging
import sys

import pytest

from sync_jax.runtime.orbax_log import orbax_log


@pytest.fixture
def terminal(monkeypatch):
    """Collects what reaches the terminal: unraisable errors, and records of logging."""
    left = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: left.append(error.exc_value))
    handler = logging.Handler()
    handler.emit = lambda record: left.append(record.getMessage())
    logging.root.addHandler(handler)
    yield left
    logging.root.removeHandler(handler)


def test_what_comes_from_orbax_goes_to_the_file_and_nothing_else(terminal, tmp_path):
    path = tmp_path / "orbax.log"
    orbax_log.open(path)
    assert orbax_log.hint() == ""
    loop = asyncio.new_event_loop()
    loop.close()

    class Orbax:
        def __del__(self):
            loop.call_soon_threadsafe(print)

    class Ours:
        def __del__(self):
            raise KeyError("a bug")

    Orbax()
    Ours()
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    logging.getLogger("absl").error("ours")
    assert [str(x) for x in terminal] == ["'a bug'", "ours"]
    text = path.read_text()
    assert "Traceback" in text
    assert "Event loop is closed" in text
    assert "never retrieved" in text
    assert orbax_log.hint() == f"; {path} has more"
    orbax_log.open(tmp_path / "nowhere" / "orbax.log")
    Orbax()  # where nothing can be written, as on a full disk, nothing is raised or said either
    assert orbax_log.hint() == ""
    assert len(terminal) == 2
