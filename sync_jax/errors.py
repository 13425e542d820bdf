"""The one kind of error that is the user's to mend."""


class InputError(Exception):
    """A config, file or environment that cannot be used.

    Its message is one line that names the field, the value and what would do. `main` prints it
    without a traceback and exits with status 2.
    """
