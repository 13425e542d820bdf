"""The host pipeline: pictures decoded and cropped, or squares read, for each batch.

An example depends on the seed and on its position, step * batch + place in the batch, alone:
threads, workers, processes and interruptions change nothing. Resized crops are made here; the rest
of the augmentation is left to the device. Nothing here computes with JAX, which a worker process
must not start.
"""

import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags
from PIL import Image

from sync_jax.data.info import Images
from sync_jax.data.prepare.records import DecodedPictures
from sync_jax.data.recipe import random_crop, shuffled

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Training examples: images `[n, ...]`, labels `[n]` int32, and how they are drawn."""

    images: Images
    labels: np.ndarray
    constants: np.ndarray  # see `resident.epoch_constants`
    seed: int  # of the crops
    min_crop_area: float  # of resized crops to the shape of the images; 1 for none

    def batch(self, positions: np.ndarray) -> Batch:
        """Gives images `[batch, height, width, channels]` uint8, labels and indices as int32."""
        size = len(self.labels)
        epochs, places = np.divmod(positions, size)
        rows = shuffled(places.astype(np.uint32), self.constants[epochs], size).astype(np.int32)
        images = [self._image(*x) for x in zip(rows.tolist(), positions.tolist(), strict=True)]
        return {"image": np.stack(images), "label": self.labels[rows], "index": rows}

    def _image(self, row: int, position: int) -> np.ndarray:
        images = self.images
        if self.min_crop_area == 1 or len(images.shape) == 2:
            return images.square(row) if isinstance(images, DecodedPictures) else images[row]
        if isinstance(images, DecodedPictures):
            picture = images.picture(row)
        else:
            pixels = images[row]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        key = np.asarray([self.seed, position], np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key))
        return random_crop(rng, picture, self.min_crop_area, *images.shape[1:3])


def batches(
    examples: Examples,
    *,
    start: int,
    stop: int,
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Yields this process's share of the batches of steps `start` to `stop` - 1.

    Batches are of `batch_size` examples of all processes together, a multiple of their number.
    With `workers`, so many processes decode; without, threads do, one for each core.
    """
    share = batch_size // processes

    def batch(step: int) -> Batch:
        return examples.batch(step * batch_size + process * share + np.arange(share))

    cores = os.cpu_count() or 1
    # An element is a batch: few are enough, and each takes a batch's memory.
    threads = grain.ReadOptions(
        num_threads=1 if workers else cores, prefetch_buffer_size=2 if workers else cores + 2
    )
    ordered = grain.MapDataset.range(start, stop).map(batch).to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, which only main.py parses
            flags.FLAGS.mark_as_parsed()
        ordered = ordered.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_end_with_the_run,
        )
    yield from ordered


def _end_with_the_run(worker: int, workers: int) -> None:
    """Lets a worker end with its run: not before, by a signal to the whole group, nor after."""
    del worker, workers
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    run = multiprocessing.parent_process()
    assert run is not None

    def end() -> None:
        run.join()  # which returns however it ended
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()
