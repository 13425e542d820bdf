"""Prepared data: digests that tell damage, folders that cannot be written, and removal."""

import contextlib
import errno
import os

import numpy as np
import pytest

from sync_jax.data import registry
from sync_jax.data.prepare import digests, staging
from sync_jax.errors import InputError
from sync_jax.runtime.files import locked
from tests.command_line import QUICKSTART, run
from tests.data import idx_files
from tests.data.pictures import prepared, section, write_pictures


@pytest.fixture
def album(tmp_path):
    """The `data` section of prepared pictures, whose stored squares are larger than the input."""
    write_pictures(tmp_path / "pictures", {"train": 4, "test": 2})
    data = section("image_folder", tmp_path, image_size=8, stored_size=10)
    prepared(data)
    return data


@pytest.fixture
def clothes(tmp_path):
    upstream = idx_files.publish(tmp_path / "published")
    made = idx_files.dataset(tmp_path / "data", upstream, tmp_path / "published")
    made.prepare(str)
    return made.section


def loaded(data):
    """All that a training and its evaluation read, by both ways."""
    found = {}
    for split in ("train", "test"):
        for decode in (True, False):
            parts = registry.dataset(data).load(split, decode=decode)
            found[split, decode] = [np.asarray(part[:]) for part in parts]
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key, arrays in first.items():
        for one, other in zip(arrays, second[key], strict=True):
            np.testing.assert_array_equal(one, other)


def files(data):
    root = registry.dataset(data).folder
    return sorted(path for path in root.rglob("*") if path.is_file())


@contextlib.contextmanager
def read_only(path, **named):
    """In place of `locked`, for root may write everywhere."""
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    yield


