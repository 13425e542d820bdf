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

Example = dict[str, np.ndarray]

_BLOCK = 1024  # places of the order computed at once: of one alone NumPy takes half a decoding


@dataclasses.dataclass(frozen=True)
class Examples:
    """Training examples by position.

    Attributes:
        images: `[n, ...]`.
        labels: `[n]` int32.
        constants: see `resident.epoch_constants`.
        seed: of the crops.
        min_crop_area: of resized crops to the shape of the images; 1 for none.
    """

    images: Images
    labels: np.ndarray
    constants: np.ndarray
    seed: int
    min_crop_area: float
    _rows: dict[tuple[int, int], np.ndarray] = dataclasses.field(default_factory=dict, init=False)

    def __call__(self, position: int) -> Example:
        """Gives image `[height, width, channels]` uint8, label and index `[]` int32."""
        epoch, place = divmod(position, len(self.labels))
        row = self._row(epoch, place)
        return {
            "image": self._image(row, position),
            "label": self.labels[row],
            "index": np.int32(row),
        }

    def _row(self, epoch: int, place: int) -> int:
        first = place - place % _BLOCK
        rows = self._rows.get((epoch, first))
        if rows is None:
            size = len(self.labels)
            places = np.arange(first, min(first + _BLOCK, size), dtype=np.uint32)
            rows = shuffled(places, self.constants[epoch], size)
            if len(self._rows) >= 8:
                self._rows.clear()
            self._rows[epoch, first] = rows
        return int(rows[place - first])

    def _image(self, row: int, position: int) -> np.ndarray:
        images = self.images
        encoded = isinstance(images, DecodedPictures)
        if self.min_crop_area == 1 or len(images.shape) == 2:
            return images.square(row) if encoded else images[row]
        key = np.asarray([self.seed, position], np.uint64)
        if encoded:
            picture = images.picture(row)
        else:
            pixels = images[row]
            picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
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
) -> Iterator[Example]:
    """Yields this process's share of the batches of steps `start` to `stop` - 1.

    Args:
        examples: by position.
        start: first step.
        stop: the step after the last one.
        batch_size: of all processes together; a multiple of `processes`.
        process: number of this process.
        processes: how many there are.
        workers: processes that decode; 0: threads, one for each core.
    """
    share = batch_size // processes

    def position(element: int) -> int:
        step, place = divmod(element, share)
        return step * batch_size + process * share + place

    cores = os.cpu_count() or 1
    dataset = (
        grain.MapDataset.range(start * share, stop * share)
        .map(position)
        .map(examples)
        .batch(share, drop_remainder=True)
    )
    # An element is a batch by now: few are enough, and each takes a batch's memory.
    threads = grain.ReadOptions(
        num_threads=1 if workers else cores, prefetch_buffer_size=2 if workers else cores + 2
    )
    ordered = dataset.to_iter_dataset(threads)
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
