"""ImageNet-100, Stanford Cars and Food-101 from small files in exactly the published layouts."""

import gzip
import io
import shutil
import threading

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image

from sync_jax.data import registry
from sync_jax.data.datasets import imagenet100
from sync_jax.data.images import square
from sync_jax.data.prepare import pictures, records
from sync_jax.data.prepare.archives import Picture
from sync_jax.data.splits import load_test, load_train_and_calibration
from sync_jax.errors import InputError
from tests.data.pictures import pixels, prepared, section, tar

WNIDS = imagenet100.class_names()


class Stopped(Exception):  # noqa: N818
    """In place of a kill."""


def jpeg(seed, width=16, height=12, mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).convert(mode).save(out, "JPEG", quality=90)
    return out.getvalue()


def decoded(data, size=12):
    with Image.open(io.BytesIO(data)) as image:
        return square(image.convert("RGB"), size, size)


def assert_holds(data, split, expected):
    """Every pixel and label, by both ways of reading; expected: (encoded, label) in order."""
    for decode in (False, True):
        images, labels = registry.dataset(data).load(split, decode=decode)
        np.testing.assert_array_equal(labels, [label for _, label in expected])
        assert labels.dtype == np.int32
        np.testing.assert_array_equal(images[:], [decoded(encoded) for encoded, _ in expected])


# --- ImageNet-100 ---------------------------------------------------------------------------------


def validation_numbers():
    """The first validation picture of each class, and one of no class of ours."""
    truth = imagenet100._validation_labels()
    first = {wnid: truth.index(wnid) + 1 for wnid in WNIDS}
    other = next(n for n, wnid in enumerate(truth, 1) if wnid not in first)
    return first, other


@pytest.fixture(scope="module")
def imagenet():
    """(encoded, label) of each split as they must come back, and the files by their names."""
    train = {
        wnid: {f"{wnid}_{i}.JPEG": jpeg(1000 * label + i) for i in (10, 2)}
        for label, wnid in enumerate(WNIDS)
    }
    # What the real archive has too: a grey one, one of CMYK, and a PNG called JPEG.
    train[WNIDS[0]][f"{WNIDS[0]}_10.JPEG"] = jpeg(1, mode="L")
    train[WNIDS[1]][f"{WNIDS[1]}_10.JPEG"] = jpeg(2, mode="CMYK")
    png = io.BytesIO()
    Image.fromarray(pixels(3)).save(png, "PNG")
    train[WNIDS[2]][f"{WNIDS[2]}_10.JPEG"] = png.getvalue()
    numbers, other = validation_numbers()
    val = {f"ILSVRC2012_val_{n:08}.JPEG": jpeg(n) for n in (*numbers.values(), other)}
    expected = {
        "train": [
            (train[wnid][name], label)
            for label, wnid in enumerate(WNIDS)
            for name in sorted(train[wnid])
        ],
        "test": [
            (val[f"ILSVRC2012_val_{numbers[wnid]:08}.JPEG"], label)
            for label, wnid in enumerate(WNIDS)
        ],
    }
    return expected, train, val, numbers


def write_imagenet(folder, imagenet, layout):
    _, train, val, numbers = imagenet
    if layout == "tar":
        folder.mkdir(parents=True)
        inner = {f"{wnid}.tar": tar(files) for wnid, files in sorted(train.items())}
        # Of classes that are not ours nothing is looked at.
        inner = {"n00000001.tar": b"no archive at all" * 60} | inner | {"n99999999.tar": b""}
        (folder / "ILSVRC2012_img_train.tar").write_bytes(tar(inner))
        (folder / "ILSVRC2012_img_val.tar").write_bytes(tar(val))
        return
    root = folder / ("ILSVRC/Data/CLS-LOC" if layout == "Kaggle" else "")
    for wnid, files in train.items():
        (root / "train" / wnid).mkdir(parents=True)
        for name, data in files.items():
            (root / "train" / wnid / name).write_bytes(data)
    (root / "train" / "n00000001").mkdir()
    for wnid, number in numbers.items():
        target = root / "val" / (wnid if layout == "folders" else "")
        target.mkdir(parents=True, exist_ok=True)
        name = f"ILSVRC2012_val_{number:08}.JPEG"
        (target / name).write_bytes(val[name])


