import io
import re
import struct
import subprocess
import sys
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from cogview_pipelines.pictures.colours import as_srgb, on_white
from cogview_pipelines.pictures.files import FORMATS, as_mask, find_file, opacity_of, open_picture, read_picture

from .utils import (
    DISPLAY_P3,
    corners,
    encode,
    exchanged_primaries,
    exif,
    profile_with,
    srgb_profile,
    with_chunk,
    with_jpeg_segment,
    with_webp_chunks,
)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_files_of_the_usual_kinds_are_opened(kind):
    image = open_picture(encode(Image.new("RGB", (6, 4), "red"), kind), 24)
    assert image.size == (6, 4)


def test_one_pixel_over_the_limit_is_too_many():
    picture = encode(Image.new("RGB", (6, 4)))
    assert open_picture(picture, 24).size == (6, 4)
    with pytest.raises(ValueError, match=r"may have 23 pixels, but has 6 x 4"):
        open_picture(picture, 23)


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


# Metadata that are wrong --------------------------------------------------------------------------------------------

ASCII_RESOLUTION = (0x011A, 2, 3, int.from_bytes(b"72\0\0", "little"))  # XResolution as text, as some editors write it
KINDS = ("PNG", "JPEG", "WEBP", "TIFF")


def with_exif(kind, image, data):
    """A file of a kind with EXIF data, be they right or wrong."""
    if kind == "PNG":
        return with_chunk(encode(image), b"eXIf", data)
    if kind == "JPEG":
        return with_jpeg_segment(encode(image, "JPEG", quality=95, subsampling=0), 0xE1, b"Exif\0\0" + data)
    return with_webp_chunks(encode(image, "WEBP", lossless=True), image.size, EXIF=data)


