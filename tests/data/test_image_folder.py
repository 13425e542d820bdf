"""The user's own pictures: layouts, preparing, bad files, and what is said of them."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from sync_jax import train, trainer
from sync_jax.config import default_config
from sync_jax.data import loading, registry, splits
from sync_jax.data.datasets import image_folder
from sync_jax.data.prepare import pictures as prepare_pictures
from sync_jax.data.prepare.layouts import Source, scan
from sync_jax.errors import InputError
from sync_jax.evaluation.predictions import Predictions
from sync_jax.runtime import sharding
from sync_jax.runtime.processes import Processes
from tests.data import pictures
from tests.data.pictures import CLASSES, pixels, prepared, write_pictures


def section(folder, **changes):
    return pictures.section("image_folder", folder, **changes)


def load(data, split):
    """Read from the squares, and decoded from the records: the same."""
    dataset = registry.dataset(data)
    images, labels = dataset.load(split)
    decoded, _ = dataset.load(split, decode=True)
    assert images.shape == decoded.shape == (len(labels), *images[:1].shape[1:])
    np.testing.assert_array_equal(images[:], decoded[:])
    return images[:], labels


def assert_holds(data, split, written):
    images, labels = load(data, split)
    np.testing.assert_array_equal(images, [image for image, _ in written])
    np.testing.assert_array_equal(labels, [label for _, label in written])


def test_preparing_makes_squares_that_only_another_machine_has_memory_for(tmp_path, monkeypatch):
    """What --mode=prepare does on a laptop for a slice: placement, or the laptop's memory says."""
    write_pictures(tmp_path / "pictures", {"train": 4, "test": 2})
    monkeypatch.setattr("sync_jax.data.placement.free_memory", lambda mesh: 5e3)
    config = default_config()
    config.data.update(section(tmp_path, calibration_size=3))
    config.train.batch_size = 60_000  # of a training, which is not what is asked for
    for placement in ("auto", "device"):
        config.data.placement = placement
        monkeypatch.setattr("sync_jax.data.placement._free_disk", lambda folder: 100)
        loading.prepare(config, registry.dataset(config.data))
        made = sorted(path.name for path in tmp_path.glob("data/**/squares_*/*.npy"))
        assert made == (["test.npy", "train.npy"] if placement == "device" else [])
    config.data.calibration_size = 60_000
    loading.prepare(config, registry.dataset(config.data))


