"""Fashion-MNIST from its sources to arrays, on small files in exactly the published format."""

import contextlib
import dataclasses
import functools
import gzip
import http.server
import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath

from sync_jax.data.datasets.fashion_mnist import FashionMnist
from sync_jax.data.prepare import arrays
from sync_jax.data.prepare.arrays import ArrayBuilder
from sync_jax.errors import InputError
from tests.data import idx_files
from tests.data.idx_files import dataset

NAME = "fashion_mnist"
TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"
TEST_IMAGES = "t10k-images-idx3-ubyte"


def failure(data_dir, upstream, source=None):
    """The message of a preparation that must fail, having left nothing that looks prepared."""
    made = dataset(data_dir, upstream, source)
    with pytest.raises(InputError) as caught:
        made.prepare(str)
    assert not made.is_prepared()
    message = str(caught.value)
    assert "\n" not in message
    return message


def prepare(data_dir, upstream, source=None):
    """Prepares; returns the folder and what was said."""
    made, lines = dataset(data_dir, upstream, source), []
    made.prepare(lines.append)
    return made.folder, lines


def assert_holds(data_dir, contents):
    made = dataset(data_dir)
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images, labels = made.load(split)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        np.testing.assert_array_equal(images, contents[f"{prefix}-images-idx3-ubyte"][..., None])
        np.testing.assert_array_equal(labels, contents[f"{prefix}-labels-idx1-ubyte"])


@pytest.fixture
def published(tmp_path):
    """A folder with the published files, and what they are."""
    folder = tmp_path / "published"
    return folder, idx_files.publish(folder)


# Preparing and reading


@pytest.mark.parametrize("compressed", [True, False, "by name"])
def test_every_pixel_and_label_comes_back(tmp_path, compressed, capfd, monkeypatch):
    monkeypatch.setattr(arrays, "_READ_BATCH", 7)  # splits of several batches
    folder = tmp_path / "published"
    upstream = idx_files.publish(folder, compressed=bool(compressed))
    if compressed == "by name":  # as browsers that decompress and keep the name leave it
        path = folder / f"{TRAIN_IMAGES}.gz"
        path.write_bytes(gzip.decompress(path.read_bytes()))
    monkeypatch.setenv("HOME", str(tmp_path))
    target, lines = prepare("~/data", upstream, folder)
    assert_holds(tmp_path / "data", idx_files.arrays())
    assert target == tmp_path / "data" / NAME / "1.0.0"
    assert lines == [
        f"fashion_mnist: using the files in {folder}",
        f"fashion_mnist: prepared in {target}",
    ]
    assert sorted(os.listdir(tmp_path / "data")) == [NAME, f"{NAME}.lock"]
    assert capfd.readouterr() == ("", ""), "TFDS's progress bars and prints belong to nobody"
    assert prepare(tmp_path / "data", upstream, folder)[1] == [
        f"fashion_mnist: already prepared in {target}"
    ]


def test_reads_what_tfds_decodes(published, tmp_path):
    folder, upstream = published
    prepare(tmp_path, upstream, folder)
    images, labels = dataset(tmp_path).load("train")
    records = ArrayBuilder(FashionMnist.INFO, data_dir=tmp_path).as_data_source("train")
    assert len(records) == len(images)
    for index, record in enumerate(records):
        np.testing.assert_array_equal(record["image"], images[index])
        assert record["label"] == labels[index]


def test_needs_no_tensorflow(published, tmp_path, monkeypatch):
    folder, upstream = published

    class NoTensorFlow:
        @staticmethod
        def find_spec(name, path, target=None):
            assert name.partition(".")[0] != "tensorflow"

    epath.Path(tmp_path).exists()  # looks, once, whether it is installed
    monkeypatch.delitem(sys.modules, "tensorflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoTensorFlow, *sys.meta_path])
    prepare(tmp_path, upstream, folder)
    assert_holds(tmp_path, idx_files.arrays())


# Bad requests


def test_unprepared_data_says_what_to_do(tmp_path):
    made = dataset(tmp_path / "my data")
    with pytest.raises(InputError) as caught:
        made.load("train")
    message = str(caught.value)
    assert f"there is no {tmp_path}/my data/fashion_mnist/1.0.0" in message
    assert (
        "python -m sync_jax.main --config=configs/fashion_mnist.py --mode=prepare "
        f"--config.data.data_dir='{tmp_path}/my data'"
    ) in message
    assert "--config.data.source=FOLDER" in message
    assert all(file.name in message for file in FashionMnist.UPSTREAM.forms[0])
    assert "\n" not in message
    with pytest.raises(InputError, match=r"has no split 'validation'; choose from train, test"):
        made.load("validation")


# A named folder whose files are not the published ones


def rewrite(change, name=TRAIN_IMAGES):
    """A change of the decompressed bytes of a file."""

    def apply(folder):
        path = folder / f"{name}.gz"
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))

    return apply


