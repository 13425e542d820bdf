"""Layouts: what folders, archives and tables are taken for, and what is refused."""

import csv
import io
import json
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from sync_jax.data import registry
from sync_jax.data.prepare.layouts import Source, labelled_pictures, scan
from sync_jax.errors import InputError
from tests.data import pictures
from tests.data.pictures import pixels, prepared

# --- Folders ------------------------------------------------------------------------------------


def write_tree(folder, *class_folders):
    """Empty files for pictures, five in each folder."""
    for path in class_folders:
        (folder / path).mkdir(parents=True, exist_ok=True)
        for i in range(5):
            (folder / path / f"{i}.png").touch()


@pytest.mark.parametrize(
    "folders",
    [
        {"train": "train", "test": "val"},
        {"train": "train", "test": "valid"},
        {"train": "training", "test": "validation"},
        {"train": "train", "test": "dev"},
        {"train": "train", "test": "eval"},
        {"train": "train_set", "test": "test_set"},
        {"train": "cars_train", "test": "cars_test"},
        {"train": "seg_train/seg_train", "test": "seg_test/seg_test"},
        {"train": "Train", "calibration": "Val", "test": "Test"},
        {"train": "train", "calibration": "dev", "test": "eval"},
        {"train": "train", "calibration": "calib", "test": "test"},
        {"train": "train", "calibration": "cal", "test": "val"},
    ],
    ids=lambda folders: " ".join(folders.values()),
)
def test_layouts_that_are_understood_and_the_litter_in_them(tmp_path, folders):
    names = ("ant", "bee")
    write_tree(tmp_path, *(f"{root}/{name}" for root in folders.values() for name in names))
    litter = ["__MACOSX/train/ant/0.png", "annotations/ant/0.xml", "annotations/bee/0.xml"]
    train = folders["train"]
    litter += [f"{train}/__pycache__/x.pyc", f"{train}/ant/@eaDir/0.png/THUMB.jpg"]
    litter += [f"{train}/ant/._0.png", f"{train}/bee/Thumbs.db", f"{train}/0.png", "1.png"]
    for path in litter:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    listing, ignored = scan(Source(tmp_path))
    assert listing.class_names == names
    assert {
        split: [(picture.name, picture.label) for picture in found]
        for split, found in listing.splits.items()
    } == {
        split: [(f"{root}/{n}/{i}.png", j) for j, n in enumerate(names) for i in range(5)]
        for split, root in folders.items()
    }
    assert ignored == len(litter)
    if folders["test"] in ("val", "seg_test/seg_test"):
        assert f"the test split is the folder {folders['test']!r}" in listing.note


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        ("train/ant train/bee holdout/ant holdout/bee", "beside train .* other names, holdout"),
        (
            "train/ant train/bee test/ant test/bee unlabelled/ant unlabelled/bee",
            "beside test, train lie folders of other names, unlabelled",
        ),
        ("train/ant train/bee test/ant test/bee unlabelled", "other names, unlabelled"),
        ("train test sample", "beside test, train .* other names, sample"),
        ("a_train/ant a_train/bee a_test/ant a_test/bee a_pred/a_pred", "other names, a_pred"),
        ("f1/ant f1/bee f2/ant f2/bee f3/ant f3/bee", "f1, f2, f3 .* same names, ant, bee"),
        ("a/ant a/bee b/bee b/cat", "a, b hold folders of the same names, bee"),
        ("cats/day cats/night dogs/day dogs/night", "cats, dogs .* same names, day, night"),
        ("val/ant val/bee test/ant test/bee", "test, val name splits, and none is for training"),
        ("train/ant train/bee Training/ant Training/bee", "both name the train split"),
        ("train/ant train/bee val/ant val/bee cal/ant cal/bee test/ant test/bee", "val has no use"),
    ],
)
def test_folders_that_look_like_splits_are_never_taken_for_classes(tmp_path, folders, found):
    write_tree(tmp_path / "pictures", *folders.split())
    with pytest.raises(InputError, match=rf"{found}.*calibration.* dev, .*into FOLDER/train/$"):
        scan(Source(tmp_path / "pictures"))
    if found.startswith("cats"):  # the way out
        (tmp_path / "links").mkdir()
        (tmp_path / "links" / "train").symlink_to(tmp_path / "pictures")
        listing, _ = scan(Source(tmp_path / "links"))
        assert listing.class_names == ("cats", "dogs")
        assert {split: len(found) for split, found in listing.splits.items()} == {"train": 20}


@pytest.mark.parametrize(
    "folders", ["ant/images bee/images", "ant/more bee", "ant/x ant/y bee/z", "train test_tube"]
)
def test_what_looks_like_no_split_is_a_class(tmp_path, folders):
    write_tree(tmp_path, *folders.split())
    listing, _ = scan(Source(tmp_path))
    assert listing.class_names == tuple(sorted({x.partition("/")[0] for x in folders.split()}))


