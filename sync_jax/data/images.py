"""Decodes pictures of any kind to RGB, and makes squares of them."""

import dataclasses
import io
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sync_jax.errors import InputError

if TYPE_CHECKING:  # an exported classifier is used without it
    from ml_collections import ConfigDict

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
# Not all kinds that Pillow knows: it would hand PostScript to Ghostscript, which executes it.
_KINDS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
_OPENING = threading.Lock()  # the filters of warnings are all threads'
_MOST_PIXELS = 150_000_000  # of a picture; decoded it takes three bytes each or more


@dataclasses.dataclass(frozen=True)
class Layout:
    """The sizes of pictures, in pixels."""

    short_side: int  # that pictures are resized to
    stored: int  # side of the square cut from the middle of that, and kept
    size: int  # side of the network's input, the middle of the square

    @classmethod
    def of(cls, section: "ConfigDict") -> "Layout":
        """Reads the `data` section of a config, where 0 stands for the size below."""
        stored = section.stored_size or section.short_side or section.image_size
        short_side = section.short_side or stored
        if not section.image_size <= stored <= short_side:
            raise InputError(
                f"config.data.image_size={section.image_size}, stored_size={stored} and "
                f"short_side={short_side} must not decrease in this order"
            )
        return cls(short_side, stored, section.image_size)


class BadImageError(Exception):
    """A file that cannot be read as a picture; the message says why."""


def decode(source: Path | bytes) -> Image.Image:
    """Decodes a file or its contents to RGB, turned as its EXIF orientation says.

    Grey, 16-bit, palette and CMYK are converted, transparent parts become white, and of an
    animation the first picture is taken. Raises a BadImageError where that cannot be done.
    """
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else source
        with _OPENING, warnings.catch_warnings():
            # Pillow's limit is lower than ours, and its warning names no picture.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(file, formats=_KINDS)
        with image:
            if image.width * image.height > _MOST_PIXELS:
                raise BadImageError(f"{image.width} x {image.height} pixels are too many")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # copies only what it turns
            return _to_rgb(image)
    except BadImageError:
        raise
    except UnidentifiedImageError:
        raise BadImageError("it is no picture of a known kind") from None
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


def square(image: Image.Image, short_side: int, size: int) -> np.ndarray:
    """Resizes a picture to a short side, and cuts a square from its middle.

    Returns `[size, size, channels]` uint8; bilinear and antialiased.
    """
    side = min(image.size) * size / short_side
    left, top = ((length - side) / 2 for length in image.size)
    if size == short_side:
        left, top = int(left), int(top)  # whole pixels where that is possible
    # Cut and resize in one: a picture of one row does not first become thousands wide.
    box = (left, top, left + side, top + side)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
    return pixels.reshape(size, size, -1)


def centre(images: np.ndarray, size: int) -> np.ndarray:
    """Cuts the square of a size from the middle of images `[..., height, width, channels]`."""
    top, left = ((length - size) // 2 for length in images.shape[-3:-1])
    return images[..., top : top + size, left : left + size, :]


def reduced(image: Image.Image, largest_side: int | None) -> bytes | None:
    """A picture whose short side is longer than `largest_side`, resized to that, as a JPEG."""
    short = min(image.size)
    if not largest_side or short <= largest_side:
        return None
    width, height = (max(round(x * largest_side / short), 1) for x in image.size)
    out = io.BytesIO()
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    resized.save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16 bits; "I" is what some versions of Pillow make of them.
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65_535):
            raise BadImageError("its pixels are not of 8 or 16 bits")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("its pixels are floating-point numbers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
