"""A mistake, and the command lines that it is made on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import tiny
from tests.command_line import QUICKSTART


class Bad(NamedTuple):
    """A mistake: a command line, what its line must match, and what is wrong beside it."""

    arguments: list[str]
    message: str
    spoil: Callable[[pytest.MonkeyPatch], object] | None = None


TINY = [f"--config.{path}={value}" for path, value in tiny.OVERRIDES.items()]
TRAIN = [QUICKSTART, *TINY, "--config.data.data_dir=data"]
DONE = [*TRAIN, "--workdir=runs/done"]
EVALUATE = [*DONE, "--mode=evaluate"]
COMPARE = ["--mode=compare", "--runs=runs/*", "--workdir=table"]
ALBUM = [
    "--config=configs/image_folder.py",
    *("--config.data.folder=pictures", "--config.data.image_size=12"),
    *("--config.train.batch_size=8", "--config.evaluation.batch_size=8"),
    "--config.data.calibration_size=3",
]
PREPARED = [*ALBUM, "--config.data.data_dir=album", "--workdir=new"]
NEW_ALBUM = [*ALBUM, "--config.data.data_dir=new", "--mode=prepare"]
RESNET = [x for x in TRAIN if not x.startswith("--config.model.")]
RESNET += ["--workdir=new", "--config.model.name=resnet18", "--config.model.width=2"]


def prepare(name: str) -> list[str]:
    where = ["--config.data.source=published", "--config.data.data_dir=new", "--mode=prepare"]
    return [f"--config=configs/{name}.py", *where]


def file(text: str) -> dict:
    """A config file of the user's."""
    return {
        "arguments": ["--config=mine.py"],
        "spoil": lambda monkeypatch: Path("mine.py").write_text(text),
    }


def changed(line: str) -> dict:
    """The default config with a line more."""
    return file(
        "from ml_collections import config_dict\n"
        "from sync_jax.config import default_config\n"
        f"def get_config():\n  c = default_config()\n  {line}\n  return c\n"
    )