@pytest.mark.parametrize("layout", ["tar", "folders", "Kaggle"])
def test_imagenet_comes_back_from_every_layout_in_the_same_order(tmp_path, imagenet, layout):
    write_imagenet(tmp_path / "source", imagenet, layout)
    data = section("imagenet100", tmp_path)
    dataset, lines = prepared(data)
    assert lines[1:3] == [
        f"imagenet100: 100 classes ({', '.join(WNIDS[:5])}, ...): 200 for train, 100 for test",
        "imagenet100: published are 126,689 and 5,000",
    ]
    assert_holds(data, "train", imagenet[0]["train"])
    assert_holds(data, "test", imagenet[0]["test"])
    info = dataset.info()
    assert (info.num_train, info.num_test, info.class_names) == (200, 100, WNIDS)
    assert info.mean == (0.485, 0.456, 0.406)
    assert not list((tmp_path / "data").glob("incomplete*"))
    parts = (*load_train_and_calibration(dataset, data), load_test(dataset))
    assert [part.images.shape for part in parts] == [(n, 12, 12, 3) for n in (180, 20, 100)]
    for part, split in zip(parts, ("train", "train", "test"), strict=True):
        whole, _ = dataset.load(split)
        np.testing.assert_array_equal(part.images[3:5], whole[part.index[3:5]])


def test_tfds_reads_what_was_prepared(tmp_path, imagenet):
    write_imagenet(tmp_path / "source", imagenet, "folders")
    data = section("imagenet100", tmp_path)
    dataset, _ = prepared(data)
    source = tfds.builder_from_directory(dataset.folder).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()}
    )
    expected = imagenet[0]["train"]
    assert len(source) == len(expected)
    assert source[7]["image"] == expected[7][0]
    assert source[7]["label"] == expected[7][1]
    assert source[7]["file"].decode() == f"{WNIDS[3]}/{WNIDS[3]}_2.JPEG"


def test_the_class_list_is_the_fields():
    assert len(set(WNIDS)) == 100
    assert (WNIDS[0], WNIDS[99]) == ("n02869837", "n02090622")
    truth = imagenet100._validation_labels()
    assert len(truth) == 50_000
    assert sum(wnid in set(WNIDS) for wnid in truth) == imagenet100.Imagenet100.NUM_TEST


# --- Stanford Cars --------------------------------------------------------------------------------


