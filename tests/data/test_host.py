"""The host pipeline: the same batch whatever decodes it, from wherever it starts."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sync_jax.data import augmentation, host, registry
from sync_jax.data.recipe import TRIES, Augmentation, random_boxes, random_crop
from sync_jax.data.resident import (
    ResidentSplit,
    augmentation_key,
    epoch_constants,
    training_batch,
)
from sync_jax.data.splits import load_train_and_calibration
from tests.data.pictures import pixels, prepared, section, write_pictures

PLAIN = Augmentation(0, False)


def examples(images, min_crop_area=0.3, *, seed=3, epochs=9):
    labels = np.arange(len(images), dtype=np.int32) * 7 % 5
    return host.Examples(images, labels, epoch_constants(seed, epochs), seed, min_crop_area)


@pytest.fixture(scope="module")
def arrays():
    return np.stack([pixels(i) for i in range(22)])


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    write_pictures(folder / "pictures", {"train": 9, "test": 1})
    data = section("image_folder", folder, calibration_size=5)
    prepared(data)
    return data


def train_part(data, **options):
    return load_train_and_calibration(registry.dataset(data), data, **options)[0]


def collect(source, **options):
    return list(host.batches(source, batch_size=6, **options))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


@pytest.mark.parametrize(
    "recipe", [PLAIN, Augmentation(1, True, 20.0, 1.0, 0.3, 0.5, 0.5, 0.5, 0.5)]
)
def test_without_resized_crops_a_batch_is_the_resident_pipelines(arrays, recipe):
    """Across the end of an epoch: 22 examples, batches of 6."""
    source, seed = examples(arrays, 1.0), jnp.uint32(3)
    split = ResidentSplit(jnp.asarray(arrays), jnp.asarray(source.labels))
    resident = jax.jit(functools.partial(training_batch, batch_size=6, augmentation=recipe))

    @jax.jit
    def augmented(image, step):
        return augmentation.augment(augmentation_key(seed, step), image, recipe, cropped=True)

    for step, batch in enumerate(collect(source, start=0, stop=6)):
        expected = resident(split, seed, jnp.int32(step))
        batch["image"] = augmented(batch["image"], jnp.int32(step))
        for name in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[name], expected[name])


def test_a_batch_depends_on_its_step_alone(arrays):
    whole = collect(examples(arrays), start=0, stop=8)
    for start in (1, 5):
        assert_same(collect(examples(arrays), start=start, stop=8), whole[start:])
    other = collect(examples(arrays, seed=4), start=0, stop=8)
    assert not np.array_equal(other[0]["image"], whole[0]["image"])


def test_the_same_example_is_cropped_anew_in_each_epoch(arrays):
    # Large enough that no two random boxes are the same by chance.
    batches = collect(examples(arrays.repeat(8, axis=1).repeat(8, axis=2)), start=0, stop=11)
    images = np.concatenate([batch["image"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    seen = [images[index == i] for i in range(22)]
    assert all(len(versions) == 3 for versions in seen)
    assert all(len(np.unique(versions, axis=0)) == 3 for versions in seen)


def test_processes_share_a_batch(arrays):
    processes = 3
    whole = collect(examples(arrays), start=2, stop=5)
    shares = [
        collect(examples(arrays), start=2, stop=5, process=i, processes=processes)
        for i in range(processes)
    ]
    for step, batch in enumerate(whole):
        for name, expected in batch.items():
            joined = np.concatenate([share[step][name] for share in shares])
            np.testing.assert_array_equal(joined, expected)


@pytest.mark.slow
def test_worker_processes_change_nothing(decoded):
    part = train_part(decoded, decode=True)
    source = host.Examples(part.images, part.labels, epoch_constants(0, 30), 0, 0.5)
    threads = collect(source, start=1, stop=30)
    before = set(multiprocessing.active_children())
    batches = host.batches(source, start=1, stop=30, batch_size=6, workers=2)
    first = [next(batches), next(batches)]  # of either worker
    # A whole process group is asked to stop; its run goes on until it has saved.
    workers = set(multiprocessing.active_children()) - before
    assert workers
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert_same([*first, *batches], threads)


ORPHANS = """
import multiprocessing, os, signal, sys
import numpy as np
from sync_jax.data import host
from sync_jax.data.resident import epoch_constants

