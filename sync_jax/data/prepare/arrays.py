"""Published datasets that fit in memory as one array of images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.download import Upstream
from sync_jax.data.prepare.staging import (
    Log,
    Prepared,
    build,
    check_disk,
    damage,
    expand,
    remove_leftovers,
    tfds_info,
)
from sync_jax.errors import InputError
from sync_jax.runtime.memory import aligned_empty

_READ_BATCH = 4096  # records read at once

# Images `[n, height, width, channels]` uint8 and labels `[n]`, by split.
Arrays = dict[str, tuple[np.ndarray, np.ndarray]]


class ArrayDataset(Prepared):
    """A published dataset of small images; subclasses name its files and read them."""

    INFO: ClassVar[DatasetInfo]
    UPSTREAM: ClassVar[Upstream]
    LAST = "dataset_info.json"

    def read(self, paths: tuple[Path, ...]) -> Arrays:
        """Reads verified files, one form of `UPSTREAM`."""
        raise NotImplementedError

    def info(self) -> DatasetInfo:
        """See `Dataset.info`."""
        return self.INFO

    def load(self, split: str, *, decode: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """See `Dataset.load`."""
        del decode
        self._require(split)
        self._verify(split)
        with damage(self.folder):
            return _read_split(ArrayBuilder(self.INFO, data_dir=self.root), split)

    def _find(self, log: Log) -> Path | None:
        source = self.section.source
        if not source:
            return None
        folder = expand(source)
        try:
            self.UPSTREAM.find(folder)
        except InputError as error:
            forms = (" and ".join(file.name for file in form) for form in self.UPSTREAM.forms)
            raise InputError(
                f"data.source={source!r}: {error}; it must hold {' or '.join(forms)}; without "
                "data.source other sources are tried"
            ) from None
        return folder

    def _build(self, source: Path | None, log: Log) -> None:
        remove_leftovers(self.root, self.key)
        if source is not None:
            log(f"using the files in {source}")
        else:
            try:
                source = self.UPSTREAM.obtain(cache=self.root / "downloads" / self.name, log=log)
            except InputError as error:
                raise InputError(
                    f"{self.name} cannot be obtained: {error}; with the files in a folder of "
                    "yours, say --config.data.source=FOLDER"
                ) from None
        check_disk(self.root, self.UPSTREAM.prepared_bytes, f"to prepare {self.name}")
        arrays = self.read(self.UPSTREAM.find(source))
        for split, (images, labels) in arrays.items():
            try:
                if len(labels) != len(images):
                    raise ValueError(f"{len(labels)} labels for {len(images)} images")
                check_labels(labels, self.INFO.num_classes)
            except ValueError as error:
                raise InputError(f"{source}: {split} has {error}") from None
        self.write(arrays)

    def write(self, arrays: Arrays) -> None:
        """Writes the prepared folder; the caller holds the lock."""
        build(self, lambda staging: ArrayBuilder(self.INFO, arrays, data_dir=staging))

    def _absent(self) -> str:
        fetched = ", ".join(file.name for file in self.UPSTREAM.forms[0])
        return (
            f"prepare it with `{self.command}`, which finds or fetches {fetched}, or takes them "
            "from a folder of yours with --config.data.source=FOLDER"
        )


# Unregistered, for TFDS has builders of these names: which one is meant would depend on imports.
class ArrayBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes arrays of images as ArrayRecord files, in their order; needs no TensorFlow.

    Images are stored as raw bytes, for decoding PNGs would take longer than reading the rest, and a
    training run reads them all at its start. Without arrays it reads what was written.
    """

    VERSION = tfds.core.Version(ArrayDataset.VERSION)

    def __init__(self, known: DatasetInfo, arrays: Arrays | None = None, **kwargs: Any):
        self.name, self._known, self._arrays = known.name, known, arrays or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        image = tfds.features.Tensor(
            shape=self._known.image_shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        label = tfds.features.ClassLabel(names=self._known.class_names)
        return tfds_info(self, {"image": image, "label": label})

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager
        return {split: self._generate_examples(*x) for split, x in self._arrays.items()}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": image.reshape(self._known.image_shape), "label": int(label)}


def check_labels(labels: np.ndarray, classes: int) -> None:
    """Raises a ValueError where labels are not 0 to `classes` - 1, or none."""
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        found = f"labels {labels.min()} to {labels.max()}" if len(labels) else "no label"
        raise ValueError(f"{found}, expected 0 to {classes - 1}")


def _read_split(builder: ArrayBuilder, split: str) -> tuple[np.ndarray, np.ndarray]:
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
    check_labels(labels, builder.info.features["label"].num_classes)
    return images, labels
