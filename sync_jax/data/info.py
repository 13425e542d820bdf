"""The interface of datasets, and the facts about one that models and pipelines need."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from sync_jax.runtime.console import say

_FEW = 5  # names in a line


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The facts about a dataset that models and pipelines need."""

    name: str
    num_classes: int
    image_shape: tuple[int, ...]  # of the network's input: (height, width, channels) or (features,)
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # per channel or feature, of training values over `scale`; std likewise
    std: tuple[float, ...]
    num_train: int
    num_test: int  # 0: there is no test split
    num_calibration: int = 0  # 0: the calibration part is held out of the training split
    scale: float = 255.0
    stored_shape: tuple[int, ...] = ()  # of an image in device memory; (): `image_shape`
    squares_bytes: int | None = None  # yet to be written for encoded pictures; None: arrays
    note: str = ""  # a line on splits that are not what their names suggest

    def __post_init__(self) -> None:
        """Fills in `stored_shape`."""
        if not self.stored_shape:
            object.__setattr__(self, "stored_shape", self.image_shape)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `dataclasses.asdict` by way of JSON; fields of later versions are ignored."""
        names = {field.name for field in dataclasses.fields(cls)}
        values: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()
        }
        return cls(**{name: x for name, x in values.items() if name in names})

    @property
    def splits(self) -> dict[str, int]:
        """The sizes of the official splits that there are."""
        sizes = {"train": self.num_train, "calibration": self.num_calibration}
        return {split: size for split, size in (sizes | {"test": self.num_test}).items() if size}

    @property
    def bytes_per_example(self) -> int:
        """Device memory of an example: bytes of images, float32 of features."""
        return math.prod(self.stored_shape) * (4 if len(self.stored_shape) == 1 else 1)


def few(names: Sequence[str]) -> str:
    """The first few of some names."""
    return f"{', '.join(names[:_FEW])}{', ...' if len(names) > _FEW else ''}"


def contents(class_names: Sequence[str], splits: Mapping[str, int], note: str = "") -> str:
    """Describes classes and splits in a line."""
    sizes = ", ".join(f"{size:,} for {split}" for split, size in splits.items())
    return f"{len(class_names)} classes ({few(class_names)}): {sizes}{note and '; '}{note}"


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Pictures on the disk, read or decoded when they are sliced; used like an array."""

    rows: np.ndarray  # [n], positions in the split
    size: int  # pixels of a side
    dtype: ClassVar[np.dtype] = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, ...]:
        """`[n, size, size, 3]`."""
        return len(self.rows), self.size, self.size, 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, wanted: Any) -> np.ndarray:
        raise NotImplementedError

    def subset(self, rows: np.ndarray) -> Self:
        """Selects some by position."""
        return dataclasses.replace(self, rows=self.rows[rows])

    def uncut(self) -> Self:
        """The same pictures as training crops them: with what is stored around the middle."""
        return self


# Slicing gives `[n, height, width, channels]` uint8, or `[n, features]` float32.
Images = np.ndarray | Pictures


class Dataset(Protocol):
    """A dataset, made once per run by `registry.dataset`. It may keep what it has found out.

    All methods raise an InputError where the data cannot be had or are damaged, or their source
    has changed since it was prepared.
    """

    def info(self) -> DatasetInfo | None:
        """Facts about it; of pictures not yet prepared, upper bounds or None."""

    def is_prepared(self) -> bool:
        """True where `load` will find it."""

    def prepare(self, log: Callable[[str], None] = say) -> None:
        """Obtains and converts it where that was not done; once is enough.

        Interrupted at any moment, it leaves nothing that passes for prepared, and can be run again.
        Of several processes at once the first prepares, and the others wait. `log` is told what is
        done, a line at a time.
        """

    def digest(self) -> str:
        """Digest of what is trained on, the same wherever it lies; '' where it is not known."""

    def files(self, split: str) -> np.ndarray | None:
        """The names of a split's pictures, `[n]` in its order; None where they have none."""

    def groups(self, split: str) -> np.ndarray | None:
        """Groups of dependent examples of a split, such as copies, `[n]` integers; None: none.

        A number means the same group in every split.
        """

    def reports(self) -> list[Path]:
        """Files on the data themselves, such as copies among them, that a run keeps."""

    def load(self, split: str, *, decode: bool = False) -> tuple[Images, np.ndarray]:
        """Reads an official split, in its order: images, and labels `[n]` int32.

        Arrays are the caller's own.

        Args:
            split: one of `DatasetInfo.splits`.
            decode: decode encoded pictures whenever they are sliced. Otherwise squares are read,
                which are made first where they are missing. Arrays are the same either way.
        """