@pytest.mark.parametrize("inside", ["", "train/"], ids=["classes", "splits"])
def test_a_single_folder_at_the_top_is_looked_through(tmp_path, inside):
    write_tree(tmp_path, *(f"album/{inside}{name}" for name in ("ant", "bee")))
    listing, _ = scan(Source(tmp_path))
    assert listing.class_names == ("ant", "bee")
    assert listing.splits["train"][0].name == f"album/{inside}ant/0.png"
    assert listing.note == "all is in its folder 'album'"


# --- Tables -------------------------------------------------------------------------------------


def png(seed):
    out = io.BytesIO()
    Image.fromarray(pixels(seed)).save(out, "PNG")
    return out.getvalue()


def write_rows(path, rows):
    """A table in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        delimiter = {".tsv": "\t", ".csv": ";"}[path.suffix]
        with path.open("w", newline="", encoding="utf-8-sig") as file:  # as Excel writes
            writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)


def write_all(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_a_table_of_paths_and_labels(tmp_path, suffix):
    """Its splits, whole patients on one side, and the pixels as they were."""
    rows = [
        {"Path": f"scans/{i:02}.png", "label": i % 2 + 9, "split": "val" if i > 31 else "train",
         "patient": f"p{i // 4}"}
        for i in range(40)
    ]  # fmt: skip
    write_all(tmp_path, [row["Path"] for row in rows])
    write_rows(tmp_path / f"labels{suffix}", rows)
    data = pictures.section("image_folder", tmp_path, group="patient")
    data.folder = str(tmp_path / f"labels{suffix}")
    dataset, lines = prepared(data)
    assert "has 2 classes (9, 10): 32 for train, 8 for test; the test split is 'val'" in lines[0]
    info = dataset.info()
    assert info.splits == {"train": 32, "test": 8}
    images, labels = dataset.load("test")
    np.testing.assert_array_equal(images[:], [pixels(i) for i in range(32, 40)])
    np.testing.assert_array_equal(labels, [0, 1] * 4)
    assert dataset.files("test")[0] == "scans/32.png"
    np.testing.assert_array_equal(
        np.diff(dataset.groups("train")) != 0, [*[0, 0, 0, 1] * 7, 0, 0, 0]
    )
    data.group = "doctor"
    with pytest.raises(InputError, match=r"a column \(patient\), 'parent', or a regular"):
        registry.dataset(data).info()


ROWS = [{"file_name": f"{i}.png", "label": "ab"[i % 2]} for i in range(10)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "1.png", "label": "a"}], "no column of files, only name, label; name it by"),
        ([{"path": "1.png", "dx": "a"}], "no column of labels, only path, dx; name it by"),
        ([*ROWS, {"file_name": "11.png", "label": "a"}], "1 of the 11 .* not there, such as 11"),
        ([*ROWS, {"file_name": "1.png", "label": ""}], "row 11 has no label"),
        ([ROWS[0], ROWS[2]], "no two classes for training, only a"),
        ([x | {"split": "train" if i else "new"} for i, x in enumerate(ROWS)], "other names, new"),
        ([x | {"split": "test"} for x in ROWS], "test name splits, and none is for training"),
    ],
)  # fmt: skip
def test_tables_that_are_not_understood(tmp_path, rows, message):
    write_all(tmp_path, [row["file_name"] for row in ROWS])
    write_rows(tmp_path / "x.csv", rows)
    with pytest.raises(InputError, match=message):
        scan(Source(tmp_path / "x.csv"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,label\n1.png,a\n2.png\n", "row 3 has 1 fields, and there are 2 names"),
        ("file_name,label\n", "has no rows"),
        ("", "cannot be read as a table"),
        ("label,label\n1,2\n", "two columns have the same name"),
        ('file_name,label\n"1.png,a\n', "cannot be read as a table"),
        ("file_name,label\n\xff,a\n", "cannot be read as a table"),
    ],
)
def test_tables_that_are_damaged(tmp_path, text, message):
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        scan(Source(tmp_path / "x.csv"))


def test_columns_by_the_names_that_the_user_gives(tmp_path):
    write_all(tmp_path, [row["file_name"] for row in ROWS])
    write_rows(tmp_path / "x.csv", [{"id": x["file_name"], "dx": x["label"]} for x in ROWS])
    listing, _ = scan(Source(tmp_path / "x.csv", file_column="id", label_column="dx"))
    assert [(x.name, x.label) for x in listing.splits["train"][:2]] == [("0.png", 0), ("1.png", 1)]
    with pytest.raises(InputError, match=r"'dy': x\.csv has no such column; it has id, dx"):
        scan(Source(tmp_path / "x.csv", file_column="id", label_column="dy"))
    known, note = labelled_pictures(
        Source(tmp_path / "x.csv", file_column="id", label_column="dx"), ("b", "a", "c")
    )
    assert [(x.name, x.label) for x in known[:2]] == [("0.png", 1), ("1.png", 0)]
    assert note == "none of c"


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("where", ["root", "splits", "split column", "folders as classes"])
def test_metadata_as_hugging_face_has_it(tmp_path, where, suffix):
    """One beside the split folders, or one in each; labels may also be folders."""
    classes = where == "folders as classes"
    rows = {
        split: [
            {"file_name": f"{'ab'[i % 2]}/{i}.png" if classes else f"{i}.png", "site": f"s{i % 3}"}
            | ({} if classes else {"label": "ab"[i % 2]})
            for i in range(4)
        ]
        for split in ("train", "test")
    }
    write_all(tmp_path, [f"{split}/{row['file_name']}" for split in rows for row in rows[split]])
    (tmp_path / "train" / "more.png").write_bytes(png(1))
    if where in ("splits", "folders as classes"):
        for split in rows:
            write_rows(tmp_path / split / f"metadata{suffix}", rows[split])
    else:
        extra = where == "split column"
        write_rows(
            tmp_path / f"metadata{suffix}",
            [
                row
                | {"file_name": f"{split}/{row['file_name']}"}
                | ({"split": split} if extra else {})
                for split in rows
                for row in rows[split]
            ],
        )  # fmt: skip
    listing, others = scan(Source(tmp_path))
    assert listing.class_names == ("a", "b")
    assert listing.columns == ("site",)
    assert others == 1
    for split, found in listing.splits.items():
        by_name = {
            f"{split}/{x['file_name']}": (i % 2, (x["site"],)) for i, x in enumerate(rows[split])
        }
        assert {x.name: (x.label, x.extra) for x in found} == by_name
    assert [*listing.splits] == ["train", "test"]


# --- Archives -----------------------------------------------------------------------------------


def write_archive(path, members):
    if path.suffix == ".tar":
        path.write_bytes(pictures.tar(members))
        return
    with zipfile.ZipFile(path, "w") as archive:
        for i, (name, data) in enumerate(members.items()):
            method = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)[i % 2]
            archive.writestr(name, data, compress_type=method)


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_an_archive_is_read_in_its_place(tmp_path, suffix):
    """With its own folder at the top, litter, and a table in it; nothing is unpacked."""
    members = {f"album/train/{'ab'[i % 2]}/{i}.png": png(i) for i in range(8)}
    members |= {f"./album/val/{'ab'[i % 2]}/{i}.png": png(i) for i in range(8, 12)}
    litter = {"__MACOSX/album/train/a/._0.png": b"x", "album/README.txt": b"x"}
    write_archive(tmp_path / f"album{suffix}", members | litter)
    data = pictures.section("image_folder", tmp_path)
    data.folder = str(tmp_path / f"album{suffix}")
    dataset, lines = prepared(data)
    assert lines[0].endswith(
        "has 2 classes (a, b): 8 for train, 4 for test; all is in its folder 'album'; the test "
        "split is the folder 'val'; 2 other files ignored"
    )
    images, labels = dataset.load("test")
    np.testing.assert_array_equal(labels, [0, 0, 1, 1])
    np.testing.assert_array_equal(images[:], [pixels(i) for i in (10, 8, 11, 9)])
    assert not [x for x in tmp_path.iterdir() if x.name not in ("data", f"album{suffix}")]
    assert registry.dataset(data).info().num_train == 8  # unchanged
    write_archive(tmp_path / f"album{suffix}", members)
    with pytest.raises(InputError, match="have changed since they were prepared"):
        registry.dataset(data).info()
    table = "file_name,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(10))
    flat = {"metadata.csv": table.encode()} | {f"{i}.png": png(i) for i in range(10)}
    write_archive(tmp_path / f"flat{suffix}", flat)
    listing, _ = scan(Source(tmp_path / f"flat{suffix}"))
    assert [x.label for x in listing.splits["train"]] == [0, 1] * 5
    assert [x.read() for x in listing.splits["train"]] == [png(i) for i in range(10)]


def test_archives_that_are_refused(tmp_path):
    good = {f"{'ab'[i % 2]}/{i}.png": png(i) for i in range(10)}
    write_archive(tmp_path / "up.zip", good | {"../c/0.png": png(0)})
    (tmp_path / "x.tar.gz").touch()
    (tmp_path / "x.zip").write_bytes(b"PK nothing")
    (tmp_path / "x.tar").write_bytes(b"nothing" * 200)
    (tmp_path / "x.pdf").touch()
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a/0.png", png(0))
    for name, message in {
        "up.zip": r"is unsafe: it has a member named '../c/0.png'",
        "x.tar.gz": r"is compressed as a whole, .* unpack it, or make it a .zip or .tar",
        "x.zip": "cannot be read as a zip archive",
        "x.tar": "cannot be read as a tar archive",
        "x.pdf": r"no folder of pictures, no archive \(.zip, .tar\) and no table \(.csv",
        "lzma.zip": "compressed in a rare way",
        "gone.zip": "does not exist",
    }.items():
        with pytest.raises(InputError, match=message):
            scan(Source(tmp_path / name))


def test_a_member_that_expands_to_more_than_it_says_is_cut_off(tmp_path):
    """A picture of a zip archive takes no more memory than its directory says."""
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/0.png", bytes(1_000_000))
        for i in range(10):
            archive.writestr(f"{'ab'[i % 2]}/{i + 1}.png", png(i))
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (77).to_bytes(4, "little")
    path.write_bytes(data)
    listing, _ = scan(Source(path))
    assert len(listing.splits["train"][0].read()) == 77
    assert [x.read() for x in listing.splits["train"][1:3]] == [png(0), png(2)]
