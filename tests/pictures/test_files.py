import io
import struct
import subprocess
import sys

import pytest
from PIL import Image

from cogview_pipelines.pictures.files import as_mask, opacity_of, open_picture


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_files_of_the_usual_kinds_are_opened(kind):
    image = open_picture(encode(Image.new("RGB", (6, 4), "red"), kind), 24)
    assert image.size == (6, 4)


def test_one_pixel_over_the_limit_is_too_many():
    with pytest.raises(ValueError, match=r"may have 23 pixels, but has 6 x 4"):
        open_picture(encode(Image.new("RGB", (6, 4))), 23)


def test_other_kinds_are_refused_whatever_they_hold():
    with pytest.raises(ValueError, match="no picture that can be read"):
        open_picture(encode(Image.new("RGB", (6, 4)), "TIFF"), 100)


def test_a_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    assert open_picture(encode(Image.new("RGB", (6, 4)), "JPEG", exif=exif), 100).size == (4, 6)


def test_a_jpeg_file_with_further_versions_of_its_picture_is_no_animation():
    pictures = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    content = encode(pictures[0], "MPO", save_all=True, append_images=pictures[1:])
    red, _, blue = open_picture(content, 100).convert("RGB").getpixel((0, 0))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("at", [30, 60, -60])
def test_a_file_that_was_cut_off_is_damaged(at):
    image = Image.effect_noise((40, 40), 100)
    with pytest.raises(ValueError, match=r"damaged|no picture"):
        open_picture(encode(image)[:at], 2000)


def test_a_mask_is_what_is_bright_or_what_is_transparent():
    image = Image.new("RGB", (2, 1), "white")
    assert list(as_mask(image).tobytes()) == [255, 255]
    image.putalpha(Image.frombytes("L", (2, 1), bytes([0, 255])))
    assert list(as_mask(image).tobytes()) == [255, 0]
    assert opacity_of(image) is not None
    image.putalpha(255)
    assert opacity_of(image) is None  # all of it is opaque: then the colours count
    assert list(as_mask(image).tobytes()) == [255, 255]


def test_a_mask_of_16_bits_is_white_where_it_is_bright():
    image = Image.frombytes("I;16", (4, 1), struct.pack("<4H", 0, 300, 32768, 65535))
    mask = as_mask(open_picture(encode(image), 100))
    assert (mask.mode, list(mask.tobytes())) == ("L", [0, 1, 128, 255])


def test_a_palette_with_a_transparent_colour_has_transparent_parts():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.putpixel((1, 0), 1)
    image = open_picture(encode(image, transparency=0), 100)
    assert list(as_mask(image).tobytes()) == [255, 0]


def test_nothing_heavy_is_imported():
    code = "import cogview_pipelines.pictures.files, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
