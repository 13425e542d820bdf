"""A TFDS builder for datasets that fit in memory as one array of images; needs no TensorFlow."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from sync_jax.data.prepare.download import DataError
from sync_jax.runtime.memory import aligned_empty

_READ_BATCH = 4096  # records read at once

Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


# Unregistered, for TFDS has builders of these names: which one is meant would depend on imports.
class ArrayBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds ArrayRecord files from the published ones, found in TFDS's manual folder.

    Images are stored as raw bytes, for decoding PNGs would take longer than reading the rest, and a
    training run reads them all at its start. Examples keep the published order.

    A dataset says what its images and classes are, and in `_arrays` how its files are read.
    """

    IMAGE_SHAPE: ClassVar[tuple[int, int, int]]
    CLASS_NAMES: ClassVar[tuple[str, ...]]
    HOMEPAGE: ClassVar[str]

    def __init__(self, *, upstream: Any = None, **kwargs: Any):
        """Args: upstream: the published files; needed for preparing only."""
        self._upstream = upstream
        super().__init__(**kwargs)

    def _arrays(self, folder: Path) -> Arrays:
        """Images `[n, height, width, channels]` uint8 and labels `[n]`, by split."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=self.IMAGE_SHAPE, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(names=self.CLASS_NAMES)
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"image": image, "label": label}),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        folder = Path(dl_manager.manual_dir)
        generators = {}
        for split, (images, labels) in self._arrays(folder).items():
            if len(labels) != len(images):
                raise DataError(
                    f"{folder}: {split} has {len(labels)} labels for {len(images)} images"
                )
            if not len(labels) or labels.min() < 0 or labels.max() >= len(self.CLASS_NAMES):
                found = f"labels {labels.min()} to {labels.max()}" if len(labels) else "no label"
                raise DataError(
                    f"{folder}: {split} has {found}, expected 0 to {len(self.CLASS_NAMES) - 1}"
                )
            generators[split] = self._generate_examples(images, labels)
        return generators

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image.reshape(self.IMAGE_SHAPE), "label": int(label)}


def read_arrays(builder: tfds.core.DatasetBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Reads a whole split that holds raw bytes: images `[n, ...]` uint8 and labels `[n]` int32."""
    # Records are parsed here: decoding by TFDS gives the same and takes three times as long.
    records = builder.as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    images = aligned_empty((len(records), *builder.info.features["image"].shape))
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _READ_BATCH):
        stop = min(start + _READ_BATCH, len(records))
        for index, record in enumerate(records.__getitems__(range(start, stop)), start):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            pixels = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
            images[index] = pixels.reshape(images.shape[1:])
            labels[index] = feature["label"].int64_list.value[0]
    classes = builder.info.features["label"].num_classes
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"its labels are not 0 to {classes - 1}")
    return images, labels