@pytest.mark.parametrize(("train_name", "test_name"), [("train", "test"), ("Training", "val")])
def test_split_folders(tmp_path, monkeypatch, train_name, test_name):
    written = write_pictures(tmp_path / "pictures", {train_name: 4, test_name: 2})
    data = section(tmp_path)
    dataset = registry.dataset(data)
    assert not dataset.is_prepared()
    with pytest.raises(InputError, match=r"is not prepared: .*--mode=prepare .*data.folder=FOLDER"):
        dataset.load("train")
    scanned = []
    monkeypatch.setattr(image_folder, "scan", lambda source: scanned.append(source) or scan(source))
    assert dataset.info().num_train == 12  # as the files' names tell
    lines = []
    dataset.prepare(lines.append)
    note = "; the test split is the folder 'val'" if test_name == "val" else ""
    assert lines[0] == (
        f"image_folder: {tmp_path / 'pictures'} has 3 classes (ant, bee, cat & dog): 12 for train, "
        f"6 for test{note}"
    )
    assert dataset.is_prepared()
    assert_holds(data, "train", written[train_name])
    assert_holds(data, "test", written[test_name])
    scanned.clear()
    dataset = registry.dataset(data)
    info = dataset.info()
    assert dataset.is_prepared()
    dataset.prepare()
    dataset.load("train")
    dataset.load("test", decode=True)
    assert len(scanned) == 1  # once is enough for a run
    assert (info.class_names, info.num_classes, info.image_shape) == (CLASSES, 3, (12, 12, 3))
    assert (info.stored_shape, info.squares_bytes) == ((12, 12, 3), 0)
    assert (info.num_train, info.num_test, info.num_calibration) == (12, 6, 0)
    assert info.note == note.removeprefix("; ")  # also when it was prepared long ago
    train_pixels = np.stack([image for image, _ in written[train_name]]) / 255
    np.testing.assert_allclose(info.mean, train_pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(info.std, train_pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    dataset, lines = prepared(data)
    assert lines == [f"image_folder: already prepared in {dataset.folder}"]


@pytest.mark.parametrize("name", ["val", "calibration"])
def test_a_calibration_folder_is_the_calibration_part_whole(tmp_path, monkeypatch, capsys, name):
    """However the pictures are read; but for one that is broken."""
    written = write_pictures(tmp_path / "pictures", {"train": 4, name: 3, "test": 2})
    (tmp_path / "pictures" / name / "bee" / "001.png").write_bytes(b"no picture")
    del written[name][4]
    data = section(tmp_path)
    dataset, _ = prepared(data)
    info = dataset.info()
    assert info.splits == {"train": 12, "calibration": 8, "test": 6}
    train_pixels = np.stack([image for image, _ in written["train"]]) / 255
    np.testing.assert_allclose(info.mean, train_pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    for decode in (False, True):
        parts = splits.load_train_and_calibration(dataset, data, decode=decode)
        for part, split in zip(parts, ("train", name), strict=True):
            np.testing.assert_array_equal(part.images[:], [image for image, _ in written[split]])
            np.testing.assert_array_equal(part.labels, [label for _, label in written[split]])
            np.testing.assert_array_equal(part.index, np.arange(len(written[split])))
    # What is placed are the twelve training pictures, and squares are made of all.
    config = default_config()
    config.data, config.train.batch_size = data, 12
    monkeypatch.setattr("sync_jax.data.placement.free_memory", lambda mesh: 2 * 12 * 12 * 12 * 3)
    assert loading.decide(config, dataset, sharding.make_mesh()).on_device
    loading.prepare(config, dataset)
    note = "" if name == "calibration" else "; the calibration split is the folder 'val'"
    assert (
        "image_folder: 3 classes (ant, bee, cat & dog): 12 for train, 8 for calibration, 6 for "
        f"test{note}\n"
    ) in capsys.readouterr().out
    assert registry.dataset(section(tmp_path, image_size=6)).info().squares_bytes == (
        26 * 6 * 6 * 3 + 3 * 128
    )
    config.data.calibration_size = 3
    with pytest.raises(InputError, match=r"has a calibration split of 8 .* used whole; use 0"):
        loading.check_sizes(config, info)


def test_without_split_folders_a_fifth_of_each_class_is_held_out(tmp_path):
    written = write_pictures(tmp_path / "pictures", {"": 10})[""]
    data = section(tmp_path)
    prepared(data)
    found = {}
    for split in ("train", "test"):
        images, labels = load(data, split)
        np.testing.assert_array_equal(
            np.bincount(labels), [8, 8, 8] if split == "train" else [2] * 3
        )
        found |= {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert found == {image.tobytes(): label for image, label in written}


def test_a_test_split_that_lacks_a_class_or_has_one_more(tmp_path):
    """The first is a line, the second refused or dropped; training needs all of its classes."""
    root = tmp_path / "pictures"
    write_pictures(root, {"train": 4})
    write_pictures(root / "test", {"": 3}, classes=("ant", "bee", "dodo"))
    with pytest.raises(InputError, match=r"test has classes that train has not, dodo; --config"):
        registry.dataset(section(tmp_path)).prepare()
    data = section(tmp_path, unknown_classes="drop", duplicates="keep")
    dataset, _ = prepared(data)
    info = dataset.info()
    assert info.splits == {"train": 12, "test": 6}
    assert info.class_names == CLASSES
    assert "3 pictures of test are dropped, of unknown classes (dodo)" in info.note
    assert "test has no picture of cat & dog" in info.note
    np.testing.assert_array_equal(load(data, "test")[1], [0, 0, 0, 1, 1, 1])
    shutil.rmtree(root / "train" / "bee")
    (root / "train" / "bee").mkdir()
    with pytest.raises(InputError, match=r"the folder train/bee has no picture; known are .jpg"):
        scan(Source(root, drop_unknown=True))
    shutil.rmtree(root / "test" / "ant")
    shutil.rmtree(root / "train" / "bee")
    shutil.rmtree(root / "test" / "bee")
    with pytest.raises(InputError, match="test has no picture of any class of train"):
        scan(Source(root, drop_unknown=True))


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path / "pictures", {"": 5}, classes=("car", "train"))
    assert registry.dataset(section(tmp_path)).info().class_names == ("car", "train")


def test_folders_within_classes_hidden_and_other_files(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    ant = tmp_path / "pictures" / "train" / "ant"
    (ant / "more").mkdir()
    Image.fromarray(pixels(99)).save(ant / "more" / "x.PNG")
    (ant / ".DS_Store").write_bytes(b"")
    (ant / "notes.txt").write_text("")
    (tmp_path / "pictures" / ".cache").mkdir()
    data = section(tmp_path)
    assert prepared(data)[1][0].endswith("7 for train, 3 for test; 2 other files ignored")
    assert pixels(99) in load(data, "train")[0]


def test_changed_pictures_are_noticed_and_absent_ones_are_not_needed(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    data = section(tmp_path)
    prepared(data)
    picture = tmp_path / "pictures" / "train" / "ant" / "000.png"
    Image.fromarray(pixels(77)).save(picture)
    os.utime(picture, ns=(1, 1))
    with pytest.raises(InputError, match="have changed since they were prepared, or an earlier"):
        registry.dataset(data).info()
    shutil.rmtree(tmp_path / "pictures")
    assert registry.dataset(data).info().num_train == 6


def test_a_missing_file_of_records_does_not_shift_the_others(tmp_path, monkeypatch):
    """tests/bad_input has what is cut short or garbled."""
    monkeypatch.setattr(prepare_pictures, "SHARD", 3)
    write_pictures(tmp_path / "pictures", {"train": 3, "test": 1})
    dataset, _ = prepared(section(tmp_path))
    sorted(dataset.folder.glob("*-train.array_record-*"))[0].unlink()
    for message in ("FileNotFoundError: .*-train", "it has 6 records, not one for each label"):
        with pytest.raises(InputError, match=message):
            dataset.load("train")
        (dataset.folder / "digests.json").unlink()  # as an earlier version left it
    assert not list(dataset.folder.glob("squares_*"))


def test_sizes_have_folders_of_their_own_and_a_full_disk_is_said_so(tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    small, large = section(tmp_path), section(tmp_path, image_size=24)
    assert prepared(small)[0].folder == prepared(large)[0].folder
    assert load(large, "train")[0].shape == (6, 24, 24, 3)
    assert load(small, "train")[0].shape == (6, 12, 12, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    middle = registry.dataset(section(tmp_path, image_size=16))
    assert middle.info().squares_bytes == (6 + 3) * 16 * 16 * 3 + 2 * 128
    with pytest.raises(InputError, match=r"needs 0.0 MB for squares of 16 pixels, 0.0 MB are free"):
        middle.load("train")


@pytest.mark.slow
def test_pictures_may_move_while_a_run_waits(tmp_path, capsys):
    """A stopped or finished run goes on in another place, and with no other pictures."""
    write_pictures(tmp_path / "pictures", {"train": 20, "test": 8})
    config = default_config()
    config.data = section(tmp_path, placement="device")
    config.model.name, config.model.width, config.model.features = "mlp", 4, 8
    config.train.batch_size, config.train.epochs = 16, 1.0
    config.evaluation.batch_size = 16
    config.optimizer.warmup_epochs = 0.5
    trainer.resolve(config)
    dataset, workdir = registry.dataset(config.data), tmp_path / "run"
    with train.prepared(config, dataset, workdir, Processes()) as job:
        start = train.begin(job)
        notes = {"config": config.to_dict(), "unlogged": [], "placement": "device"}
        job.checkpoints.save(start.state, 0, notes=notes, score=None)
    shutil.move(tmp_path / "pictures", tmp_path / "moved")
    config.data.folder = str(tmp_path / "moved")
    train.train_and_evaluate(config, workdir)
    assert "resuming at step 0" in capsys.readouterr().out
    shutil.move(tmp_path / "moved", tmp_path / "again")
    config.data.folder = str(tmp_path / "again")
    train.train_and_evaluate(config, workdir)
    assert "holds a finished run" in capsys.readouterr().out
    write_pictures(tmp_path / "others", {"train": 19, "test": 8})
    config.data.folder = str(tmp_path / "others")
    with pytest.raises(InputError, match="holds a run on other data"):
        train.train_and_evaluate(config, workdir)
    config.data.folder = str(tmp_path / "gone")
    with pytest.raises(InputError, match="gone' does not exist"):
        train.train_and_evaluate(config, workdir)


@pytest.mark.slow
def test_from_a_folder_to_a_report(tmp_path, capsys):
    """By squares that are read from the disk for each batch; cropped and coloured on the device."""
    write_pictures(tmp_path / "pictures", {"train": 20, "val": 2, "test": 8})
    config = default_config()
    config.data = section(tmp_path, min_crop_area=0.5, jitter=0.2, crop_padding=1, placement="disk")
    config.model.name, config.model.width, config.model.features = "mlp", 4, 8
    config.train.batch_size, config.train.epochs = 16, 1.0
    config.evaluation.batch_size = 16
    config.optimizer.warmup_epochs = 0.5
    train.train_and_evaluate(config, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "60 training and 6 calibration images of 3 classes (ant, bee, cat & dog); mlp" in shown
    assert "; the calibration split is the folder 'val'\n" in shown
    assert "images on the disk, read for each batch" in shown
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["calibration"]["n"], report["test"]["n"]) == (6, 24)
    lines = (tmp_path / "run" / "examples.csv").read_text().splitlines()
    assert lines[0] == "split,row,index,file,class"
    assert [lines[1], lines[6]] == [
        "calibration,0,0,val/ant/000.png,ant",
        "calibration,5,5,val/cat & dog/001.png,cat & dog",
    ]
    assert lines[7 + 9] == "test,9,9,test/bee/001.png,bee"
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["pictures"] == 90
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Copies among the pictures" in page
    assert "Equal pictures are on one side only" in page
    assert len(lines) == 1 + 6 + 24
    # Elsewhere, without the cache and the pictures: the test split again, one of them broken.
    shutil.rmtree(tmp_path / "data")
    shutil.move(tmp_path / "pictures" / "test", tmp_path / "site")
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "site" / "bee" / "003.png").write_bytes(b"no picture")
    Image.fromarray(pixels(5)).save(tmp_path / "site" / "ant" / "dodo.png")
    other = config.copy_and_resolve_references()
    other.data.folder = str(tmp_path / "site")
    capsys.readouterr()
    train.evaluate(other, tmp_path / "run")
    shown = capsys.readouterr().out
    assert "25 pictures of" in shown
    assert "left out: bee/003.png: it is no picture of a known kind" in shown
    assert "80 % coverage by SR" in shown
    there = Predictions.load(tmp_path / "run" / "elsewhere" / "site" / "predictions_test.npz")
    test = Predictions.load(tmp_path / "run" / "predictions_test.npz")
    names = (tmp_path / "run" / "elsewhere" / "site" / "examples.csv").read_text().splitlines()
    same = [i for i, line in enumerate(names[1:]) if "dodo" not in line]
    for name, output in test.outputs.items():  # bit for bit, as the padding is another
        np.testing.assert_array_equal(there.outputs[name][same], np.delete(output, 11, axis=0))
    before = json.loads((tmp_path / "run" / "report.json").read_text())
    after = json.loads((tmp_path / "run" / "elsewhere" / "site" / "report.json").read_text())
    points = [
        x["scores"]["softmax_response"]["operating_point"]["threshold"] for x in (before, after)
    ]
    assert points[0] == points[1]
    (tmp_path / "site" / "dodo").mkdir()
    shutil.move(tmp_path / "site" / "ant" / "dodo.png", tmp_path / "site" / "dodo" / "1.png")
    with pytest.raises(InputError, match=r"does not know, dodo; its own are ant, bee, cat & dog"):
        train.evaluate(other, tmp_path / "run")
    other.data.unknown_classes = "drop"
    train.evaluate(other, tmp_path / "run")
    assert "without 1 of unknown classes (dodo)" in capsys.readouterr().out
