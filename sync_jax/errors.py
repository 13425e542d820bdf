"""What can end a run without being a fault of the program."""

import difflib
from collections.abc import Collection


class InputError(Exception):
    """A config, file or environment that cannot be used.

    Its message is one line that names the field, the value and what would do. `main` prints it
    without a traceback and exits with status 2.
    """


class WriteError(Exception):
    """Something cannot be written, on a full disk for example; exit status 1."""


class FailedError(Exception):
    """Training cannot go on, for a reason that its message names; exit status 1."""


class NonFiniteError(FailedError):
    """A loss, one of its terms, the gradient or the state is not a finite number."""


class TerminatedError(Exception):
    """The run was asked to stop by SIGTERM, and has saved its state; exit status 75."""


def suggestion(word: str, choices: Collection[str]) -> str:
    """' (did you mean x?)' when one of the choices is close, else ''."""
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
