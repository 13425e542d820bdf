"""The host pipeline beside bare decoding of the same JPEGs, pictures per second and core.

    python -m benchmarks.host_pipeline              # under a minute
    taskset -c 0 python -m benchmarks.host_pipeline # one core

Makes smooth, noisy JPEGs of 500 x 375 pixels and quality 90, prepares them as a folder of pictures,
and reads them with the recipe of configs/imagenet100.py: records, decoding, random resized crops to
224 pixels, batches of 64; flips and colours are the device's part. With data.placement=disk it
reads the squares that were made of them, and the device crops too. Bare decoding is Pillow's, of
the bytes in memory, in as many threads. The stages, one thread each, say where the rest goes. All
take turns; figures are the median and the tenth and ninetieth percentile over rounds.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.step import describe_machine
from configs import imagenet100
from sync_jax.data import host, registry
from sync_jax.data.recipe import random_crop
from sync_jax.data.resident import epoch_constants
from sync_jax.runtime.memory import keep_freed_memory

BATCH, SIZE = 64, 224


def write_jpegs(folder: Path, pictures: int) -> None:
    """Pictures of two classes: noise enlarged to patterns of many sizes, and grain."""
    rng = np.random.default_rng(0)
    for i in range(pictures):
        pixels = np.zeros((375, 500, 3), np.float32)
        for coarse in (4, 16, 64):
            noise = rng.integers(0, 256, (coarse, coarse, 3), np.uint8)
            pixels += np.asarray(
                Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC), np.float32
            )
        pixels = pixels / 3 + rng.normal(0, 4, pixels.shape)
        path = folder / "train" / f"class{i % 2}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.save(path, quality=90)
        if i < 4:
            path = folder / "test" / f"class{i % 2}" / path.name
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)


def bare(data: bytes) -> Image.Image:
    """What Pillow's decoder alone does."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    keep_freed_memory()  # as the trainer
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    config = imagenet100.get_config()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_jpegs(folder / "pictures", arguments.pictures)
        data = config.data
        data.name, data.folder = "image_folder", str(folder / "pictures")
        data.data_dir = str(folder / "prepared")
        dataset = registry.dataset(data)
        dataset.prepare(str)
        images, labels = dataset.load("train", decode=True)
        squares, _ = dataset.load("train")
        area, size, constants = data.min_crop_area, data.image_size, epoch_constants(0, 2)
        examples = host.Examples(images, labels, constants, 0, area)
        read = host.Examples(squares.uncut(), labels, constants, 0, 1.0)
        encoded = [images.records[int(row)] for row in images.rows]
        decoded = [bare(x) for x in encoded[:BATCH]]
        steps = len(encoded) // BATCH
        rng = np.random.default_rng(0)
        with ThreadPool(cores) as pool:
            cases: dict[str, tuple[int, Callable[[], object]]] = {
                "bare decoding, all cores": (
                    len(encoded) // cores,
                    lambda: pool.map(lambda x: bare(x) and None, encoded, chunksize=8),
                ),
                "host pipeline, all cores": (
                    len(encoded) // cores,
                    lambda: list(host.batches(examples, start=0, stop=steps, batch_size=BATCH)),
                ),
                "squares from the disk, all cores": (
                    len(encoded) // cores,
                    lambda: list(host.batches(read, start=0, stop=steps, batch_size=BATCH)),
                ),
                "bare decoding": (BATCH, lambda: [bare(x) for x in encoded[:BATCH]]),
                "reading a record": (
                    BATCH,
                    lambda: [images.records[int(row)] for row in images.rows[:BATCH]],
                ),
                "decoding as the pipeline does": (
                    BATCH,
                    lambda: [images.picture(i) for i in range(BATCH)],
                ),
                "random resized crops": (
                    BATCH,
                    lambda: [random_crop(rng, x, area, size, size) for x in decoded],
                ),
                "one example": (BATCH, lambda: [examples(i) for i in range(BATCH)]),
            }
            taken: dict[str, list[float]] = {name: [] for name in cases}
            for i in range(arguments.rounds + 1):
                for name, (_, case) in cases.items():
                    taken[name] += [seconds(case)] if i else []  # the first round warms up
    print(describe_machine())
    print(f"{len(encoded)} JPEGs of {np.mean([len(x) for x in encoded]) / 1e3:.0f} kB")
    print(f"{'':32}{'ms a picture and core':>22}{'10 to 90 %':>18}")
    for name, (count, _) in cases.items():
        low, median, high = np.percentile(taken[name], (10, 50, 90)) / count * 1e3
        print(f"{name:32}{median:22.3f}{low:10.3f} to {high:.3f}")
    decoding = np.asarray(taken["bare decoding, all cores"])
    for name in ("host pipeline", "squares from the disk"):
        ratio = decoding / np.asarray(taken[f"{name}, all cores"])
        low, median, high = np.percentile(ratio, (10, 50, 90))
        print(f"8  {name} / bare decoding, {cores} cores: {median:.3f}   {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    main()
