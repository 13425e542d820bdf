"""Pictures of every kind become RGB squares."""

import io

import numpy as np
import pytest
from PIL import Image

from sync_jax.data.images import BadImageError, decode, square
from tests.data.pictures import pixels


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def load_square(data, size):
    return square(decode(data), size, size)


def test_a_square_of_its_own_size_is_untouched():
    image = pixels(0)
    np.testing.assert_array_equal(load_square(encoded(Image.fromarray(image)), 12), image)


@pytest.mark.parametrize(("height", "width"), [(12, 20), (20, 12), (12, 13)])
def test_the_middle_is_cut_out(height, width):
    image = pixels(1, height, width)
    top, left = (height - 12) // 2, (width - 12) // 2
    np.testing.assert_array_equal(
        load_square(encoded(Image.fromarray(image)), 12), image[top : top + 12, left : left + 12]
    )


def test_halving_is_antialiased():
    """By hand: of a checkerboard of single pixels nothing but its mean is left in the middle."""
    board = np.indices((16, 16)).sum(axis=0) % 2 * 255
    image = Image.fromarray(board.astype(np.uint8))
    small = load_square(encoded(image), 8)
    assert np.all(np.abs(small[2:-2, 2:-2].astype(int) - 127.5) < 2)


def test_one_pixel_and_one_row():
    assert (
        load_square(encoded(Image.new("RGB", (1, 1), (1, 2, 3))), 8).tolist()
        == [[[1, 2, 3]] * 8] * 8
    )
    assert load_square(encoded(Image.new("RGB", (20_000, 1))), 8).shape == (8, 8, 3)


def test_modes_become_rgb():
    grey = pixels(2)[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    sixteen = grey.astype(np.uint16) * 256 + 17
    rgba = np.dstack([pixels(3), np.zeros((12, 12), np.uint8)])
    half = np.dstack([np.zeros((12, 12, 3), np.uint8), np.full((12, 12), 128, np.uint8)])
    cmyk = Image.fromarray(pixels(4)).convert("CMYK")
    palette = Image.fromarray(as_rgb).convert("P")
    for name, data, expected in (
        ("grey", encoded(Image.fromarray(grey)), as_rgb),
        ("16 bits", encoded(Image.fromarray(sixteen)), as_rgb),
        ("16-bit TIFF", encoded(Image.fromarray(sixteen), "TIFF"), as_rgb),
        ("transparent", encoded(Image.fromarray(rgba)), np.full((12, 12, 3), 255)),
        ("half transparent", encoded(Image.fromarray(half)), np.full((12, 12, 3), 127)),
        ("CMYK", encoded(cmyk, "TIFF"), np.asarray(cmyk.convert("RGB"))),
        ("palette", encoded(palette), np.asarray(palette.convert("RGB"))),
        ("bilevel", encoded(Image.fromarray(grey > 127)), 255 * (as_rgb > 127)),
    ):
        np.testing.assert_array_equal(load_square(data, 12), expected, err_msg=name)


@pytest.mark.parametrize(("orientation", "turns"), [(3, 2), (6, 3), (8, 1)])
def test_exif_orientation_is_followed(orientation, turns):
    image = pixels(5)
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(
        load_square(encoded(Image.fromarray(image), exif=exif), 12), np.rot90(image, turns)
    )


def test_of_large_pictures_pillow_says_nothing_without_a_name(monkeypatch):
    """As of 144 megapixels, where Pillow's limit is 89 and its warning an error of the tests."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = pixels(7)
    np.testing.assert_array_equal(load_square(encoded(Image.fromarray(image)), 12), image)


def test_what_is_no_picture_says_why():
    good = encoded(Image.fromarray(pixels(6, 64, 64)), "JPEG")
    for data, message in (
        (b"", "no picture of a known kind"),
        (b"<html>", "no picture of a known kind"),
        (good[: len(good) // 2], "truncated"),
        (encoded(Image.fromarray(pixels(6)))[:200], "truncated|broken|not enough"),
        (encoded(Image.fromarray(pixels(6)[..., 0].astype(np.float32)), "TIFF"), "floating"),
    ):
        with pytest.raises(BadImageError, match=message) as caught:
            load_square(data, 8)
        assert "\n" not in str(caught.value)
