"""CIFAR and SVHN from their archives, on small files in exactly the published formats."""

import gzip
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from sync_jax.data import registry
from sync_jax.data.datasets.cifar import Cifar100, _parse_python
from sync_jax.data.prepare.download import PublishedFile, Upstream
from sync_jax.errors import InputError
from tests.data.pictures import section, tar

NOWHERE = "http://127.0.0.1:9/"  # the discard port: nothing listens there


def published(folder, *forms):
    """The files that a test has written, as an `Upstream`; sources exist nowhere."""

    def file(name):
        path = folder / name
        digest = hashlib.md5(path.read_bytes()).hexdigest() if path.exists() else "0" * 32
        return PublishedFile(name, digest, NOWHERE + name)

    return Upstream(tuple(tuple(map(file, form)) for form in forms), prepared_bytes=1000)


def dataset(name, folder, *forms, source=True):
    """A dataset of files in a folder, prepared below it."""
    made = registry.dataset(section(name, folder, source=str(folder) if source else ""))
    if forms:
        made.UPSTREAM = published(folder, *forms)
    return made


def write_tar(path, members):
    folder = path.name.split(".")[0]
    named = {f"{folder}/{name}": data for name, data in members.items()}
    path.write_bytes(gzip.compress(tar(named)))


def cifar_contents(classes, sizes, seed=0):
    """Images and labels by file; every pixel its own."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.integers(0, 256, (size, 32, 32, 3), np.uint8),
            rng.integers(0, classes, size),
            rng.integers(0, 20, size),
        )
        for name, size in sizes.items()
    }


SIZES = {
    10: {f"data_batch_{i}": 2 + i for i in range(1, 6)} | {"test_batch": 4},
    100: {"train": 30, "test": 7},
}
NAMES = {10: "cifar10", 100: "cifar100"}


def planes(images):
    """An image is 1,024 red, 1,024 green and 1,024 blue values, row by row."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def binary_members(classes, contents):
    members = {}
    for name, (images, labels, coarse) in contents.items():
        columns = [labels[:, None]] if classes == 10 else [coarse[:, None], labels[:, None]]
        records = np.concatenate([*columns, planes(images)], axis=1).astype(np.uint8)
        members[f"{name}.bin"] = records.tobytes()
    return members | {"readme.html": b"<html>"}


def python_members(classes, contents):
    members = {}
    for name, (images, labels, coarse) in contents.items():
        fields = {b"data": planes(images), b"filenames": [b"a.png"] * len(labels)}
        if classes == 10:
            fields |= {b"labels": labels.tolist(), b"batch_label": b"batch"}
        else:
            fields |= {b"fine_labels": labels.tolist(), b"coarse_labels": coarse.tolist()}
        members[name] = pickle.dumps(fields, protocol=2)
    return members | {"meta": pickle.dumps({b"label_names": [b"a"]}, protocol=2)}


def expected(contents, split):
    names = [name for name in contents if ("test" in name) == (split == "test")]
    return [np.concatenate([contents[name][i] for name in names]) for i in (0, 1)]


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["binary", "python"])
def test_every_pixel_and_label_of_cifar_comes_back(tmp_path, classes, form):
    contents = cifar_contents(classes, SIZES[classes])
    make = binary_members if form == "binary" else python_members
    name = f"cifar-{classes}-{form}.tar.gz"
    write_tar(tmp_path / name, make(classes, contents))
    forms = [(f"cifar-{classes}-{x}.tar.gz",) for x in ("binary", "python")]
    lines = []
    made = dataset(NAMES[classes], tmp_path, *forms)
    made.prepare(lines.append)
    for split in ("train", "test"):
        images, labels = made.load(split)
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        true_images, true_labels = expected(contents, split)
        np.testing.assert_array_equal(images, true_images)
        np.testing.assert_array_equal(labels, true_labels)
    assert lines[0] == f"{NAMES[classes]}: using the files in {tmp_path}"


def test_a_python_2_pickle_is_read(tmp_path):
    """As the authors wrote theirs: byte strings, and NumPy's old module names."""
    pixels = np.arange(3072, dtype=np.uint8)[None]
    state = (
        b"(I1\n(I1\nI3072\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\n"
    )
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        + state
        + b"S"
        + repr(pixels.tobytes())[1:].encode()
        + b"\ntb"
    )
    data = b"(dS'data'\n" + array + b"sS'fine_labels'\n(lI42\nas."
    images, labels = _parse_python("here", data, b"fine_labels")
    np.testing.assert_array_equal(images, pixels)
    np.testing.assert_array_equal(labels, [42])


def test_a_truncated_archive(tmp_path):
    """Its digest is right; tests/bad_input has one whose digest is not."""
    name = "cifar-100-binary.tar.gz"
    write_tar(tmp_path / name, binary_members(100, cifar_contents(100, SIZES[100])))
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot be read"):
        dataset("cifar100", tmp_path, (name,)).prepare(str)


def test_without_files_the_message_says_what_is_needed(tmp_path):
    with pytest.raises(
        InputError,
        match=r"does not hold cifar-100-binary.tar.gz or cifar-100-python.tar.gz; it must hold",
    ):
        dataset("cifar100", tmp_path).prepare(str)
    made = dataset("cifar100", tmp_path, ("a.tar.gz",), source=False)
    with pytest.raises(InputError, match=r"cannot be obtained: .*127.0.0.1.*--config.data"):
        made.prepare(str)
    with pytest.raises(InputError, match=r"--config=configs/cifar100.py --mode=prepare"):
        made.load("train")


def write_svhn(folder, sizes, seed=0):
    """MATLAB 5 files as the authors': X [32, 32, 3, n], y [n, 1], the digit 0 as 10."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, size in sizes.items():
        images = rng.integers(0, 256, (32, 32, 3, size), np.uint8)
        labels = (np.arange(size) % 10 + 1).astype(np.uint8)[:, None]
        scipy.io.savemat(
            folder / f"{split}_32x32.mat", {"X": images, "y": labels}, do_compression=True
        )
        arrays[split] = images.transpose(3, 0, 1, 2), np.where(labels == 10, 0, labels)[:, 0]
    return arrays


def test_every_pixel_and_label_of_svhn_comes_back(tmp_path):
    arrays = write_svhn(tmp_path, {"train": 23, "test": 11})
    made = dataset("svhn", tmp_path, ("train_32x32.mat", "test_32x32.mat"))
    made.prepare(str)
    for split, (images, labels) in arrays.items():
        found = made.load(split)
        np.testing.assert_array_equal(found[0], images)
        np.testing.assert_array_equal(found[1], labels)
        assert set(found[1]) == set(range(10))


def test_what_is_said_of_datasets_fits_together():
    for name in ("fashion_mnist", "cifar10", "cifar100", "svhn"):
        info = registry.dataset(section(name, Path("nowhere"))).info()
        assert info.name == name
        assert len(set(info.class_names)) == info.num_classes
        assert len(info.mean) == len(info.std) == info.image_shape[2]
    (file,) = Cifar100.UPSTREAM.forms[0]
    assert file.url == "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