@pytest.mark.parametrize("name", ["album", "clothes"])
def test_a_byte_that_flips_in_any_prepared_file_is_noticed(name, request):
    data = request.getfixturevalue(name)
    loaded(data)
    paths = files(data)
    suffixes = {path.name.rpartition(".")[2] for path in paths}
    assert {"json", "array_record-00000-of-00001"} <= suffixes
    assert ("npy" in suffixes) == (name == "album")
    for path in paths:
        good = path.read_bytes()
        for place in (0, len(good) // 3, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            with pytest.raises(InputError, match="delete") as caught:
                loaded(data)
            assert "\n" not in str(caught.value)
        path.write_bytes(good)
    loaded(data)


def test_a_large_file_is_hashed_in_pieces_to_the_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_PIECE", 4)
    path = tmp_path / "x"
    seen = set()
    for content in (b"abcdefghij", b"abcdefghiJ", b"efghabcdij", b"abcdefgh", b"abcdefghi", b""):
        path.write_bytes(content)
        digests.write(tmp_path, {"x": path})
        seen.add(digests.read(tmp_path)["files"]["x"])
    assert len(seen) == 6


@pytest.mark.parametrize("name", ["album", "clothes"])
def test_what_an_earlier_version_prepared_is_given_digests(name, request, monkeypatch, capsys):
    data = request.getfixturevalue(name)
    expected, paths = loaded(data), files(data)
    for path in registry.dataset(data).folder.rglob("digests.json"):
        path.unlink()
    before = files(data)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(staging, "locked", read_only)
        assert_same(loaded(data), expected)
        lines = capsys.readouterr().out.splitlines()
        assert "Read-only file system" in lines[0]
        assert len(lines) == {"album": 6, "clothes": 4}[name]  # of four loads, and for two squares
        assert all(line.endswith("has no digests, and is used as it is") for line in lines)
        assert files(data) == before
    assert_same(loaded(data), expected)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {"album": 2, "clothes": 1}[name]  # squares have their own
    assert all(line.endswith("was prepared without digests; computing them") for line in lines)
    assert files(data) == paths
    assert_same(loaded(data), expected)
    assert capsys.readouterr().out == ""


def test_a_folder_that_cannot_be_written_serves_what_it_has(album, monkeypatch, capsys):
    """Without squares they are decoded; with them nothing is locked, for nothing is made."""
    before = files(album)
    with monkeypatch.context() as patch:
        patch.setattr(staging, "locked", read_only)
        decoded = loaded(album)
        uncut = registry.dataset(album).load("train")[0].uncut()[:]
        assert "Read-only file system" in capsys.readouterr().out
        assert files(album) == before
    assert_same(loaded(album), decoded)
    monkeypatch.setattr(staging, "locked", read_only)
    images, _ = registry.dataset(album).load("train")
    assert uncut.shape == (12, 10, 10, 3)
    np.testing.assert_array_equal(images.uncut()[:], uncut)
    assert registry.dataset(album).is_prepared()
    registry.dataset(album).prepare(str)


# --mode=clean


@pytest.fixture
def cache(album, clothes, tmp_path):
    """Both data sets, what else we leave there, and what is not ours; returns the command line."""
    root, outside = tmp_path / "data", tmp_path / "outside"
    for folder in (
        outside / "fashion_mnist" / "1.0.0",
        root / "downloads" / "cifar10",
        root / "incomplete-fashion_mnist-abc_1234",
        root / "mnist" / "3.0.1",
        root / "downloads" / "manual",  # where TFDS has users put files
    ):
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text('{"moduleName": "its.own"}')
    ours = next(root.glob("fashion_mnist/*/dataset_info.json")).read_bytes()
    (outside / "fashion_mnist" / "1.0.0" / "dataset_info.json").write_bytes(ours)
    (root / "linked").symlink_to(outside / "fashion_mnist")
    (root / "downloads" / "linked").symlink_to(outside)
    (root / "downloads" / "cifar10" / "linked").symlink_to(outside)
    return ["--mode=clean", f"--config.data.data_dir={root}"]


def test_clean_lists_what_is_there_and_removes_what_is_named(cache, album, tmp_path, capsys):
    key = registry.dataset(album).folder.relative_to(tmp_path / "data")
    ours = ["downloads/cifar10", "fashion_mnist/1.0.0", str(key)]
    ours.append("incomplete-fashion_mnist-abc_1234")
    capsys.readouterr()
    assert run(*cache) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0].rstrip(":") for line in lines[1:-2]] == ours
    assert lines[2].endswith(f", from {tmp_path / 'published'}")
    assert lines[3].endswith(f", from {tmp_path / 'pictures'}")
    assert lines[-2] == "  and what is not removed here: linked, mnist"
    others = sorted(
        path
        for path in tmp_path.rglob("*")
        if key.parts[0] not in path.parts and path.name != f"{key.parts[1]}.lock"
    )
    assert run(*cache, f"--remove={key}") == 0
    assert not registry.dataset(album).is_prepared()
    assert sorted(tmp_path.rglob("*")) == others  # neither its folders nor its lock are left
    assert run(*cache, "--remove=all") == 0
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        *("downloads", "linked", "mnist")
    ]
    assert (tmp_path / "data" / "downloads" / "manual" / "dataset_info.json").is_file()
    assert len(list((tmp_path / "outside").rglob("*"))) == 3


def test_clean_refuses_what_it_does_not_list(cache, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    for name in (
        *("../..", "..", ".", "/", "*", "fashion_mnist", "mnist/3.0.1", "linked/1.0.0"),
        *("downloads/linked", "downloads/manual", "downloads/../fashion_mnist/1.0.0"),
        str(tmp_path),
    ):
        assert run(*cache, "--remove=fashion_mnist/1.0.0", f"--remove={name}") == 2
        assert f"--remove={name}: " in capsys.readouterr().err
    assert run(QUICKSTART, "--remove=all") == 2
    assert "--remove belongs to --mode=clean" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_clean_leaves_what_a_process_makes_or_reads(cache, album, clothes, tmp_path, capsys):
    reader = registry.dataset(album)
    reader.load("train")
    with locked(tmp_path / "data" / "fashion_mnist.lock"):
        assert run(*cache, "--remove=all") == 2
    line = capsys.readouterr().err
    assert f"fashion_mnist/1.0.0 is used by process {os.getpid()} on " in line
    assert f"{reader.folder.name} is used by another process" in line
    assert reader.is_prepared()
    assert registry.dataset(clothes).is_prepared()
    assert not (tmp_path / "data" / "downloads" / "cifar10").exists()
    del reader
    assert run(*cache, "--remove=all") == 0
    assert not registry.dataset(album).is_prepared()
