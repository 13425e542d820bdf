"""Any image classification dataset of TensorFlow Datasets (TFDS), without TensorFlow.

TFDS's encoded pictures are read once and kept as our own records. TFDS prepares many datasets with
TensorFlow only; those that lie in `data_dir` as ArrayRecord files need none. TFDS imports the
modules that its folders name: trust such a folder as you would a program.
"""

import functools
import hashlib
import re
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from ml_collections import ConfigDict

from sync_jax.data.images import BadImageError
from sync_jax.data.info import DatasetInfo
from sync_jax.data.prepare.archives import Listing
from sync_jax.data.prepare.pictures import PictureDataset
from sync_jax.data.prepare.staging import Log, quiet_tfds
from sync_jax.errors import InputError, suggestion
from sync_jax.runtime.console import one_line

PREFIX = "tfds:"
_SPEC = re.compile(r"(\w+)(/[\w.+-]+)?(:[\w.]+)?")  # NAME/CONFIG:VERSION


class TfdsDataset(PictureDataset):
    """A dataset of TFDS, kept in `data_dir/tfds/<name>/<version>`; grey pictures become RGB."""

    def __init__(self, section: ConfigDict):
        super().__init__(section)
        self._spec = self.name.removeprefix(PREFIX)
        match = _SPEC.fullmatch(self._spec)
        if match is None:
            raise InputError(
                f"config.data.name={self.name!r} must be {PREFIX}NAME, NAME/CONFIG or NAME:VERSION"
            )
        self._plain = match[1]
        key = self._spec.replace("/", "+").replace(":", "@")
        self.key, self.folder = f"tfds-{key}", self.root / "tfds" / key / self.VERSION

    @functools.cached_property
    def _builder(self) -> Any:
        try:
            return tfds.builder(self._spec, data_dir=self.root, file_format="array_record")
        except tfds.core.DatasetNotFoundError:
            close = suggestion(self._plain, tfds.list_builders(with_community_datasets=False))
            raise InputError(
                f"config.data.name={self.name!r}: TFDS has no dataset {self._plain!r}{close}, and "
                f"none lies in {self.root}"
            ) from None
        except Exception as error:  # a dataset's module can raise anything
            raise InputError(f"config.data.name={self.name!r}: {one_line(error)}") from error

    def _keys(self) -> tuple[str, str]:
        """The names of the image and of the label."""
        info = self._builder.info
        image, label = (info.supervised_keys or ("image", "label"))[:2]
        features = dict(info.features.items())
        if isinstance(image, str) and isinstance(label, str):
            picture, kind = features.get(image), features.get(label)
            if (
                isinstance(picture, tfds.features.Image)
                and picture.np_dtype == np.uint8
                and picture.shape[-1] in (1, 3)
                and isinstance(kind, tfds.features.ClassLabel)
            ):
                return image, label
        raise InputError(
            f"{self.name} is not for image classification: it needs an Image of 8 bits and a "
            f"ClassLabel, its features are {', '.join(sorted(features))}"
        )

    def _splits(self) -> dict[str, Any]:
        """TFDS's splits, as "train" and "test"."""
        splits = self._builder.info.splits
        test = "test" if "test" in splits else "validation"
        if "train" not in splits or test not in splits:
            raise InputError(
                f"{self.name} has the splits {', '.join(splits) or 'none'}; it needs 'train', and "
                "'test' or 'validation'"
            )
        return {"train": splits["train"], "test": splits[test]}

    def _expected(self) -> DatasetInfo | None:
        _, label = self._keys()
        if not self._builder.is_prepared():
            return None
        counts = {split: known.num_examples for split, known in self._splits().items()}
        return self._describe(tuple(self._builder.info.features[label].names), counts)

    def _check_source(self, digest: str) -> None:
        try:
            found = self._listing()
        except InputError:  # the records are all that is needed
            return
        if found.digest() != digest:
            raise InputError(
                f"TFDS's {self._builder.info.full_name} is not what {self.folder} was made from; "
                "delete that to prepare it again, or name another --config.data.data_dir"
            )

    def _listing(self) -> "_Listing":
        splits, keys = self._splits(), self._keys()
        try:
            return _Listing(self._builder, splits, keys)
        except (NotImplementedError, ValueError) as error:
            raise InputError(
                f"{self._builder.data_dir} is not there as ArrayRecord files ({one_line(error)}); "
                "`tfds convert_format --out_file_format=array_record` makes them"
            ) from error

    def _find(self, log: Log) -> None:
        image, label = self._keys()
        log(f"{self._builder.info.full_name} of TFDS: {image!r} and {label!r}")

    def _build(self, source: Any, log: Log) -> None:
        if not self._builder.is_prepared():
            log(f"TFDS prepares it in {self._builder.data_dir}")
            try:
                with quiet_tfds():
                    self._builder.download_and_prepare(file_format="array_record")
            except (Exception, SystemExit) as error:
                raise InputError(
                    f"TFDS cannot prepare {self._builder.info.full_name}: {one_line(error)}; "
                    "prepare it where it can, with TensorFlow installed, by `tfds build "
                    f"--file_format=array_record`, and copy it to {self._builder.data_dir}"
                ) from error
        super()._build(self._listing(), log)

    def _absent(self) -> str:
        return "--mode=prepare makes it from what TFDS has or can prepare"


class _Picture:
    """In place of a `Picture` of a file; its label is known once it has been read."""

    extra = ()

    def __init__(self, source: Any, position: int, keys: tuple[str, str], path: str):
        self._source, self._position, self._keys = source, position, keys
        self.name, self.label, self.path = f"{path}[{position}]", -1, path

    def read(self) -> bytes:
        record = self._source[self._position]
        image, label = (record[key] for key in self._keys)
        self.label = int(label)
        if self.label < 0:
            raise BadImageError("it has no label")
        data: bytes = image
        return data


class _Listing(Listing):
    """The pictures of TFDS's splits, in its order."""

    def __init__(self, builder: Any, splits: dict[str, Any], keys: tuple[str, str]):
        self._full_name, self._known = builder.info.full_name, splits.values()
        pictures, decoders = {}, {keys[0]: tfds.decode.SkipDecoding()}
        for split, known in splits.items():
            source = builder.as_data_source(known.name, decoders=decoders)
            path = f"{self._full_name}/{known.name}"
            pictures[split] = [_Picture(source, i, keys, path) for i in range(len(source))]
        super().__init__(tuple(map(str, builder.info.features[keys[1]].names)), pictures)

    def digest(self) -> str:  # of the version and the sizes of all files
        lengths = [(x.name, x.num_bytes, *x.shard_lengths) for x in self._known]
        return hashlib.sha256(repr((self._full_name, lengths)).encode()).hexdigest()

    def num_bytes(self) -> int:
        return sum(split.num_bytes for split in self._known)
