"""The data of a run: prepared, put where they fit, and read."""

import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from sync_jax.data import catalogue, pictures
from sync_jax.data.parts import Part, calibration_size, load_train_and_calibration
from sync_jax.data.placement import Placement, choose
from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import latest_notes
from sync_jax.runtime.processes import Processes


def prepare(config: ConfigDict) -> None:
    """Obtains and prepares the config's dataset; once is enough.

    Raises:
        InputError: it cannot be had.
    """
    catalogue.make_ready(config.data)
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
        if not catalogue.is_ready(config.data):
            catalogue.make_ready(config.data)
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
    info = catalogue.dataset_info(config.data)
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


def check_sizes(config: ConfigDict) -> None:
    """Checks what depends on how large the dataset is.

    Of a folder of pictures that is not prepared, what the files' names tell.

    Raises:
        InputError: naming the field, the value and what would do.
    """
    info = catalogue.dataset_info(config.data)
    if info is None:
        info = pictures.listed_info(config.data)
    if info is None:
        return
    held_out = calibration_size(config.data, info.num_train)
    train_size = info.num_train - held_out
    if train_size < info.num_classes or held_out < info.num_classes:
        raise InputError(
            f"config.data.calibration_size={config.data.calibration_size}: {info.name} has "
            f"{info.num_train} training examples of {info.num_classes} classes; both parts need "
            f"one of each, so use {info.num_classes} to {info.num_train - info.num_classes}"
        )
    if config.train.batch_size > train_size:
        raise InputError(
            f"config.train.batch_size={config.train.batch_size} is more than the {train_size} "
            f"training examples"
        )
    if config.train.epochs * train_size >= 2**31:  # data.resident counts positions in 32 bits
        raise InputError(
            f"config.train.epochs={config.train.epochs:g} must be less than "
            f"{2**31 / train_size:.0f} with {train_size} training examples"
        )
