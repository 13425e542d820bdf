"""Predictions of a network on a split, batch by batch."""

from collections.abc import Callable

import jax
import numpy as np
from jax import Array

from sync_jax.data.splits import Part
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions


def predict(
    part: Part,
    outputs_of: Callable[[np.ndarray], dict[str, Array]],
    batch_size: int,
    *,
    share: slice | None = None,
) -> Predictions:
    """Outputs for every example exactly once, whatever the batch size.

    Args:
        part: n examples.
        outputs_of: images `[batch_size, height, width, channels]` uint8 to a dict of arrays
            `[batch_size, ...]`. The last batch is filled up with zeros, whose outputs are dropped.
        batch_size: examples at a time.
        share: rows of each batch that this process gives to `outputs_of`, which returns all.

    Raises:
        InputError: no examples.
    """
    size = len(part.labels)
    if size == 0:
        raise InputError("there are no examples to predict")
    rows: list[dict[str, np.ndarray]] = []
    pending: dict[str, Array] | None = None
    first, last, _ = (share or slice(None)).indices(batch_size)
    for start in range(0, size, batch_size):
        images = part.images[min(start + first, size) : min(start + last, size)]
        padding = last - first - len(images)
        if padding:
            images = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        following = outputs_of(images)
        if pending is not None:  # fetched while the device works on the next
            rows.append(jax.device_get(pending))
        pending = following
    rows.append(jax.device_get(pending))
    outputs = {
        name: np.concatenate([row[name] for row in rows])[:size].astype(np.float32)
        for name in rows[0]
    }
    return Predictions(outputs, part.labels, part.index)
