"""The host pipeline: the same batch whatever decodes it, from wherever it starts."""

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
import scipy.stats
from PIL import Image

from sync_jax.config import default_config
from sync_jax.data import augmentation, catalogue, host, host_augmentation, pictures
from sync_jax.data.parts import load_train_and_calibration
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import ResidentSplit, epoch_constants, training_batch
from tests.data.pictures import pixels, write_pictures

PLAIN = Augmentation(0, False)
ALL = Augmentation(1, True, 20.0, 0.3, 0.3, 0.5, 0.5, 0.5, 0.5)


def examples(images, recipe=ALL, *, seed=3, epochs=9, size=12):
    labels = np.arange(len(images), dtype=np.int32) * 7 % 5
    return host.Examples(images, labels, epoch_constants(seed, epochs), seed, recipe, size)


@pytest.fixture(scope="module")
def arrays():
    return np.stack([pixels(i) for i in range(22)])


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    write_pictures(folder / "p", {"train": 9, "test": 1})
    data = default_config().data
    data.name, data.folder, data.data_dir = "image_folder", str(folder / "p"), str(folder / "d")
    data.image_size, data.calibration_size = 12, 5
    catalogue.make_ready(data, str)
    pictures.prepare_squares(data, str)
    return data


def collect(source, **options):
    return list(host.batches(source, batch_size=6, **options))


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index"}
        for name in one:
            assert one[name].dtype == other[name].dtype
            np.testing.assert_array_equal(one[name], other[name])


def test_order_and_labels_are_the_resident_pipelines(arrays):
    """Across the end of an epoch: 22 examples, batches of 6."""
    source = examples(arrays, PLAIN)
    split = ResidentSplit(jnp.asarray(arrays), jnp.asarray(source.labels))
    for step, batch in enumerate(collect(source, start=0, stop=9)):
        resident = training_batch(
            split, jnp.uint32(3), jnp.int32(step), batch_size=6, augmentation=PLAIN
        )
        for name in ("image", "label", "index"):
            np.testing.assert_array_equal(batch[name], resident[name])


def test_a_batch_depends_on_its_step_alone(arrays):
    whole = collect(examples(arrays), start=0, stop=8)
    for start in (1, 5):
        assert_same(collect(examples(arrays), start=start, stop=8), whole[start:])
    other = collect(examples(arrays, seed=4), start=0, stop=8)
    assert not np.array_equal(other[0]["image"], whole[0]["image"])