def cut_compressed(folder):
    path = folder / f"{TRAIN_IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:-1000])


def flip_compressed(folder):
    path = folder / f"{TRAIN_IMAGES}.gz"
    data = bytearray(path.read_bytes())
    data[-6] ^= 1  # in the checksum that ends the file
    path.write_bytes(bytes(data))


def swap_splits(folder):
    (folder / f"{TEST_IMAGES}.gz").rename(folder / f"{TRAIN_IMAGES}.gz")


def bomb(folder):
    (folder / f"{TRAIN_IMAGES}.gz").write_bytes(gzip.compress(bytes(50_000_000)))


SIZE = 16 + 40 * 28 * 28


def test_names_the_unusable_file(tmp_path):
    for number, (spoil, expected) in enumerate(
        (
            (rewrite(lambda data: data[:-1] + bytes([data[-1] ^ 1])), "is not the published file"),
            (rewrite(lambda data: data[:-5]), f"has {SIZE - 5} bytes once decompressed, expected"),
            (cut_compressed, "is truncated"),
            (flip_compressed, "is damaged"),
            (swap_splits, f"does not hold {TEST_IMAGES}.gz; it must hold {TRAIN_IMAGES}.gz and"),
        )
    ):
        folder = tmp_path / str(number)
        upstream = idx_files.publish(folder)
        spoil(folder)
        message = failure(tmp_path / "data", upstream, folder)
        assert f"data.source='{folder}'" in message
        assert f"{TRAIN_IMAGES}.gz" in message
        assert expected in message
        assert not (tmp_path / "data").exists(), "bad input leaves nothing behind"


def test_does_not_expand_a_bomb(published):
    folder, upstream = published
    bomb(folder)
    chunks = []
    with pytest.raises(InputError, match="has more bytes once decompressed, expected"):
        chunks.extend(upstream.forms[0][0].content(folder / f"{TRAIN_IMAGES}.gz"))
    assert 0 < len(b"".join(chunks)) < 3_000_000


def test_a_named_folder_is_not_replaced_by_another_source(published, tmp_path):
    folder, upstream = published
    upstream = dataclasses.replace(upstream, debian_folder=folder)
    message = failure(tmp_path / "data", upstream, tmp_path / "typo")
    assert f"data.source='{tmp_path}/typo': {tmp_path}/typo does not exist" in message
    assert "without data.source other sources are tried" in message


