"""The data of each training step, from whichever pipeline."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sync_jax.data import host
from sync_jax.data.placement import Placement
from sync_jax.data.resident import ResidentSplit, epoch_constants, put_on_devices
from sync_jax.data.splits import Part
from sync_jax.runtime.sharding import batch_sharding


def training_feed(
    part: Part,
    config: ConfigDict,
    placement: Placement,
    mesh: Mesh,
    *,
    start: int,
    total_steps: int,
) -> Iterator[ResidentSplit | dict[str, jax.Array]]:
    """Yields what each step takes: the resident split, or the host's batch.

    Args:
        part: the training examples.
        config: of the run.
        placement: of their images.
        mesh: the devices.
        start: steps done.
        total_steps: of the run.
    """
    images = part.images if isinstance(part.images, np.ndarray) else part.images.uncut()
    if placement.on_device:
        split = put_on_devices(images, part.labels, mesh, sharded=placement.sharded)
        yield from itertools.repeat(split)
        return
    batch_size, count = config.train.batch_size, len(part.labels)
    examples = host.Examples(
        images,
        part.labels,
        epoch_constants(config.seed, -(-total_steps * batch_size // count)),
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
            name: jax.make_array_from_process_local_data(batch_sharding(mesh), array)
            for name, array in whole.items()
        }
