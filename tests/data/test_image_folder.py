"""The user's own pictures: layouts, preparing, bad files, and what is said of them."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from sync_jax import train
from sync_jax.config import check_sizes, default_config, validate
from sync_jax.data import loading, registry
from sync_jax.data.parts import load_test, load_train_and_calibration
from sync_jax.data.prepare import pictures, records
from sync_jax.data.prepare.download import DataError
from sync_jax.data.prepare.records import INFO
from sync_jax.errors import InputError
from tests.curves import check_close
from tests.data.pictures import CLASSES, pixels, write_pictures


def section(folder, **changes):
    config = default_config()
    config.data.name = "image_folder"
    config.data.folder = str(folder / "pictures")
    config.data.data_dir = str(folder / "data")
    config.data.image_size = 12
    config.data.calibration_size = 0
    config.data.update(changes)
    return config.data


def prepare(data):
    lines = []
    registry.make_ready(data, lines.append)
    pictures.prepare_squares(data, str)
    return lines


def load(data, split):
    """Read from the squares, and decoded from the records: the same."""
    images, labels = registry.load(data, split)
    decoded, _ = registry.load(data, split, decode=True)
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
    monkeypatch.setattr("sync_jax.data.placement.free_memory", lambda mesh: 0.0)
    config = default_config()
    config.data.update(section(tmp_path))
    for placement in ("auto", "device"):
        config.data.placement = placement
        loading.prepare(config)
        made = sorted(path.name for path in tmp_path.glob("data/**/squares_*/*"))
        assert made == (["test.npy", "train.npy"] if placement == "device" else [])


@pytest.mark.parametrize(
    ("train_name", "test_name"), [("train", "test"), ("training", "val"), ("Train", "validation")]
)
def test_split_folders(tmp_path, train_name, test_name):
    written = write_pictures(tmp_path / "pictures", {train_name: 4, test_name: 2})
    data = section(tmp_path)
    assert registry.dataset_info(data) is None
    assert not registry.is_ready(data)
    lines = prepare(data)
    assert lines[0] == (
        f"image_folder: 3 classes in {tmp_path / 'pictures'}: 12 for train, 6 for test"
    )
    assert registry.is_ready(data)
    assert_holds(data, "train", written[train_name])
    assert_holds(data, "test", written[test_name])
    info = registry.dataset_info(data)
    assert (info.class_names, info.num_classes, info.image_shape) == (CLASSES, 3, (12, 12, 3))
    assert (info.num_train, info.num_test) == (12, 6)
    train_pixels = np.stack([image for image, _ in written[train_name]]) / 255
    np.testing.assert_allclose(info.mean, train_pixels.mean(axis=(0, 1, 2)), rtol=1e-9)
    np.testing.assert_allclose(info.std, train_pixels.std(axis=(0, 1, 2)), rtol=1e-9)
    assert prepare(data) == [f"image_folder: already prepared in {pictures.prepared_folder(data)}"]


def test_val_joins_train_where_there_is_a_test(tmp_path):
    written = write_pictures(tmp_path / "pictures", {"train": 3, "val": 2, "test": 1})
    data = section(tmp_path)
    prepare(data)
    assert_holds(data, "test", written["test"])
    assert registry.dataset_info(data).num_train == 15


def test_without_split_folders_a_fifth_of_each_class_is_held_out(tmp_path):
    written = write_pictures(tmp_path / "pictures", {"": 10})[""]
    data = section(tmp_path)
    prepare(data)
    found = {}
    for split in ("train", "test"):
        images, labels = load(data, split)
        np.testing.assert_array_equal(
            np.bincount(labels), [8, 8, 8] if split == "train" else [2] * 3
        )
        found |= {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert found == {image.tobytes(): label for image, label in written}


def test_a_class_may_be_called_train(tmp_path):
    write_pictures(tmp_path / "pictures", {"": 5}, classes=("car", "train"))
    data = section(tmp_path)
    prepare(data)
    assert registry.dataset_info(data).class_names == ("car", "train")


def test_folders_within_classes_hidden_and_other_files(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    ant = tmp_path / "pictures" / "train" / "ant"
    (ant / "more").mkdir()
    Image.fromarray(pixels(99)).save(ant / "more" / "x.PNG")
    (ant / ".DS_Store").write_bytes(b"")
    (ant / "notes.txt").write_text("")
    (tmp_path / "pictures" / ".cache").mkdir()
    data = section(tmp_path)
    assert prepare(data)[0].endswith("7 for train, 3 for test; 1 other files ignored")
    assert pixels(99) in load(data, "train")[0]


def test_bad_files_are_left_out_by_name(tmp_path):
    written = write_pictures(tmp_path / "pictures", {"train": 4, "test": 2})
    bad = tmp_path / "pictures" / "train" / "bee" / "002.png"
    bad.write_bytes(bad.read_bytes()[:60])
    data = section(tmp_path)
    lines = prepare(data)
    assert lines[1].startswith("image_folder: cannot be read, left out: train/bee/002.png: ")
    assert lines[2] == "image_folder: 1 of 18 pictures left out; all are in bad_files.txt"
    listed = (pictures.prepared_folder(data) / "bad_files.txt").read_text()
    assert listed.startswith("train/bee/002.png: ")
    assert_holds(data, "train", [x for i, x in enumerate(written["train"]) if i != 6])
    assert registry.dataset_info(data).num_train == 11


def test_a_class_of_bad_files_only_is_an_error(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    for path in (tmp_path / "pictures" / "train" / "bee").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="train has no readable picture of 'bee'"):
        prepare(section(tmp_path))
    assert not registry.is_ready(section(tmp_path))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({}, "0 folders of pictures"),
        ({"ant": 3}, "has 1 folder of pictures; it must hold one per class"),
        ({".": 3}, "3 pictures directly in it and 0 folders"),
        ({"ant": 7, "bee": 0}, "train has no picture of 'bee'"),
        ({"ant": 7, "bee": 4}, "a class has 4 pictures; at least 5"),
        ({"train/ant": 2, "train/bee": 2, "test/ant": 2}, "test has no picture of 'bee'"),
    ],
)
def test_other_layouts_are_refused(tmp_path, layout, message):
    (tmp_path / "pictures").mkdir()
    for folder, count in layout.items():
        (tmp_path / "pictures" / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(pixels(i)).save(tmp_path / "pictures" / folder / f"{i}.png")
    with pytest.raises(DataError, match=message) as caught:
        prepare(section(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_no_folder_and_a_file(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        prepare(section(tmp_path))
    (tmp_path / "pictures").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        prepare(section(tmp_path))


def test_changed_pictures_are_noticed_and_absent_ones_are_not_needed(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    data = section(tmp_path)
    prepare(data)
    picture = tmp_path / "pictures" / "train" / "ant" / "000.png"
    Image.fromarray(pixels(77)).save(picture)
    os.utime(picture, ns=(1, 1))
    with pytest.raises(DataError, match="have changed since they were prepared; delete"):
        registry.dataset_info(data)
    shutil.rmtree(tmp_path / "pictures")
    assert registry.dataset_info(data).num_train == 6


def test_damage_is_noticed(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    data = section(tmp_path)
    prepare(data)
    target = pictures.prepared_folder(data)
    (shard,) = target.glob("*-train.array_record-*")
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(DataError, match="delete it and prepare again"):
        registry.load(data, "train", decode=True)[0][:1]
    (target / "squares_12_12" / "train.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="is damaged"):
        registry.load(data, "train")
    (target / "labels_train.npy").unlink()
    with pytest.raises(DataError, match="delete it and prepare again"):
        registry.load(data, "train")
    (target / INFO).write_text(json.dumps({"size": 12}))
    with pytest.raises(DataError, match="is damaged"):
        registry.dataset_info(data)


def test_a_missing_file_of_records_does_not_shift_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SHARD", 3)
    write_pictures(tmp_path / "pictures", {"train": 3, "test": 1})
    data = section(tmp_path)
    registry.make_ready(data, str)
    first, *_ = sorted(pictures.prepared_folder(data).glob("*-train.array_record-*"))
    assert first.name.endswith("00000-of-00003")
    first.unlink()
    with pytest.raises(DataError, match="it has 6 records, not one for each label"):
        pictures.prepare_squares(data, str)
    with pytest.raises(DataError, match="delete it and prepare again"):
        registry.load(data, "train", decode=True)[0][:1]


def test_sizes_have_folders_of_their_own_and_a_full_disk_is_said_so(tmp_path, monkeypatch):
    write_pictures(tmp_path / "pictures", {"train": 2, "test": 1})
    small, large = section(tmp_path), section(tmp_path, image_size=24)
    prepare(small)
    prepare(large)
    assert load(large, "train")[0].shape == (6, 24, 24, 3)
    assert load(small, "train")[0].shape == (6, 12, 12, 3)
    assert pictures.prepared_folder(small) == pictures.prepared_folder(large)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"needs 0.0 MB for squares of 16 pixels, 0.0 MB are free"):
        prepare(section(tmp_path, image_size=16))
    with pytest.raises(DataError, match=r"needs 10.0 MB to prepare pictures-.*, 0.0 MB are free"):
        prepare(section(tmp_path, data_dir=str(tmp_path / "other")))


def test_sizes_are_checked_once_they_are_known(tmp_path):
    write_pictures(tmp_path / "pictures", {"train": 20, "test": 1})
    config = default_config()
    config.data = section(tmp_path)
    for check in (validate, check_sizes):  # not prepared: as the files' names say
        with pytest.raises(InputError, match="batch_size=128 is more than the 54 training"):
            check(config)
    prepare(config.data)
    with pytest.raises(InputError, match="batch_size=128 is more than the 54 training"):
        check_sizes(config)
    parts = load_train_and_calibration(config.data)
    assert [len(part.labels) for part in (*parts, load_test(config.data))] == [54, 6, 3]


@pytest.mark.slow
def test_from_a_folder_to_a_report(tmp_path, capsys):
    write_pictures(tmp_path / "pictures", {"train": 20, "test": 8})
    config = default_config()
    config.data = section(tmp_path, min_crop_area=0.5, jitter=0.2, crop_padding=1)
    config.model.width, config.model.features = 4, 8
    config.train.batch_size, config.train.epochs = 16, 2.0
    config.evaluation.batch_size = 16
    config.optimizer.warmup_epochs = 0.5
    train.train_and_evaluate(config, tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["calibration"]["n"], report["test"]["n"]) == (6, 24)
    assert "3 classes" in capsys.readouterr().out
    # Squares that are read from the disk for each batch are cropped and coloured alike.
    config.data.placement = "disk"
    train.train_and_evaluate(config, tmp_path / "disk")
    assert "images on the disk, read for each batch" in capsys.readouterr().out
    check_close(tmp_path / "run", tmp_path / "disk")