def test_the_same_example_is_augmented_anew_in_each_epoch(arrays):
    batches = collect(examples(arrays), start=0, stop=11)
    images = np.concatenate([batch["image"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    seen = [images[index == i] for i in range(22)]
    assert all(len(versions) == 3 for versions in seen)
    assert all(not np.array_equal(versions[0], versions[1]) for versions in seen)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_a_batch(arrays, processes):
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
    part, _ = load_train_and_calibration(decoded, decode=True)
    source = host.Examples(
        part.images, part.labels, epoch_constants(0, 9), 0, ALL._replace(min_crop_area=0.5), 12
    )
    threads = collect(source, start=1, stop=8)
    before = set(multiprocessing.active_children())
    batches = host.batches(source, start=1, stop=8, batch_size=6, workers=2)
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
from sync_jax.data.recipe import Augmentation
from sync_jax.data.resident import epoch_constants

if __name__ == "__main__":
    images, labels = np.zeros((22, 12, 12, 3), np.uint8), np.zeros(22, np.int32)
    source = host.Examples(images, labels, epoch_constants(0, 9), 0, Augmentation(0, False), 12)
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
        [sys.executable, path], env=environment, capture_output=True, text=True, timeout=60
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


def test_pictures_are_decoded_as_they_are_for_evaluation(decoded):
    part, calibration = load_train_and_calibration(decoded, decode=True)
    squares, _ = load_train_and_calibration(decoded)
    source = host.Examples(part.images, part.labels, epoch_constants(0, 2), 0, PLAIN, 12)
    (batch,) = host.batches(source, start=0, stop=1, batch_size=22)
    np.testing.assert_array_equal(batch["image"], part.images[:][batch["index"]])
    np.testing.assert_array_equal(batch["image"], squares.images[:][batch["index"]])
    np.testing.assert_array_equal(batch["label"], part.labels[batch["index"]])
    assert sorted(batch["index"]) == list(range(22))
    assert len(calibration.images[:3]) == 3
    assert calibration.images[5:5].shape == (0, 12, 12, 3)


# --- Host and device augment alike ----------------------------------------------------------------


def smooth(seed, size=48):
    """An image of which neighbouring pixels are close: what interpolation is for."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    waves = [
        127.5 + 60 * np.sin(7 * (a * x + b * y) + c) + 50 * np.cos(5 * (b * x - a * y))
        for a, b, c in rng.uniform(-1, 1, (3, 3))
    ]
    return np.clip(np.stack(waves, axis=-1), 0, 255).round().astype(np.uint8)


IMAGES = np.stack([smooth(i) for i in range(4)])


def compare(on_device, on_host, *, levels, share=1.0):
    """At least a share of the values within so many levels."""
    on_host = np.stack([np.asarray(x) for x in on_host]).astype(np.float32)
    difference = np.abs(np.asarray(on_device) - on_host)
    assert np.mean(difference <= levels) >= share, (difference.max(), np.mean(difference <= levels))


def on_host(function, *arguments):
    return [
        function(Image.fromarray(image), *(a[i] for a in arguments))
        for i, image in enumerate(IMAGES)
    ]


def test_colours_agree():
    images = jnp.asarray(IMAGES, jnp.float32)
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (3, 4)).astype(np.float32)
    adjusted = augmentation.adjust(images, jnp.asarray(factors).reshape(3, 4, 1, 1, 1))
    found = [
        host_augmentation.adjust(Image.fromarray(x), *f)
        for x, f in zip(IMAGES, factors.T.tolist(), strict=True)
    ]
    # Pillow rounds thrice, and its mean too: ((1 x 1.4 + 1 + 0.2) x 1.4 + 1) levels at most.
    compare(adjusted, found, levels=4.64)
    compare(augmentation.sharpen(images), on_host(host_augmentation.sharpen), levels=1.01)
    grey = [Image.fromarray(x).convert("L").convert("RGB") for x in IMAGES]
    compare(augmentation.to_grey(images), grey, levels=1.01)
    posterised = [np.asarray(x) & np.uint8(0xC0) for x in IMAGES]
    compare(augmentation.posterise(images), posterised, levels=0)
    assert len(np.unique(posterised)) == 4


def test_rotations_agree():
    angles = np.asarray([-33.0, -10.0, 12.5, 35.0])
    turned = augmentation.rotate(jnp.asarray(IMAGES), jnp.deg2rad(jnp.asarray(angles, jnp.float32)))
    # A pixel whose source lies between two may be either's; at the border that is black or not.
    compare(turned, on_host(host_augmentation.rotate, angles.tolist()), levels=12, share=0.97)
    wrong = on_host(host_augmentation.rotate, (-angles).tolist())
    with pytest.raises(AssertionError):
        compare(turned, wrong, levels=12, share=0.97)


def test_perspectives_agree():
    rng = np.random.default_rng(1)
    corners = [host_augmentation.random_corners(rng, 48, 48) for _ in IMAGES]
    moved = augmentation.perspective(jnp.asarray(IMAGES), jnp.asarray(corners, jnp.float32))
    compare(moved, on_host(host_augmentation.perspective, corners), levels=3, share=0.97)
    still = [(0, 0), (47, 0), (47, 47), (0, 47)]
    np.testing.assert_allclose(
        augmentation.perspective(jnp.asarray(IMAGES), jnp.asarray([still] * 4, jnp.float32)),
        IMAGES,
        atol=0.01,
    )
    # By hand: the corner of the picture is at the place that it was moved to.
    for image, result, places in zip(IMAGES, moved, corners, strict=True):
        for (x, y), (u, v) in zip(places, still, strict=True):
            np.testing.assert_allclose(result[int(y), int(x)], image[v, u], atol=1.5)


def test_crops_agree():
    rng = np.random.default_rng(2)
    boxes = np.asarray([host_augmentation.random_box(rng, 48, 48, 0.2) for _ in IMAGES])
    left, top, width, height = boxes.T
    resized = augmentation.crop_and_resize(
        jnp.asarray(IMAGES), jnp.asarray(np.stack([top, left, height, width], 1), jnp.float32), 32
    )
    found = [
        Image.fromarray(x).crop((a, b, a + w, b + h)).resize((32, 32), Image.Resampling.BILINEAR)
        for x, (a, b, w, h) in zip(IMAGES, boxes.tolist(), strict=True)
    ]
    compare(resized, found, levels=1.01)


@pytest.mark.parametrize("size", [(40, 40), (60, 30)])
def test_boxes_are_distributed_as_on_the_device(size):
    rng = np.random.default_rng(3)
    boxes = np.asarray([host_augmentation.random_box(rng, *size, 0.08) for _ in range(4000)])
    images = jnp.zeros((4000, size[1], size[0], 1), jnp.uint8)
    others = np.asarray(augmentation.random_boxes(jax.random.key(0), images, 0.08))
    left, top, width, height = boxes.T
    assert np.all((left >= 0) & (top >= 0) & (left + width <= size[0]) & (top + height <= size[1]))
    for ours, theirs in (
        (width * height, others[:, 2] * others[:, 3]),
        (width / height, others[:, 3] / others[:, 2]),
        (left, others[:, 1]),
        (top, others[:, 0]),
    ):
        assert scipy.stats.ks_2samp(ours, theirs).statistic < 0.05


def test_rates_are_those_asked_for():
    """Of each operation alone, on both sides: how often an image changes."""
    images = np.repeat(IMAGES[:1], 600, axis=0)
    for field, probability in (
        ("flip", 0.5),
        ("sharpen", 0.3),
        ("grey", 0.3),
        ("perspective", 0.3),
        ("posterise", 0.3),
    ):
        recipe = PLAIN._replace(**{field: True if field == "flip" else probability})
        device = np.asarray(augmentation.augment(jax.random.key(1), jnp.asarray(images), recipe))
        rng = np.random.default_rng(4)
        image = Image.fromarray(images[0])
        ours = np.stack([host_augmentation.augment(rng, image, recipe, 48) for _ in images])
        for results in (device, ours):
            changed = np.mean(np.any(results != images, axis=(1, 2, 3)))
            if field == "perspective":  # corners may be moved by nothing, one time in 28,561
                assert changed <= probability + 0.07
            assert abs(changed - probability) < 0.07, field


def test_grey_pictures_of_one_channel():
    image = Image.fromarray(IMAGES[0, ..., 0])
    recipe = ALL._replace(crop_padding=2)
    result = host_augmentation.augment(np.random.default_rng(0), image, recipe, 20)
    assert result.shape == (20, 20, 1)
    assert result.dtype == np.uint8
