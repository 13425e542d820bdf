"""A tiny dataset of TFDS: prepared by it without TensorFlow, read, and kept as our records."""

import io
import shutil
from typing import ClassVar

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from sync_jax.data import registry
from sync_jax.errors import InputError
from tests.data.pictures import pixels, prepared, section

CLASSES = ("ant", "bee", "cat")


def encoded(image):
    out = io.BytesIO()
    Image.fromarray(image.squeeze()).save(out, "PNG")
    return out.getvalue()


class _Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """PNGs of 12 x 12 pixels, yielded encoded: TFDS itself encodes with TensorFlow."""

    VERSION = tfds.core.Version("1.2.0")
    SPLITS: ClassVar = {"train": 15, "test": 6}
    CHANNELS = 3
    KEYS = ("image", "label")
    LABEL = tfds.features.ClassLabel(names=CLASSES)

    def _info(self):
        image, label = self.KEYS
        features = {image: tfds.features.Image(shape=(None, None, self.CHANNELS)),
                    label: self.LABEL}  # fmt: skip
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=self.KEYS,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in self.SPLITS}

    def _generate_examples(self, split):
        image, label = self.KEYS
        for i, (shown, number) in enumerate(self.contents(split)):
            yield i, {image: encoded(shown), label: number}

    @classmethod
    def contents(cls, split):
        """(pixels, label) in order."""
        start = 0 if split == "train" else 100
        return [(pixels(start + i)[..., : cls.CHANNELS], i % 3) for i in range(cls.SPLITS[split])]


class TinyPictures(_Tiny):
    pass


class TinyGrey(_Tiny):
    CHANNELS = 1
    KEYS = ("picture", "kind")
    SPLITS: ClassVar = {"train": 15, "validation": 6}


class TinyUnlabelled(_Tiny):
    LABEL = tfds.features.Scalar(np.int64)


class TinyTrain(_Tiny):
    SPLITS: ClassVar = {"train": 15}


def written(builder, folder):
    """Prepares it by TFDS alone, as a user would have it."""
    made = builder(data_dir=folder / "data")
    made.download_and_prepare(file_format="array_record")
    return made


def test_every_picture_and_label_comes_back(tmp_path):
    written(TinyPictures, tmp_path)
    data = section("tfds:tiny_pictures", tmp_path)
    dataset = registry.dataset(data)
    assert not dataset.is_prepared()
    expected = dataset.info()
    assert (expected.num_train, expected.num_test, expected.class_names) == (15, 6, CLASSES)
    dataset, lines = prepared(data)
    assert lines[0] == "tfds:tiny_pictures: tiny_pictures/1.2.0 of TFDS: 'image' and 'label'"
    for split in ("train", "test"):
        shown, labels = zip(*TinyPictures.contents(split), strict=True)
        for decode in (False, True):
            images, found = dataset.load(split, decode=decode)
            np.testing.assert_array_equal(images[:], np.stack(shown))
            np.testing.assert_array_equal(found, labels)
    info = registry.dataset(data).info()
    assert (info.name, info.class_names, info.image_shape) == (data.name, CLASSES, (12, 12, 3))
    train = np.stack([image for image, _ in TinyPictures.contents("train")]) / 255
    np.testing.assert_allclose(info.mean, train.mean(axis=(0, 1, 2)), rtol=1e-6)
    # By its version too; and once prepared, TFDS's own files are not needed.
    named = section("tfds:tiny_pictures:1.2.0", tmp_path)
    assert prepared(named)[0].info().num_train == 15
    shutil.rmtree(tmp_path / "data" / "tiny_pictures")
    assert registry.dataset(data).load("test")[0].shape == (6, 12, 12, 3)


def test_grey_pictures_keys_and_a_validation_split(tmp_path):
    written(TinyGrey, tmp_path)
    dataset, _ = prepared(section("tfds:tiny_grey", tmp_path))
    images, labels = dataset.load("test")
    expected = [np.repeat(image, 3, axis=2) for image, _ in TinyGrey.contents("validation")]
    np.testing.assert_array_equal(images[:], np.stack(expected))
    np.testing.assert_array_equal(labels, [label for _, label in TinyGrey.contents("validation")])


def test_a_dataset_that_changed_is_noticed(tmp_path, monkeypatch):
    written(TinyPictures, tmp_path)
    data = section("tfds:tiny_pictures", tmp_path)
    prepared(data)
    monkeypatch.setattr(TinyPictures, "VERSION", tfds.core.Version("1.3.0"))
    written(TinyPictures, tmp_path)
    with pytest.raises(InputError, match=r"tiny_pictures/1.3.0 is not what .* was made from; del"):
        registry.dataset(data).info()


@pytest.mark.parametrize(
    ("builder", "message"),
    [
        (TinyUnlabelled, "is not for image classification: .* its features are image, label"),
        (TinyTrain, "has the splits train; it needs 'train', and 'test' or 'validation'"),
    ],
)
def test_what_cannot_be_classified_is_refused(tmp_path, builder, message):
    name = written(builder, tmp_path).name
    before = sorted((tmp_path / "data").rglob("*"))
    for call in (lambda d: d.info(), lambda d: d.prepare(str)):
        with pytest.raises(InputError, match=message) as caught:
            call(registry.dataset(section(f"tfds:{name}", tmp_path)))
        assert "\n" not in str(caught.value)
    assert sorted((tmp_path / "data").rglob("*")) == before


def test_an_unknown_name_gets_a_suggestion(tmp_path):
    for name, message in (
        ("tfds:fashion_mist", r"TFDS has no dataset 'fashion_mist' \(did you mean 'fashion_mnist'"),
        ("tfds:tiny_nothing", "TFDS has no dataset 'tiny_nothing'.*, and none lies in "),
        ("tfds:mnist:7.7.7", "data.name='tfds:mnist:7.7.7': "),
    ):
        with pytest.raises(InputError, match=message) as caught:
            registry.dataset(section(name, tmp_path)).prepare(str)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_what_tfds_cannot_prepare_says_so(tmp_path, monkeypatch):
    def fails(self, **options):
        raise ModuleNotFoundError("No module named 'tensorflow'\n\nplease install it")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fails)
    dataset = registry.dataset(section("tfds:mnist", tmp_path))
    assert dataset.info() is None
    message = r"TFDS cannot prepare mnist/3.* No module named 'tensorflow' please install it; prep"
    with pytest.raises(InputError, match=message):
        dataset.prepare(str)
    assert not dataset.is_prepared()
