"""Copies and groups: found, told, and kept on one side."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sync_jax.data import registry, splits
from sync_jax.data.prepare import copies
from sync_jax.data.splits import grouped_split, stratified_split
from sync_jax.errors import InputError
from tests.data import pictures
from tests.data.pictures import pixels, prepared


def write(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(seed)).save(path)


def section(folder, **changes):
    return pictures.section("image_folder", folder, **changes)


def parts(data):
    dataset = registry.dataset(data)
    train, calibration = splits.load_train_and_calibration(dataset, data)
    return {"train": train, "calibration": calibration, "test": splits.load_test(dataset)}


def contents(part):
    return [image.tobytes() for image in part.images[:]]


# --- Copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("duplicates", ["group", "keep"])
def test_pictures_that_are_stored_four_times_do_not_leak(tmp_path, duplicates):
    """The trial of a user: with 'keep', the control, most test pictures were trained on."""
    for label in ("ant", "bee"):
        for i in range(15):
            for copy in range(4):
                name = f"{copy}-{i}{'<b>' if i == 7 else ''}.png"  # a page must not believe it
                write(tmp_path / "pictures" / label / name, 100 * (label == "bee") + i)
    data = section(tmp_path, duplicates=duplicates)
    _, lines = prepared(data)
    assert any(
        "120 pictures are equal to others, in 30 groups, such as ant/0-0.png" in x for x in lines
    )
    found = parts(data)
    assert sum(len(part.labels) for part in found.values()) == 120
    seen = {split: {*contents(part)} for split, part in found.items()}
    shared = [len(seen[x] & seen[y]) for x, y in (("train", "test"), ("train", "calibration"))]
    assert (max(shared) == 0) == (duplicates == "group")
    if duplicates == "group":
        assert not seen["calibration"] & seen["test"]
        assert len(found["test"].labels) == 24
        assert len(np.unique(found["test"].groups)) == 6
        assert (np.bincount(found["calibration"].labels) == 4).all()
        folder = registry.dataset(data).folder
        report = json.loads((folder / "data_report.json").read_text())
        page = (folder / "data_report.html").read_text()
        assert page.count("<figure>") == 4 * 30
        assert page.count("<figcaption>ant/2-7&lt;b&gt;.png</figcaption>") == 1
        assert "<b>" not in page
        assert report["equal"]["files"][0] == [f"ant/{copy}-0.png" for copy in range(4)]


def test_a_folder_for_test_keeps_its_pictures(tmp_path):
    """Copies in train and in calibration are left out, each time with a line; none with 'keep'."""
    root = tmp_path / "pictures"
    for split, seeds in {"train": range(10), "val": range(8, 14), "test": range(12, 16)}.items():
        for i in seeds:
            for label in ("ant", "bee"):
                write(root / split / label / f"{i}.png", i + 100 * (label == "bee"))
    data = section(tmp_path)
    prepared(data)
    sizes = {split: len(part.labels) for split, part in parts(data).items()}
    assert sizes == {"train": 16, "calibration": 8, "test": 8}
    info = registry.dataset(data).info()
    assert info.splits == sizes
    assert "4 pictures of train are left out" in info.note
    assert "4 pictures of calibration are left out" in info.note
    kept = section(tmp_path, duplicates="keep")
    assert registry.dataset(kept).info().splits == {"train": 20, "calibration": 12, "test": 8}
    with pytest.raises(InputError, match=r"'refuse': 16 pictures .* equal .*data_report.json"):
        registry.dataset(section(tmp_path, duplicates="refuse")).info()


def table(split, label, pixels, dhash):
    n = len(split)
    files = np.array([f"{i}.png" for i in range(n)])
    texts = [np.array(list(x)) for x in (split, pixels)]
    hashes = np.stack([np.array(dhash, np.uint64)] * 2, axis=1)
    return copies.Table(texts[0], files, np.array(label), files, texts[1], hashes, {})


def test_the_report_by_hand():
    found = copies.report(
        table(
            ["train", "train", "test", "calibration", "calibration", "train", "train"],
            [0, 1, 0, 1, 1, 0, 0],
            "aabccde",
            # The second and the third differ in two bits, the last two in three; blank ones never.
            [0b1111, 0b1111, 0b1001, 1 << 40, 1 << 40, 0b111 << 50, 0],
        )
    )
    assert found["equal"] == {
        "groups": 2,
        "pictures": 4,
        "across_splits": 0,
        "two_labels": 1,
        "within_calibration": 1,
        "files": [["0.png", "1.png"], ["3.png", "4.png"]],
    }
    near = found["nearly_equal"]
    assert near["files"] == [["0.png", "1.png", "2.png"]]
    assert (near["across_splits"], near["two_labels"]) == (1, 1)
    assert "4 pictures are equal to others, in 2 groups (1 with two labels, 1" in copies.describe(
        found
    )
    assert copies.describe(copies.report(table(["train"] * 2, [0, 1], "ab", [7 << 30, 0]))) == ""


@given(st.lists(st.integers(0, 63), min_size=1, max_size=30), st.integers(0, 2**58 - 1))
def test_nearly_equal_hashes_are_those_that_a_comparison_of_all_finds(low, high):
    halves = np.array(low, np.uint64) // np.array([[1], [4]], np.uint64)
    hashes = (halves | np.uint64(high << 6)).T
    groups = copies.nearly_equal(hashes)
    distance = np.bitwise_count(hashes[:, None] ^ hashes)
    reach = (distance <= copies.NEAR).all(axis=-1)
    for _ in low:  # and by way of others
        reach = reach @ reach
    np.testing.assert_array_equal(groups[:, None] == groups, reach)


def test_the_difference_hash_of_a_ramp_and_of_a_picture_that_is_saved_again():
    ramp = np.repeat(np.arange(0, 252, 28, dtype=np.uint8)[None, :, None], 9, 0).repeat(3, 2)
    assert copies.dhash(ramp) == (2**64 - 1) << 64  # ever brighter to the right, not down
    assert copies.dhash(ramp.swapaxes(0, 1)) == 2**64 - 1
    assert copies.dhash(ramp[:, ::-1]) == 0
    smooth = np.asarray(Image.fromarray(pixels(3, 6, 6)).resize((64, 64)))
    darker = (smooth * 0.9).astype(np.uint8)
    assert int.bit_count(copies.dhash(smooth) ^ copies.dhash(darker)) <= 2 * copies.NEAR
    other = np.asarray(Image.fromarray(pixels(4, 6, 6)).resize((64, 64)))
    assert int.bit_count(copies.dhash(smooth) ^ copies.dhash(other)) > 20


# --- Groups -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("parent", "<class>/<patient>/<i>"),
        (r"^[^/]*/(p\d+)_", "<class>/<patient>_<i>"),
        (r"p\d+", "<class>/<patient>_<i>"),
    ],
)
def test_a_patient_is_on_one_side(tmp_path, group, names):
    for patient in range(12):
        for i in range(4):
            name = names.replace("<patient>", f"p{patient}").replace("<i>", str(i))
            path = name.replace("<class>", "ant" if patient % 2 else "bee")
            write(tmp_path / "pictures" / f"{path}.png", 10 * patient + i)
    data = section(tmp_path, group=group, calibration_size=8)
    prepared(data)
    found = parts(data)
    assert {split: len(part.labels) for split, part in found.items()} == {
        "train": 32, "calibration": 8, "test": 8,
    }  # fmt: skip
    dataset = registry.dataset(data)
    for split, part in {"train": found["calibration"], "test": found["test"]}.items():
        for image, file in zip(part.images[:], dataset.files(split)[part.index], strict=True):
            assert np.array_equal(image, np.asarray(Image.open(tmp_path / "pictures" / file)))
    groups = [{*part.groups.tolist()} for part in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 12
    assert all((np.bincount(part.labels) > 0).all() for part in found.values())
    assert "--config.data.group=parent" not in registry.dataset(data).info().note
    alone = registry.dataset(section(tmp_path, calibration_size=8))
    assert alone.groups("train") is None
    assert ("--config.data.group=parent" in alone.info().note) == (group == "parent")
    for bad, message in {
        "(": "no regular expression",
        "q": "matches no path, such as ant/",
    }.items():
        with pytest.raises(InputError, match=message):
            registry.dataset(section(tmp_path, group=bad)).info()


def test_groups_that_would_be_whole_classes_are_refused(tmp_path):
    """A folder per class has no groups: 'parent' would put each class on one side."""
    for i in range(24):
        write(tmp_path / "pictures" / ("ant" if i % 2 else "bee") / f"{i}.png", i)
    data = section(tmp_path, group="parent")
    prepared(data)
    with pytest.raises(InputError, match=r"'parent': each class lies in one folder"):
        registry.dataset(data).info()


@given(
    labels=st.lists(st.integers(0, 2), min_size=2, max_size=60),
    number=st.integers(1, 30),
    share=st.floats(0.05, 0.6),
    seed=st.integers(0, 100),
)
def test_whole_groups_are_held_out(labels, number, share, seed):
    labels = np.array(labels)
    groups = np.random.default_rng(seed).integers(0, number, len(labels))
    holdout = round(share * len(labels))
    kept, held_out = grouped_split(labels, groups, holdout=holdout, seed=seed)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held_out])), np.arange(len(labels)))
    assert not {*groups[kept]} & {*groups[held_out]}
    renamed = np.random.default_rng(seed + 1).permutation(number)[groups]
    again = grouped_split(labels, renamed, holdout=holdout, seed=seed)
    np.testing.assert_array_equal(held_out, again[1])
    alone = grouped_split(labels, np.arange(len(labels)), holdout=holdout, seed=seed)
    np.testing.assert_array_equal(alone[1], stratified_split(labels, holdout=holdout, seed=seed)[1])


def test_groups_are_held_out_in_proportion_and_at_random():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 300, 3000)
    labels = np.where(rng.random(3000) < 0.8, groups % 4, rng.integers(0, 4, 3000))
    counts, off = np.zeros(300), []
    for seed in range(200):
        _, held_out = grouped_split(labels, groups, holdout=600, seed=seed)
        wanted = 0.2 * np.bincount(labels)
        largest = np.bincount(groups).max()
        off.append(np.bincount(labels[held_out]) - wanted)
        assert abs(off[-1].sum()) <= largest / 2
        counts[np.unique(groups[held_out])] += 1
    assert np.abs(off).max() < 2 * largest
    assert np.abs(np.mean(off, axis=0)).max() < 1  # of 150
    # Each count is nearly binomial(200, 0.2): mean 40, standard deviation 5.7.
    assert counts.min() > 15
    assert counts.max() < 68
