"""Inputs of a trained network from what a user has: paths, pictures, arrays or features.

Exactly as a prepared dataset makes them for evaluation. Needs NumPy, and Pillow for pictures.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sync_jax.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# What `Preprocessing.batch` takes.
Inputs = Any  # a path, a PIL image, a sequence of these, or an array


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The form of a network's inputs; sizes in pixels, as of `data.images.Layout`."""

    shape: tuple[int, ...]  # (height, width, channels), or (features,)
    short_side: int = 0
    stored: int = 0
    largest_side: int | None = None  # longer short sides were resized to it when preparing

    def batch(self, inputs: Inputs) -> np.ndarray:
        """Makes a batch `[n, height, width, channels]` uint8, or `[n, features]` float32.

        Arrays of the network's own size are taken as they are, of the stored size their middle is,
        and others are treated as pictures.

        Raises:
            InputError: a file cannot be read as a picture.
            ValueError: an array is no image or no features of the right number.
        """
        if len(self.shape) == 1:
            return self._features(inputs)
        if isinstance(inputs, str | Path) or hasattr(inputs, "convert"):
            inputs = [inputs]
        if not isinstance(inputs, np.ndarray) and isinstance(inputs, Sequence):
            if not len(inputs):
                raise ValueError("inputs are empty")
            if not all(isinstance(x, np.ndarray) for x in inputs):
                return np.stack([self._named(x) for x in inputs])
            if len({x.shape for x in inputs}) > 1:
                return np.stack([self._array(x[None])[0] for x in inputs])
        return self._array(np.asarray(inputs))

    def picture(self, source: "str | Path | bytes | Image.Image") -> np.ndarray:
        """The square of one picture, `[height, width, channels]` uint8.

        Raises a `data.images.BadImageError` where it is none.
        """
        from PIL import Image

        from sync_jax.data.images import centre, decode, reduced, square

        if isinstance(source, Image.Image):
            image = source.convert("RGB")
        elif isinstance(source, str | Path | bytes):
            image = decode(source if isinstance(source, bytes) else Path(source))
        else:
            raise ValueError(f"a picture must be a path, bytes or a PIL image, got {type(source)}")
        if smaller := reduced(image, self.largest_side):
            image = decode(smaller)
        if self.shape[2] == 1:
            image = image.convert("L")
        return centre(square(image, self.short_side, self.stored), self.shape[0])

    def _named(self, source: Any) -> np.ndarray:
        from sync_jax.data.images import BadImageError

        try:
            return self.picture(source)
        except BadImageError as error:
            name = source if isinstance(source, str | Path) else "a picture"
            raise InputError(f"{name} cannot be read: {error}") from error

    def _array(self, images: np.ndarray) -> np.ndarray:
        height, width, channels = self.shape
        if images.ndim == 3 and (channels == 1 or images.shape[-1] != channels):
            images = images[..., None]
        elif images.ndim == 3:  # a single one
            images = images[None]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, channels):
            raise ValueError(
                f"images must be uint8 [n, height, width, {channels}], got {images.dtype} of shape "
                f"{images.shape}"
            )
        if images.shape[1:] == self.shape:
            return images
        if images.shape[1:] == (self.stored, self.stored, channels):
            top, left = ((self.stored - length) // 2 for length in (height, width))
            return images[:, top : top + height, left : left + width]
        if 0 in images.shape:
            raise ValueError(f"images are empty: {images.shape}")
        from PIL import Image

        squeezed = images[..., 0] if images.shape[-1] == 1 else images
        return np.stack([self.picture(Image.fromarray(image)) for image in squeezed])

    def _features(self, inputs: Inputs) -> np.ndarray:
        features = np.asarray(inputs)
        if (
            features.ndim != 2
            or features.shape[1:] != self.shape
            or features.dtype.kind not in "biuf"
        ):
            raise ValueError(
                f"features have shape {features.shape}, expected [n, {self.shape[0]}] numbers"
            )
        with np.errstate(over="ignore"):
            features = features.astype(np.float32)
        if not np.isfinite(features).all():
            raise ValueError("features hold a number that is not finite in float32")
        return features

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Inverse of `to_json`."""
        known = {field.name: fields[field.name] for field in dataclasses.fields(cls)}
        return cls(**known | {"shape": tuple(map(int, known["shape"]))})
