"""The data of a run: prepared, placed, read, and fed to the training steps."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sync_jax.data import host
from sync_jax.data.info import Dataset, DatasetInfo, contents
from sync_jax.data.placement import Placement, choose
from sync_jax.data.resident import ResidentSplit, epoch_constants, put_on_devices
from sync_jax.data.splits import Part, load_train_and_calibration, part_sizes
from sync_jax.errors import InputError
from sync_jax.runtime import sharding
from sync_jax.runtime.checkpoint import latest_notes
from sync_jax.runtime.console import say
from sync_jax.runtime.processes import Processes


def prepare(config: ConfigDict, dataset: Dataset) -> None:
    """Obtains and prepares a config's dataset, with squares where this run would need them."""
    dataset.prepare()
    info = known_info(dataset)
    say(f"{info.name}: {contents(info.class_names, info.splits, info.note)}")
    if info.squares_bytes is None:
        return
    placement = decide(config, dataset, sharding.make_mesh())
    if not placement.decoded:
        dataset.load("train")
    say(placement.reason)


def load_data(
    config: ConfigDict, dataset: Dataset, mesh: Mesh, workdir: Path | None, processes: Processes
) -> tuple[Placement, Part, Part]:
    """Places the training images, and reads the training and the calibration part.

    All processes call it. The checkpoints in `workdir` say where the images of a run were.
    """

    def make_ready() -> None:
        if (known := dataset.info()) is not None:
            check_sizes(config, known)
        if not dataset.is_prepared():
            dataset.prepare()
            check_sizes(config, known_info(dataset))

    processes.together("preparing the data", make_ready)
    # One for all: each would decide by its own free memory.
    decided = processes.from_first(
        "where the images are to be",
        lambda: dataclasses.asdict(decide(config, dataset, mesh, workdir)),
    )
    placement = Placement(**decided)
    train, calibration = processes.together(
        "reading the data",
        lambda: load_train_and_calibration(dataset, config.data, decode=placement.decoded),
    )
    return placement, train, calibration


def decide(
    config: ConfigDict, dataset: Dataset, mesh: Mesh, workdir: Path | None = None
) -> Placement:
    """Places the training images as `data.placement` says; a run that goes on keeps its place."""
    section = config.data.copy_and_resolve_references()
    notes = latest_notes(workdir / "checkpoints") if workdir else None
    if notes is not None and section.placement == "auto":
        # Its crops would be others elsewhere, and free memory changes.
        section.placement = notes.get("placement", "auto")  # earlier versions noted otherwise
    return choose(section, known_info(dataset), mesh)


def check_sizes(config: ConfigDict, info: DatasetInfo) -> None:
    """Raises an InputError where the config does not fit the size of the dataset."""
    if info.num_calibration and config.data.calibration_size:
        raise InputError(
            f"config.data.calibration_size={config.data.calibration_size}: {info.name} has a "
            f"calibration split of {info.num_calibration} examples, which is used whole; use 0"
        )
    train_size, held_out = part_sizes(config.data, info)
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


def known_info(dataset: Dataset) -> DatasetInfo:
    """The info of a dataset that has been prepared."""
    info = dataset.info()
    if info is None:
        raise InputError("the dataset is not prepared; --mode=prepare does it")
    return info


def training_feed(
    part: Part,
    config: ConfigDict,
    placement: Placement,
    mesh: Mesh,
    *,
    start: int,
    total_steps: int,
) -> Iterator[ResidentSplit | dict[str, jax.Array]]:
    """Yields what each step after `start` takes: the resident split, or the host's batch."""
    images = part.images if isinstance(part.images, np.ndarray) else part.images.uncut()
    if placement.on_device:
        split = put_on_devices(images, part.labels, mesh, sharded=placement.sharded)
        while True:
            yield split
    batch_size = config.train.batch_size
    examples = host.Examples(
        images,
        part.labels,
        epoch_constants(config.seed, -(-total_steps * batch_size // len(part.labels))),
        config.seed,
        float(config.data.min_crop_area) if placement.decoded else 1.0,
    )
    for batch in host.batches(
        examples,
        start=start,
        stop=total_steps,
        batch_size=batch_size,
        process=jax.process_index(),
        processes=jax.process_count(),
        workers=config.data.workers if placement.decoded else 0,
    ):
        whole = batch | {"mask": np.ones(len(batch["label"]), np.float32)}
        yield {
            name: jax.make_array_from_process_local_data(sharding.batch_sharding(mesh), array)
            for name, array in whole.items()
        }
