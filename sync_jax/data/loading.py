"""The data of a run: prepared, put where they fit, and read."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sync_jax.config import check_sizes
from sync_jax.data import registry
from sync_jax.data.parts import Part, load_train_and_calibration
from sync_jax.data.placement import Placement, choose
from sync_jax.data.prepare import pictures
from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import latest_notes
from sync_jax.runtime.processes import Processes


def prepare(config: ConfigDict) -> None:
    """Obtains and prepares the config's dataset; once is enough.

    Raises:
        InputError: it cannot be had.
    """
    registry.make_ready(config.data)
    if config.data.name in pictures.NAMES:
        # Perhaps for another machine, with more memory.
        if config.data.placement in ("device", "disk"):
            pictures.prepare_squares(config.data)
            return
        placement = decide(config, sharding.make_mesh())
        make_squares(config, placement)
        print(placement.reason)


def load_data(
    config: ConfigDict, mesh: jax.sharding.Mesh, workdir: Path, processes: Processes
) -> tuple[Placement, Part, Part]:
    """Where the training images are to be, and the training and the calibration part.

    Raises:
        InputError: they cannot be had, or the config does not fit them.
    """

    def make_ready() -> None:
        if not registry.is_ready(config.data):
            registry.make_ready(config.data)
        check_sizes(config)

    processes.together("preparing the data", make_ready)
    # One for all: each would decide by its own free memory.
    decided = processes.from_first(
        "where the images are to be", lambda: dataclasses.asdict(decide(config, mesh, workdir))
    )
    placement = Placement(**decided)

    def load() -> tuple[Part, Part]:
        make_squares(config, placement)
        return load_train_and_calibration(config.data, decode=placement.decoded)

    return placement, *processes.together("reading the data", load)


def decide(config: ConfigDict, mesh: jax.sharding.Mesh, workdir: Path | None = None) -> Placement:
    """What `data.placement` says; a run that goes on stays where it was.

    Raises:
        InputError: there is no room.
    """
    info = registry.dataset_info(config.data)
    if info is None:
        raise InputError(f"{config.data.name} is not prepared; --mode=prepare does it")
    section = config.data.copy_and_resolve_references()
    notes = latest_notes(workdir / "checkpoints") if workdir else None
    if notes is not None and section.placement == "auto":
        # Its crops would be others elsewhere, and free memory changes.
        section.placement = notes.get("placement", "auto")  # earlier versions noted otherwise
    return choose(section, info, mesh)


def make_squares(config: ConfigDict, placement: Placement) -> None:
    """Makes the squares that are to be used, of pictures that are kept encoded."""
    if not placement.decoded and config.data.name in pictures.NAMES:
        pictures.prepare_squares(config.data)
