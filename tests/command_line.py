"""The real command line in this process."""

import sys
from pathlib import Path
from unittest import mock

from absl import flags
from absl.testing import flagsaver

from sync_jax import main

ROOT = Path(__file__).parents[1]
QUICKSTART = "--config=configs/quickstart.py"


def run(*arguments: str) -> int:
    """Does what the command line does; returns the exit status."""
    command = ["main.py", *arguments]
    with flagsaver.flagsaver(), mock.patch.object(sys, "argv", command):
        flags.FLAGS.unparse_flags()
        try:
            main.main(main.parse_flags(command))
        except SystemExit as stop:
            return int(str(stop.code))
        return 0
