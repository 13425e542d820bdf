"""What happens to a training image, whichever pipeline does it; imports no JAX."""

from typing import NamedTuple

from ml_collections import ConfigDict


class Augmentation(NamedTuple):
    """What happens to a training image, in this order.

    By `augmentation.augment`, on the device; the host pipeline makes the resized crops itself, of
    pictures of any size, by `random_crop`.

    Attributes:
        crop_padding: zero pixels added on every side before a random crop of the original size.
        flip: mirror left to right with probability 1/2.
        rotation: degrees; turn about the centre by an angle uniform up to this, either way, by the
            nearest pixel; before all else where nothing is resized (the field's way on SVHN), else
            after the flip (Stanford Cars).
        min_crop_area: a random crop of a share of the area uniform from this to 1, resized to the
            whole, before crop_padding; 1 for none.
        jitter: brightness, contrast and saturation are multiplied by factors uniform from
            1 - jitter to 1 + jitter.
        sharpen: probability of doubling the sharpness.
        grey: probability of losing the colours.
        perspective: probability of moving the corners inwards by up to a quarter of a side.
        posterise: probability of keeping two bits of each value.
    """

    crop_padding: int
    flip: bool
    rotation: float = 0.0
    min_crop_area: float = 1.0
    jitter: float = 0.0
    sharpen: float = 0.0
    grey: float = 0.0
    perspective: float = 0.0
    posterise: float = 0.0

    @classmethod
    def of(cls, section: ConfigDict) -> "Augmentation":
        """Of the `data` section of a config."""
        padding, flip, *rest = (section[name] for name in cls._fields)
        return cls(padding, flip, *map(float, rest))


# Random resized crops: aspect ratios from 3/4 to its inverse, so many tries at one that fits.
RATIO, TRIES = 4 / 3, 10
SHARPNESS = 2.0  # factor
DISTORTION = 0.5  # of perspective: corners move by up to half of this times a side
POSTERISED = 0xC0  # the two bits that are kept
LUMA = (0.299, 0.587, 0.114)