def annotations(names, labels):
    """A struct array as the devkit's."""
    fields = [(name, object) for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
    rows = np.empty((1, len(names)), dtype=[*fields, ("class", object), ("fname", object)])
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        rows[0, i] = (39, 116, 569, 375, np.uint8(label + 1), name)
    return rows


CARS = ("AM General Hummer SUV 2000", "Acura RL Sedan 2012", "smart fortwo Convertible 2012")


def write_cars(folder, *, nested=True, devkit="devkit", test_annotations="withlabels"):
    expected = {}
    for split, count in (("train", 9), ("test", 6)):
        root = folder / f"cars_{split}"
        root = root / f"cars_{split}" if nested else root
        root.mkdir(parents=True)
        names = [f"{i:05}.jpg" for i in range(1, count + 1)]
        labels = [(2 * i) % 3 for i in range(count)]
        encoded = [jpeg(100 * count + i, width=20) for i in range(count)]
        for name, data in zip(names, encoded, strict=True):
            (root / name).write_bytes(data)
        expected[split] = list(zip(encoded, labels, strict=True))
        kind = "" if split == "train" else f"_{test_annotations}"
        target = folder / (devkit if split == "train" else "")
        target.mkdir(exist_ok=True)
        rows = annotations(names, labels)
        scipy.io.savemat(target / f"cars_{split}_annos{kind}.mat", {"annotations": rows})
    names = np.empty((1, 3), object)
    names[0] = CARS
    scipy.io.savemat(folder / devkit / "cars_meta.mat", {"class_names": names})
    return expected


@pytest.mark.parametrize(
    ("nested", "devkit"), [(True, "devkit"), (False, "."), (True, "car_devkit")]
)
def test_cars_come_back_in_the_annotations_order(tmp_path, nested, devkit):
    devkit = "car_devkit/devkit" if devkit == "car_devkit" else devkit
    (tmp_path / "source" / devkit).mkdir(parents=True)
    expected = write_cars(tmp_path / "source", nested=nested, devkit=devkit)
    data = section("stanford_cars", tmp_path)
    prepared(data)
    assert_holds(data, "train", expected["train"])
    assert_holds(data, "test", expected["test"])
    assert registry.dataset(data).info().class_names == CARS


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f / "cars_test"), "has no cars_test/; it must hold cars_train/"),
        (
            lambda f: (f / "cars_train/cars_train/00003.jpg").unlink(),
            "names '00003.jpg', which is n",
        ),
        (
            lambda f: scipy.io.savemat(
                f / "devkit/cars_train_annos.mat", {"annotations": annotations(["00001.jpg"], [3])}
            ),
            "00001.jpg is of class 4 of 3",
        ),
        (
            lambda f: scipy.io.savemat(
                f / "devkit/cars_train_annos.mat",
                {"annotations": annotations(["/etc/passwd"], [1])},
            ),
            "names '/etc/passwd', which is not in",
        ),
    ],
)
def test_cars_that_do_not_fit_together_are_refused(tmp_path, spoil, message):
    (tmp_path / "source").mkdir()
    write_cars(tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(InputError, match=message) as caught:
        prepared(section("stanford_cars", tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


# --- Food-101 -------------------------------------------------------------------------------------

DISHES = ("apple_pie", "baby_back_ribs")


def food_members():
    members, lists = {}, {"train": [], "test": []}
    expected = {"train": [], "test": []}
    for split, count in (("train", 5), ("test", 3)):
        for label, dish in enumerate(DISHES):
            for i in range(count):
                name = f"{dish}/{1_000_000 + 7 * i + 500 * (split == 'test')}"
                members[f"food-101/images/{name}.jpg"] = jpeg(len(members))
                lists[split].append(name)
                expected[split].append((members[f"food-101/images/{name}.jpg"], label))
    for split, names in lists.items():
        members[f"food-101/meta/{split}.txt"] = "\n".join(names).encode()
    members["food-101/meta/classes.txt"] = "\n".join(DISHES).encode()
    return members, expected


def write_food(folder, members, form):
    folder.mkdir()
    if form == "folder":
        for name, data in members.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        content = tar(members)
        path = folder / f"food-101.{form}"
        path.write_bytes(gzip.compress(content) if form == "tar.gz" else content)


@pytest.mark.parametrize("form", ["tar.gz", "tar", "folder"])
def test_food_comes_back_from_every_form(tmp_path, form):
    members, expected = food_members()
    write_food(tmp_path / "source", members, form)
    data = section("food101", tmp_path)
    prepared(data)
    assert_holds(data, "train", expected["train"])
    assert_holds(data, "test", expected["test"])
    assert registry.dataset(data).info().class_names == DISHES
    assert not list((tmp_path / "data").glob("incomplete*"))  # the decompressed archive too


# --- Preparing ------------------------------------------------------------------------------------


def test_without_data_one_message_says_what_and_how(tmp_path):
    for name, words in (
        ("imagenet100", "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar.*image-net.org"),
        ("stanford_cars", "cars_train/.*jessicali9530/stanford-cars-dataset"),
        ("food101", "food-101.tar.gz.*data.vision.ee.ethz.ch"),
    ):
        data = section(name, tmp_path, source="")
        with pytest.raises(InputError, match=words) as caught:
            prepared(data)
        text = str(caught.value)
        assert f"--config=configs/{name}.py --mode=prepare --config.data.data_dir=" in text
        assert "--config.data.source=FOLDER" in text
        assert "\n" not in text
        data.source = str(tmp_path / "nowhere")
        with pytest.raises(InputError, match="nowhere' does not exist; it must hold"):
            prepared(data)
        (tmp_path / "empty").mkdir(exist_ok=True)
        data.source = str(tmp_path / "empty")
        with pytest.raises(InputError, match=r"empty (does not hold|has no) "):
            prepared(data)
    assert not (tmp_path / "data").exists()


def test_bad_pictures_are_listed_by_name_and_left_out(tmp_path):
    members, expected = food_members()
    members["food-101/images/baby_back_ribs/1000014.jpg"] = jpeg(0)[:300]
    write_food(tmp_path / "source", members, "tar")
    data = section("food101", tmp_path)
    dataset, lines = prepared(data)
    bad = [line for line in lines if "left out" in line]
    assert bad[0].startswith("food101: cannot be read, left out: baby_back_ribs/1000014.jpg: ")
    assert bad[1] == "food101: 1 of 16 pictures left out; all are in bad_files.txt"
    listed = (dataset.folder / "bad_files.txt").read_text()
    assert listed.startswith("baby_back_ribs/1000014.jpg: ")
    assert_holds(data, "train", [x for i, x in enumerate(expected["train"]) if i != 7])
    assert registry.dataset(data).info().num_train == 9


def test_a_preparation_that_was_stopped_goes_on(tmp_path, monkeypatch):
    """Stopped in the middle of a file of records, then again in the middle of the squares."""
    monkeypatch.setattr(pictures, "SHARD", 3)
    members, expected = food_members()
    write_food(tmp_path / "source", members, "tar.gz")
    data = section("food101", tmp_path)
    read = Picture.read
    count, lock, limit = [0], threading.Lock(), 8

    def read_some(self):
        with lock:
            count[0] += self.name.endswith(".jpg")
            if count[0] > limit:
                raise Stopped
        return read(self)

    monkeypatch.setattr(Picture, "read", read_some)
    with pytest.raises(Stopped):
        prepared(data)
    assert not registry.dataset(data).is_prepared()
    (work,) = (
        p for p in (tmp_path / "data").glob("incomplete-food101-*") if "unpacked" not in p.name
    )
    finished = sorted(path.name for path in work.glob("*.json"))
    assert finished == ["train-00000.json", "train-00001.json"]
    count[0], limit = 0, 100
    _, lines = prepared(data)
    assert "food101: going on with a preparation that was stopped" in lines
    assert count[0] == 10  # of 16: the first six were not read again
    assert_holds(data, "train", expected["train"])
    assert_holds(data, "test", expected["test"])
    assert not list((tmp_path / "data").glob("incomplete*"))


def test_squares_that_were_stopped_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sync_jax.data.prepare.records._AT_ONCE", 4)
    members, expected = food_members()
    write_food(tmp_path / "source", members, "tar")
    data = section("food101", tmp_path)
    dataset, _ = prepared(data)
    asked, get = [], records.Records.__getitem__

    def get_some(self, position):
        asked.append((self.split, int(position)))
        if limit and position >= limit:
            raise Stopped
        return get(self, position)

    monkeypatch.setattr(records.Records, "__getitem__", get_some)
    limit = 6
    with pytest.raises(Stopped):
        dataset.load("train")
    asked.clear()
    limit = 0
    dataset.load("train")
    # The first is read to see that it can be.
    assert sorted({position for split, position in asked if split == "train"})[:2] == [0, 4]
    asked.clear()
    dataset.load("train")
    assert not asked
    assert_holds(data, "train", expected["train"])


def test_the_middle_of_a_larger_square(tmp_path):
    members, expected = food_members()
    write_food(tmp_path / "source", members, "tar")
    data = section("food101", tmp_path, image_size=6, short_side=12, stored_size=10)
    prepared(data)
    for decode in (False, True):
        images, _ = registry.dataset(data).load("test", decode=decode)
        assert images.shape == (6, 6, 6, 3)
        np.testing.assert_array_equal(
            images[:], [decoded(encoded)[3:9, 3:9] for encoded, _ in expected["test"]]
        )