# The other sources, in order


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@contextlib.contextmanager
def serve(folder):
    """Serves a folder on the loopback interface; gives its address."""
    handler = functools.partial(_QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def at(upstream, url):
    """The same files at another address."""
    (form,) = upstream.forms
    moved = tuple(dataclasses.replace(file, url=url + file.name) for file in form)
    return dataclasses.replace(upstream, forms=(moved,))


def install(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def package(published_folder, *, hostile=False):
    """A tar as `dpkg-deb --fsys-tarfile` gives."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(published_folder.iterdir()):
            name = f"usr/share/datasets/fashion-mnist/{path.name}"
            if not hostile:
                archive.add(path, arcname=f"./{name}")
                continue
            archive.add(path, arcname=f"../../../escaped/{path.name}.txt")
            link = tarfile.TarInfo(f"./{name}")
            link.type, link.linkname = tarfile.SYMTYPE, str(path)
            archive.addfile(link)
    return buffer.getvalue()


@pytest.fixture
def apt(tmp_path, monkeypatch, published):
    """A machine whose apt-get has no lists until it is told to update, and no network proxy."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "package.tar").write_bytes(package(published[0]))
    install(
        programs,
        "apt-get",
        f"""echo "$*" >> {tmp_path}/apt.log
case "$*" in
*update) touch {tmp_path}/lists ;;
*download*)
  [ -e {tmp_path}/lists ] || {{ echo "E: Unable to locate package" >&2; exit 100; }}
  cp {tmp_path}/package.tar ./dataset-fashion-mnist_1_all.deb ;;
esac""",
    )
    install(programs, "dpkg-deb", 'exec cat "$2"')
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path


def test_order_of_the_sources(published, apt, tmp_path):
    folder, upstream = published
    named = tmp_path / "named"
    idx_files.publish(named)
    with serve(folder) as url:
        upstream = dataclasses.replace(at(upstream, url), debian_folder=folder)
        steps = {
            "named": (named, f"using the files in {named}"),
            "debian": (None, f"using the Debian package's folder, {folder}"),
        }
        for step, (source, expected) in steps.items():
            _, lines = prepare(tmp_path / step, upstream, source)
            assert lines[0] == f"fashion_mnist: {expected}"
            assert_holds(tmp_path / step, idx_files.arrays())
        upstream = dataclasses.replace(upstream, debian_folder=tmp_path / "none")
        _, lines = prepare(tmp_path / "upstream", upstream)
        cache = tmp_path / "upstream" / "downloads" / NAME
        assert lines[1] == f"fashion_mnist: using the upstream address, {cache}"
        assert_holds(tmp_path / "upstream", idx_files.arrays())
        assert not (tmp_path / "apt.log").exists()
    _, lines = prepare(tmp_path / "apt", upstream)
    assert "failed: http://127.0.0.1" in lines[1]
    assert "using the Debian package dataset-fashion-mnist, " in lines[3]
    assert_holds(tmp_path / "apt", idx_files.arrays())


def test_apt_keeps_to_the_cache(published, apt, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # apt-get runs in another folder
    assert prepare("data", published[1])[0].is_absolute()
    assert_holds("data", idx_files.arrays())
    calls = (tmp_path / "apt.log").read_text().splitlines()
    assert [call.split()[-1] for call in calls] == [
        "dataset-fashion-mnist",
        "update",
        "dataset-fashion-mnist",
    ]
    downloads = tmp_path / "data" / "downloads"
    assert all(f"Dir::Cache={downloads}/" in call for call in calls)
    assert all(f"Dir::State::lists={downloads}/" in call for call in calls[1:])
    assert os.listdir(downloads) == [NAME]


def test_what_was_fetched_is_used_again_unless_it_is_damaged(published, apt, tmp_path):
    _, upstream = published
    target, _ = prepare(tmp_path / "data", upstream)
    cache = tmp_path / "data" / "downloads" / NAME
    (tmp_path / "apt.log").unlink()

    for path in target.iterdir():
        path.unlink()
    _, lines = prepare(tmp_path / "data", upstream)
    assert lines[0] == f"fashion_mnist: using what was fetched before, {cache}"
    assert not (tmp_path / "apt.log").exists()

    for path in target.iterdir():
        path.unlink()
    cut_compressed(cache)
    _, lines = prepare(tmp_path / "data", upstream)
    assert lines[0] == "fashion_mnist: fetching from the upstream address"
    assert (tmp_path / "apt.log").exists()
    assert len(upstream.find(cache)) == 4
    assert_holds(tmp_path / "data", idx_files.arrays())


def test_when_nothing_works_every_source_is_named(published, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    message = failure(tmp_path / "data", published[1])
    for part in (
        "(1) your own folder: data.source names none; ",
        f"(2) the Debian package's folder: {tmp_path}/no-such-folder does not exist; ",
        f"(4) the upstream address: http://127.0.0.1:9/{TRAIN_IMAGES}.gz cannot be read: "
        "Connection refused; ",
        "(5) the Debian package dataset-fashion-mnist: there is no apt-get on this machine; ",
        "--config.data.source=FOLDER",
    ):
        assert part in message


def test_bad_downloads_are_refused(published, apt, tmp_path):
    folder, upstream = published
    rewrite(lambda data: data[:-1] + b"x", TEST_IMAGES)(folder)
    (tmp_path / "package.tar").write_bytes(b"not a tar")
    with serve(folder) as url:
        message = failure(tmp_path / "data", at(upstream, url))
        assert f"(4) the upstream address: {TEST_IMAGES}.gz is not the published file" in message
        assert "dataset-fashion-mnist_1_all.deb cannot be unpacked" in message
        assert not (tmp_path / "data").exists(), "bad downloads leave nothing behind"
        install(tmp_path / "bin", "apt-get", 'echo "E: Unable to locate package $*" >&2; exit 100')
        (folder / f"{TEST_IMAGES}.gz").unlink()
        message = failure(tmp_path / "data", at(upstream, url))
    assert f"{TEST_IMAGES}.gz answers 404 File not found" in message
    assert "(5) the Debian package dataset-fashion-mnist: apt-get: Unable to locate" in message
    assert "(after apt-get update failed: apt-get: Unable to locate" in message


def test_a_hostile_package_writes_nothing_elsewhere(published, apt, tmp_path):
    (tmp_path / "package.tar").write_bytes(package(published[0], hostile=True))
    message = failure(tmp_path / "data", published[1])
    assert f"it does not hold {TRAIN_IMAGES}.gz" in message
    assert not list(tmp_path.rglob("*escaped*"))


# Trouble while preparing


CHILD = """
import sys, time
from pathlib import Path
from tests.data import idx_files
from sync_jax.data.prepare import staging

def stop(*args):
    print("stopped", flush=True)
    time.sleep(60)

folder, data_dir = sys.argv[1:]
upstream = idx_files.publish(Path(folder))
staging.flush = stop
idx_files.dataset(data_dir, upstream, folder).prepare()
"""


@pytest.mark.slow
def test_a_killed_preparation_is_not_taken_for_a_finished_one(published, tmp_path):
    """All is written, but not yet moved to its place."""
    folder, upstream = published
    data_dir = tmp_path / "data"
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(data_dir)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert "using" in child.stdout.readline()
        assert child.stdout.readline() == "stopped\n"
        os.kill(child.pid, signal.SIGKILL)
    assert list(data_dir.glob("incomplete-*")), "it was killed in the middle"
    with pytest.raises(InputError, match="is not prepared"):
        dataset(data_dir).load("train")
    prepare(data_dir, upstream, folder)
    assert_holds(data_dir, idx_files.arrays())
    assert not list(data_dir.glob("incomplete-*"))


def test_of_two_at_once_the_second_waits(published, tmp_path, monkeypatch):
    """Threads, whose locks exclude each other as those of processes do."""
    folder, upstream = published
    lines = []
    second = threading.Thread(
        target=dataset(tmp_path / "data", upstream, folder).prepare, args=(lines.append,)
    )
    write = FashionMnist.write

    def write_late(self, arrays):
        second.start()
        deadline = time.monotonic() + 30
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        write(self, arrays)

    monkeypatch.setattr(FashionMnist, "write", write_late)
    target, _ = prepare(tmp_path / "data", upstream, folder)
    second.join()
    assert lines == [
        "fashion_mnist: waiting for another process that prepares it",
        f"fashion_mnist: prepared in {target} by another process",
    ]
    assert_holds(tmp_path / "data", idx_files.arrays())


# The disk


def test_a_disk_that_fills_up(published, tmp_path, monkeypatch):
    """What ArrayRecord raises then is a RuntimeError, seen with a small tmpfs."""
    folder, upstream = published

    def full(self, images, labels):
        raise RuntimeError("write() failed: No space left on device;\nat byte 20971520")
        yield

    monkeypatch.setattr(ArrayBuilder, "_generate_examples", full)
    message = failure(tmp_path / "data", upstream, folder)
    assert f"data.data_dir='{tmp_path}/data' cannot be written: " in message
    assert "No space left on device; at byte 20971520" in message


def test_damaged_records_say_what_to_do(published, tmp_path):
    """A bit among the records; tests/bad_input has what is missing, cut short or garbled."""
    folder, upstream = published
    target, _ = prepare(tmp_path, upstream, folder)
    (shard,) = target.glob("*train.array_record*")
    data = bytearray(shard.read_bytes())
    data[20_000] ^= 1  # not in the padding of this small file
    shard.write_bytes(bytes(data))
    with pytest.raises(InputError) as caught:
        dataset(tmp_path).load("train")
    message = str(caught.value)
    assert f"{target} is damaged or cannot be read" in message
    assert "delete it and prepare again" in message
    assert "\n" not in message
