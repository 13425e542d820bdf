"""Mistakes in pictures, published files and weights."""

import pickle
from pathlib import Path

import numpy as np

from tests.bad_input.case import NEW_ALBUM, PREPARED, RESNET, TRAIN, Bad, prepare
from tests.bad_input.spoil import (
    album,
    broken,
    cars,
    cifar100,
    closed,
    clothes,
    cut,
    cut_food,
    food,
    imagenet,
    label_100,
    labels_beyond,
    nan_pictures,
    no_files,
    pickled,
    squares,
    street_numbers,
    write,
)
from tests.command_line import QUICKSTART
from tests.data.test_published_pictures import tar

CASES = {
    # Pictures.
    "pictures nowhere": Bad([*NEW_ALBUM, "--config.data.folder=x"], "folder='.*x' does not exist"),
    "a source of too long a name": Bad(
        [*prepare("food101"), f"--config.data.source={'x' * 300}"], "source='x*' does not exist"
    ),
    "pictures of no folder": Bad(
        ["--config=configs/image_folder.py"],
        "data.folder is empty; say --config.data.folder=FOLDER",
    ),
    "pictures of no class": Bad(
        NEW_ALBUM, "has 0 folders of pictures; it must hold one", album({})
    ),
    "pictures beside each other": Bad(
        NEW_ALBUM, "has 9 pictures in no class folder and 0 folders", album({".": 9})
    ),
    "pictures of folds": Bad(
        NEW_ALBUM,
        "1, 2 hold folders of the same names, a, b. Splits must be called .*train, training, cal",
        album({f"{fold}/{name}": 9 for fold in "12" for name in "ab"}),
    ),
    "an empty class": Bad(
        NEW_ALBUM, "the folder bee has no picture; known are .jpg", album({"ant": 20, "bee": 0})
    ),
    "pictures that are pipes and links to nothing": Bad(
        NEW_ALBUM, "the folder bee has no picture", no_files
    ),
    "a class of too few": Bad(NEW_ALBUM, "a class has 4 pictures", album({"ant": 20, "bee": 4})),
    "a class of broken pictures": Bad(
        NEW_ALBUM, "no readable picture of 'bee'; .*bee/.*no picture of a known", broken("bee/*")
    ),
    "a class of NaN pixels": Bad(
        NEW_ALBUM, "no readable picture of 'ant'; .*tiff: its pixels are floating-po", nan_pictures
    ),
    "pictures that changed": Bad(
        PREPARED, "have changed since they were prep", broken("ant/001.png")
    ),
    "prepared pictures cut short": Bad(
        PREPARED, "cannot be read .*delete it and prepare", cut("album/**/*-train.array_record*")
    ),
    "prepared labels out of range": Bad(
        PREPARED,
        "is damaged: train has labels beyond its classes",
        labels_beyond,
    ),
    "a prepared folder that may not be looked into": Bad(
        PREPARED, "data_dir='.*album' cannot be used: Permission denied .*sync_jax.json", closed
    ),
    "prepared description damaged": Bad(
        PREPARED, "sync_jax.json is damaged", cut("album/**/sync_jax.json")
    ),
    "squares cut short": Bad(
        PREPARED,
        "squares_12_12 is damaged .*train.npy is not as it was prepared.; delete it",
        lambda monkeypatch: (squares(), cut("album/**/train.npy")(monkeypatch)),
    ),
    # Published files.
    "CIFAR is another file": Bad(
        prepare("cifar100"),
        "is not the published file, or is damaged: its MD5 sum is",
        cifar100(lambda members: None, after=lambda path: path.write_bytes(b"x")),
    ),
    "CIFAR with a label out of range": Bad(
        prepare("cifar100"), "train has labels .* to 100, expected 0 to 99", cifar100(label_100)
    ),
    "CIFAR cut short within": Bad(
        prepare("cifar100"),
        "train.bin has 92213 bytes, expected a multiple of 3074",
        cifar100(lambda members: members.update({"train.bin": members["train.bin"][:-7]})),
    ),
    "CIFAR without test": Bad(
        prepare("cifar100"), "does not hold test", cifar100(lambda members: members.pop("test.bin"))
    ),
    "CIFAR with NaN pixels": Bad(
        prepare("cifar100"),
        "train cannot be read: it has an array of other elements than bytes",
        cifar100(pickled(data=np.full((30, 3072), np.nan)), form="python"),
    ),
    "SVHN with label 11": Bad(
        prepare("svhn"), "labels other than 1 to 10", street_numbers(y=np.full((20, 1), 11))
    ),
    "SVHN with NaN pixels": Bad(
        prepare("svhn"),
        "expected 32 x 32 x 3 x n bytes",
        street_numbers(X=np.full((32, 32, 3, 20), np.nan)),
    ),
    "SVHN is not there": Bad(
        prepare("svhn"),
        "does not hold train_32x32.mat and test_32x32.mat",
        lambda monkeypatch: Path("published").mkdir(),
    ),
    "an IDX file cut short": Bad(
        prepare("fashion_mnist"),
        "train-labels-idx1-ubyte has 38 bytes once decompressed, expected 48",
        clothes(lambda path: path.write_bytes(path.read_bytes()[:-10])),
    ),
    "an IDX file with label 10": Bad(
        prepare("fashion_mnist"),
        "train has labels 0 to 10, expected 0 to 9",
        clothes(
            lambda contents: contents["train-labels-idx1-ubyte"].__setitem__(0, 10),
            upstream_too=True,
        ),
    ),
    "prepared clothes cut short": Bad(
        [*TRAIN, "--workdir=new"],
        "cannot be read .*delete it and prepare again",
        cut("data/**/*train.array_record*"),
    ),
    "cars with damaged annotations": Bad(
        prepare("stanford_cars"),
        "cars_train_annos.mat cannot be read as annotations",
        cars(lambda f: (f / "devkit/cars_train_annos.mat").write_bytes(b"MATLAB 5.0 MAT-file" * 9)),
    ),
    "food cut short": Bad(prepare("food101"), "is damaged or truncated", cut_food),
    "food without a picture": Bad(
        prepare("food101"),
        "food-101.tar has no images/apple_pie/1000000.jpg",
        food(lambda members: members.pop("food-101/images/apple_pie/1000000.jpg")),
    ),
    "food with classes that are paths": Bad(
        prepare("food101"),
        "meta/classes.txt of .* is no list of classes",
        food(lambda members: members.update({"food-101/meta/classes.txt": b".. apple_pie"})),
    ),
    "ImageNet of other classes": Bad(
        prepare("imagenet100"),
        "train has no picture of 100 of the 100 classes",
        imagenet(tar({"n00000000.tar": b""})),
    ),
    "ImageNet cut short": Bad(
        prepare("imagenet100"),
        "ILSVRC2012_img_train.tar (is truncated|cannot be read as a tar)",
        imagenet(tar({"n00000000.tar": bytes(5000)})[:3000]),
    ),
    # Weights.
    "weights of the cnn": Bad(
        [QUICKSTART, "--config.model.pretrained=w.pth"], "torchvision has no weights for cnn"
    ),
    "weights are an old file of PyTorch": Bad(
        [*RESNET, "--config.model.pretrained=w.pth"],
        "w.pth is no file of torch.save in its format since 2020",
        write("w.pth", pickle.dumps({"a": 1})),
    ),
}