def names_of_corners(image):
    """The colours of the four quarters, row by row."""
    width, height = image.size
    names = {(1, 0, 0): "red", (0, 1, 0): "lime", (0, 0, 1): "blue", (1, 1, 1): "white"}
    places = [(x, y) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return [names[tuple(value > 128 for value in image.convert("RGB").getpixel(place))] for place in places]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_undone_as_pil_does(kind, orientation, order):
    content = with_exif(kind, corners(), exif(orientation, order=order))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    image = open_picture(content)
    assert (image.size, names_of_corners(image)) == (expected.size, names_of_corners(expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_resolution_that_is_text_harms_nothing(kind):
    if kind == "TIFF":
        content = tiff_with_text_as_resolution()
    else:
        content = with_exif(kind, corners(), exif(6, ASCII_RESOLUTION))
    image = open_picture(content, formats=FORMATS)
    assert image.size == (32, 48)
    assert names_of_corners(image) == ["blue", "red", "white", "lime"]  # turned to the right


def tiff_with_text_as_resolution():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112] = 6
    tags[0x011A], tags.tagtype[0x011A] = "72", 2
    return encode(corners(), "TIFF", tiffinfo=tags)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"II*\0",
        b"XX*\0" + bytes(20),
        b"II*\0" + b"\xff" * 40,
        exif(0),
        exif(9),
        exif(6)[:15],
        exif(6).replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0"),  # an orientation that is text
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_orientation_that_makes_no_sense_is_none(kind, data):
    assert names_of_corners(open_picture(with_exif(kind, corners(), data))) == ["red", "lime", "blue", "white"]


@pytest.mark.parametrize(
    "chunk",
    [
        (b"tEXt", b"comment\0" + b"a" * (2**20 + 1)),
        (b"zTXt", b"comment\0\0" + zlib.compress(b"a" * (2**20 + 1))),
        (b"zTXt", b"comment\0\0" + zlib.compress(bytes(2**26))),
        (b"zTXt", b"comment"),
        (b"iTXt", b"comment\0\1\0\0\0no zlib data"),
        (b"iCCP", b"profile\0\0no zlib data"),
        (b"iCCP", b""),
        (b"pHYs", b"1"),
        (b"gAMA", b""),
        (b"cHRM", b"12"),
        (b"eXIf", b""),
        (b"sRGB", b""),
        (b"acTL", b""),
        (b"tIME", b"1"),
    ],
    ids=lambda chunk: f"{chunk[0].decode()}-{len(chunk[1])}",
)
def test_no_chunk_beside_the_pixels_of_a_png_file_harms_them(chunk):
    assert names_of_corners(open_picture(with_chunk(encode(corners()), *chunk))) == ["red", "lime", "blue", "white"]


def test_a_text_chunk_with_a_wrong_checksum_harms_no_pixels():
    content = with_chunk(encode(corners()), b"tEXt", b"prompt\0a tiger").replace(b"a tiger", b"a liger")
    assert names_of_corners(open_picture(content)) == ["red", "lime", "blue", "white"]


@pytest.mark.parametrize("marker, data", [(0xE0, b"JFIF\0"), (0xE1, b"Exif"), (0xE2, b"MPF\0II*\0"), (0xEE, b"Adobe")])
def test_no_segment_before_the_pixels_of_a_jpeg_file_harms_them(marker, data):
    content = with_jpeg_segment(encode(corners(), "JPEG"), marker, data)
    assert names_of_corners(open_picture(content)) == ["red", "lime", "blue", "white"]


def test_damaged_pixels_are_damage():
    content = bytearray(encode(Image.effect_noise((40, 40), 100)))
    content[200] ^= 0xFF
    with pytest.raises(ValueError, match="is damaged: its PNG data"):
        open_picture(bytes(content))


# Colours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_other_primaries_become_srgb(kind):
    profile = exchanged_primaries()
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    image = open_picture(encode(corners(), kind, icc_profile=profile, **options), formats=FORMATS)
    assert names_of_corners(image) == ["blue", "lime", "red", "white"]
    assert "icc_profile" not in image.info


def test_display_p3_becomes_the_srgb_that_the_matrices_give():
    """The expected bytes are computed from the definition: linear light, D50 XYZ of one space, back in the other."""
    rgb = (200, 120, 90)
    srgb = {
        b"rXYZ": (0.43607, 0.22249, 0.01392),
        b"gXYZ": (0.38515, 0.71687, 0.09708),
        b"bXYZ": (0.14307, 0.06061, 0.71410),
    }
    to_xyz, from_xyz = (np.array(list(space.values())).T for space in (DISPLAY_P3, srgb))
    light = np.array([(value / 255 + 0.055) / 1.055 for value in rgb]) ** 2.4
    linear = np.linalg.solve(from_xyz, to_xyz @ light)
    expected = (1.055 * linear ** (1 / 2.4) - 0.055) * 255
    assert abs(expected - rgb).max() > 5
    content = encode(Image.new("RGB", (2, 2), rgb), icc_profile=profile_with(DISPLAY_P3))
    assert open_picture(content).getpixel((0, 0)) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("profile", [srgb_profile(), None, b"no profile", srgb_profile()[:200]])
def test_bytes_of_srgb_pictures_stay_what_they_are(profile):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    content = encode(Image.fromarray(pixels), icc_profile=profile)
    assert np.array_equal(np.asarray(open_picture(content)), pixels)


def test_the_profile_of_another_kind_of_picture_is_passed_over():
    content = encode(Image.new("L", (2, 2), 77), icc_profile=srgb_profile())
    assert open_picture(content).getpixel((0, 0)) == 77


def test_transparency_outlives_a_profile():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 40))
    converted = open_picture(encode(image, icc_profile=exchanged_primaries()))
    assert converted.mode == "RGBA"
    assert converted.getpixel((0, 0)) == pytest.approx((0, 0, 255, 40), abs=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"])
def test_every_mode_becomes_one_of_eight_bits(mode):
    image = Image.new("RGB", (3, 2), "white")
    image = Image.new(mode, (3, 2), 1.0 if mode == "F" else 65535) if mode[0] in "IF" else image.convert(mode)
    image = as_srgb(image)
    assert image.mode in ("L", "LA", "RGB", "RGBA")
    assert min(image.convert("RGB").getpixel((1, 1))) >= 254


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_sixteen_bits_are_scaled(mode):
    order = ">" if mode == "I;16B" else "<"
    image = Image.frombytes(mode, (4, 1), struct.pack(f"{order}4{'i' if mode == 'I' else 'H'}", 0, 300, 40000, 65535))
    assert list(as_srgb(image).tobytes()) == [0, 1, 156, 255]


def test_sixteen_bits_of_a_png_file_and_floats_of_a_tiff_file_are_scaled():
    grey = Image.frombytes("I;16", (2, 1), struct.pack("<2H", 40000, 300))
    assert list(open_picture(encode(grey)).tobytes()) == [156, 1]
    floats = Image.frombytes("F", (3, 1), struct.pack("<3f", 0, 0.5, 1))
    assert list(open_picture(encode(floats, "TIFF"), formats=FORMATS).tobytes()) == [0, 128, 255]


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_floats_outside_of_their_range_are_refused(value):
    image = Image.frombytes("F", (2, 1), struct.pack("<2f", 0.5, value))
    with pytest.raises(ValueError, match=r"holds floating point numbers from .* Scale them"):
        as_srgb(image)


# Files --------------------------------------------------------------------------------------------------------------


def test_files_are_read_by_name_and_every_error_names_them(tmp_path):
    corners().save(tmp_path / "good.tif")
    assert names_of_corners(read_picture(tmp_path / "good.tif")) == ["red", "lime", "blue", "white"]
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(encode(Image.effect_noise((40, 40), 100))[:-60])
    Image.new("F", (2, 2), 7).save(tmp_path / "float.tif")
    Image.new("L", (50, 40)).save(tmp_path / "large.png")
    for name, reason in {
        "text.png": "is no picture",
        "cut.png": "is damaged",
        "float.tif": "holds floating point numbers from 7 to 7",
        "large.png": "may have 1,600 pixels, but has 50 x 40",
        "gone.png": "",
        "x" * 300 + ".png": "",
    }.items():
        with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path / name))}.*{reason}"):
            read_picture(tmp_path / name, 1600)


@pytest.mark.parametrize("on_disk, asked", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_are_found_however_their_accents_are_written(tmp_path, on_disk, asked):
    path = tmp_path / unicodedata.normalize(on_disk, "né") / unicodedata.normalize(on_disk, "ü.png")
    path.parent.mkdir()
    path.write_bytes(encode(corners()))
    found = find_file(tmp_path / unicodedata.normalize(asked, "né") / unicodedata.normalize(asked, "ü.png"))
    assert found == path
    assert find_file(tmp_path / "none.png") == tmp_path / "none.png"


def test_on_white_shows_what_is_seen_on_a_page():
    assert on_white(Image.new("RGBA", (1, 1), (0, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert on_white(Image.new("LA", (1, 1), (0, 255))).getpixel((0, 0)) == (0, 0, 0)
    assert on_white(Image.new("L", (1, 1), 9)).getpixel((0, 0)) == (9, 9, 9)
