"""Arrays that the caller has in memory: images, or features such as embeddings."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sync_jax.data.info import DatasetInfo
from sync_jax.errors import InputError
from sync_jax.runtime.console import say
from sync_jax.runtime.memory import aligned_empty

_ROWS = 4096  # of images, summed at once

Examples = tuple[np.ndarray, np.ndarray]


class MemoryDataset:
    """A `Dataset` of arrays; they are copied when they are loaded, and never changed."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        test: Examples | None = None,
        groups: ArrayLike | None = None,
    ):
        """Checks and measures the arrays.

        Args:
            images: `[n, height, width]` or `[n, height, width, channels]` uint8, or features
                `[n, d]` of any real dtype.
            labels: `[n]` integers from 0 to the number of class names - 1.
            class_names: one for each label.
            test: images and labels of a test split, of the same kind; None: there is none.
            groups: `[n]` integers or strings; examples of one group, such as a patient's, depend on
                each other. None: all are independent.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        classes = len(class_names)
        self._splits = {"train": _checked("images", images, labels, classes)}
        if test is not None:
            self._splits["test"] = _checked("test images", *test, classes)
        self._groups = None
        if groups is not None:
            given = np.asarray(groups)
            if given.shape != (len(labels),) or given.dtype.kind not in "iuSU":
                raise ValueError(
                    f"groups must be {len(labels)} integers or strings, one for each example; got "
                    f"{given.dtype} of shape {given.shape}"
                )
            self._groups = np.unique(given, return_inverse=True)[1]
        shape = self._splits["train"][0].shape[1:]
        for kept, _ in self._splits.values():
            if kept.shape[1:] != shape:
                raise ValueError(f"test images have shape {kept.shape[1:]}, images have {shape}")
        scale = 1.0 if len(shape) == 1 else 255.0
        mean, std = _moments(self._splits["train"][0], scale)
        self._info = DatasetInfo(
            name="memory",
            num_classes=classes,
            image_shape=shape,
            class_names=tuple(map(str, class_names)),
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            num_train=len(labels),
            num_test=0 if test is None else len(test[1]),
            scale=scale,
        )

    def info(self) -> DatasetInfo:
        """See `Dataset.info`."""
        return self._info

    def is_prepared(self) -> bool:
        """See `Dataset.is_prepared`."""
        return True

    def prepare(self, log: Callable[[str], None] = say) -> None:
        """Does nothing."""

    def digest(self) -> str:
        """See `Dataset.digest`."""
        digest = hashlib.sha256()
        for split, (images, labels) in self._splits.items():
            for array in (images, labels):
                digest.update(f"{split} {array.dtype} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def files(self, split: str) -> np.ndarray | None:
        """See `Dataset.files`; None."""
        del split
        return None

    def groups(self, split: str) -> np.ndarray | None:
        """See `Dataset.groups`."""
        return self._groups if split == "train" else None

    def reports(self) -> list[Path]:
        """See `Dataset.reports`."""
        return []

    def load(self, split: str, *, decode: bool = False) -> Examples:
        """See `Dataset.load`."""
        del decode
        if split not in self._splits:
            raise InputError(f"there is no {split} split: {', '.join(self._splits)} was given")
        images, labels = self._splits[split]
        # A place where a CPU's XLA computes with it.
        copy = aligned_empty((*images.shape[:-1], images.shape[-1] * images.itemsize))
        copy = copy.view(images.dtype)
        copy[...] = images
        return copy, labels.copy()


def as_inputs(images: ArrayLike, name: str) -> np.ndarray:
    """Images `[n, height, width, channels]` uint8 or features `[n, d]` float32, or a ValueError."""
    x = np.asarray(images)
    if x.ndim == 3:
        x = x[..., None]
    if x.ndim == 4 and x.dtype != np.uint8:
        raise ValueError(f"{name} must be uint8, from 0 to 255; got {x.dtype}")
    if x.ndim not in (2, 4) or x.dtype.kind not in "biuf" or 0 in x.shape:
        raise ValueError(
            f"{name} must be uint8 [n, height, width] or [n, height, width, channels], or real "
            f"features [n, d]; got {x.dtype} of shape {x.shape}"
        )
    if x.ndim == 2:
        with np.errstate(over="ignore"):
            x = x.astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"{name} hold a number that is not finite in float32")
    return x


def _checked(name: str, images: object, labels: object, classes: int) -> Examples:
    x, y = as_inputs(images, name), np.asarray(labels)  # type: ignore[arg-type]
    labels_name = name.replace("images", "labels")
    if y.shape != (len(x),) or y.dtype.kind not in "iu":
        raise ValueError(
            f"{labels_name} must be {len(x)} integers, one for each of {name}; got {y.dtype} of "
            f"shape {y.shape}"
        )
    if y.min() < 0 or y.max() >= classes:
        raise ValueError(
            f"{labels_name} are {y.min()} to {y.max()}; with {classes} class names they must be 0 "
            f"to {classes - 1}"
        )
    return x, y.astype(np.int32)


def _moments(values: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of the last axis; the deviation of what never changes is 1."""
    width = values.shape[-1]
    count, total = values.size // width, np.zeros(width)
    for start in range(0, len(values), _ROWS):
        total += values[start : start + _ROWS].reshape(-1, width).sum(axis=0, dtype=np.float64)
    mean = total / count
    squares = np.zeros(width)
    for start in range(0, len(values), _ROWS):
        some = values[start : start + _ROWS].reshape(-1, width)
        squares += np.square(some - mean).sum(axis=0)
    std = np.sqrt(squares / count)
    # What rounding leaves of a constant is no deviation.
    constant = std <= 1e-12 * np.abs(mean)
    return mean / scale, np.where(constant, 1.0, std / scale)
