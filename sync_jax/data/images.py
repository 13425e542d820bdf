"""A picture of any kind as a square of RGB pixels."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (*(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"),)
_MOST_PIXELS = 150_000_000  # of a picture; decoded it takes three bytes each or more


class BadImageError(Exception):
    """A file that cannot be read as a picture; the message says why."""


def load_square(source: Path | bytes, size: int) -> np.ndarray:
    """Decodes a picture, makes it RGB, cuts the square from its middle and resizes that.

    Turned as its EXIF orientation says; grey, 16-bit, palette and CMYK converted; transparent
    parts white; of an animation the first picture.

    Args:
        source: the file, or its contents.
        size: pixels of a side of the result.

    Returns:
        `[size, size, 3]` uint8; resized bilinear and antialiased.

    Raises:
        BadImageError: it is truncated, damaged, too large or no picture.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise BadImageError(f"{image.width} x {image.height} pixels are too many")
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _square(_to_rgb(upright), size)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise BadImageError(" ".join(str(error).split()) or type(error).__name__) from error


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
    return image.convert("RGB")


def _square(image: Image.Image, size: int) -> np.ndarray:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    # Cut and resize in one: a picture of one row does not first become thousands wide.
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))