if __name__ == "__main__":
    images, labels = np.zeros((22, 12, 12, 3), np.uint8), np.zeros(22, np.int32)
    source = host.Examples(images, labels, epoch_constants(0, 9), 0, 1.0)
    batches = host.batches(source, start=0, stop=9, batch_size=6, workers=1)
    next(batches)
    print(*[worker.pid for worker in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_workers_end_with_their_run_however_it_ends(tmp_path):
    path = tmp_path / "orphans.py"
    path.write_text(ORPHANS)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    workers = [int(word) for word in done.stdout.split()]
    assert workers
    deadline = time.monotonic() + 30
    while any(runs(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(runs(worker) for worker in workers)


def runs(process: int) -> bool:
    """Whether it is there and no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_from_the_disk_come_the_resident_pipelines_batches(decoded):
    """Squares of 12 pixels of which 10 are used, cropped by the same random numbers."""
    data = decoded.copy_and_resolve_references()
    data.image_size, data.stored_size = 10, 12
    part = train_part(data)
    squares = part.images.uncut()
    source = host.Examples(squares, part.labels, epoch_constants(3, 9), 3, 1.0)
    split = ResidentSplit(jnp.asarray(squares[:]), jnp.asarray(part.labels))
    recipe, seed = Augmentation(1, True, 0.0, 0.3, 0.3), jnp.uint32(3)
    options = {"augmentation": recipe, "size": 10}
    resident = jax.jit(functools.partial(training_batch, batch_size=6, **options))

    @jax.jit
    def augmented(image, step):
        return augmentation.augment(augmentation_key(seed, step), image, **options)

    for step, batch in enumerate(collect(source, start=0, stop=5)):
        assert batch["image"].shape == (6, 12, 12, 3)
        expected = resident(split, seed, jnp.int32(step))
        np.testing.assert_array_equal(augmented(batch["image"], jnp.int32(step)), expected["image"])
        np.testing.assert_array_equal(batch["label"], expected["label"])


def test_pictures_are_decoded_as_they_are_for_evaluation(decoded):
    part, calibration = load_train_and_calibration(registry.dataset(decoded), decoded, decode=True)
    squares = train_part(decoded)
    source = host.Examples(part.images, part.labels, epoch_constants(0, 2), 0, 1.0)
    (batch,) = host.batches(source, start=0, stop=1, batch_size=22)
    np.testing.assert_array_equal(batch["image"], part.images[:][batch["index"]])
    np.testing.assert_array_equal(batch["image"], squares.images[:][batch["index"]])
    np.testing.assert_array_equal(batch["label"], part.labels[batch["index"]])
    assert sorted(batch["index"]) == list(range(22))
    assert len(calibration.images[:3]) == 3
    assert calibration.images[5:5].shape == (0, 12, 12, 3)


# --- Random resized crops -------------------------------------------------------------------------


def test_boxes_are_the_devices():
    """The same draws give the same boxes; of a picture that no try fits, the middle."""
    rng = np.random.default_rng(3)
    shapes = (500, TRIES), (500, TRIES), (500,), (500,)
    draws = [rng.random(shape, np.float32) for shape in shapes]
    found = jax.jit(lambda draws: random_boxes(draws, 30, 60, 0.08))(draws)
    np.testing.assert_array_equal(random_boxes(draws, 30, 60, 0.08), found)
    assert np.ptp(found, axis=0).min() > 10
    np.testing.assert_array_equal(random_boxes(draws, 10, 100, 1.0), [[0, 43, 10, 13]] * 500)


def test_a_crop_is_pillows():
    """A box of the picture, resized; by hand, and of a grey one."""
    image = Image.fromarray(np.stack([pixels(i) for i in range(3)], axis=1).reshape(-1, 36, 3))
    rng = np.random.default_rng(5)
    draws = [rng.random(shape) for shape in ((1, TRIES), (1, TRIES), 1, 1)]
    top, left, height, width = random_boxes(draws, *image.size[::-1], 0.3)[0]
    box = image.crop((left, top, left + width, top + height))
    found = random_crop(np.random.default_rng(5), image, 0.3, 7, 9)
    np.testing.assert_array_equal(found, box.resize((9, 7), Image.Resampling.BILINEAR))
    grey = random_crop(np.random.default_rng(5), image.convert("L"), 0.3, 7, 7)
    assert grey.shape == (7, 7, 1)
