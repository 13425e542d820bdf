"""A file for what Orbax prints about a failure, of which the terminal gets one line of ours."""

import contextlib
import logging
import sys
import traceback
from pathlib import Path

from absl.logging import get_absl_logger


class _OrbaxLog(logging.Filter):
    """Keeps Orbax's warnings and errors from the terminal, once `open` is called.

    Orbax logs a failure several times, also after it is closed. It awaits the first of many reads
    that fails; errors of the others reach sys.unraisablehook alone.
    """

    _path = Path()
    _others = staticmethod(sys.unraisablehook)
    _written = False

    def open(self, path: Path) -> None:
        """Names the file, to the end of the process or the next call; it is made when needed."""
        self._path, self._written = path, False
        for logger in (get_absl_logger(), logging.getLogger("asyncio")):
            logger.addFilter(self)
        if sys.unraisablehook != self._unraisable:
            self._others, sys.unraisablehook = sys.unraisablehook, self._unraisable

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns False for a record that goes to the file."""
        theirs = record.name == "asyncio" or "/orbax/" in record.pathname
        if not theirs or record.levelno < logging.WARNING:
            return True
        self._write(logging.Formatter("%(asctime)s %(message)s").format(record) + "\n")
        return False

    def _unraisable(self, error: "sys.UnraisableHookArgs") -> None:
        files = [frame.filename for frame in traceback.extract_tb(error.exc_traceback)]
        if any("/asyncio/" in file or "/orbax/" in file for file in files):
            parts = traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback)
            self._write("".join(parts))
        else:
            self._others(error)

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a full disk, of which the terminal's line tells
            with self._path.open("a") as file:
                file.write(text)
            self._written = True

    def hint(self) -> str:
        """Returns the end of a message, which names the file if there is something in it."""
        return f"; {self._path} has more" if self._written else ""


orbax_log = _OrbaxLog()
