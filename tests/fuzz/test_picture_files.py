"""Picture files with mutations: a picture, or a sentence; never another error, nor more memory than its pixels."""

import random

import pytest
from PIL import Image, TiffImagePlugin

from cogview_pipelines.pictures.files import FORMATS, open_picture
from cogview_pipelines.pictures.png import encode_png, read_metadata

from ..pictures.utils import (
    corners,
    encode,
    exchanged_primaries,
    exif,
    png_chunk,
    with_chunk,
    with_jpeg_segment,
    with_webp_chunks,
)
from .utils import cases, mutated, peak_memory

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, of TIFF files

MOST_PIXELS = 100_000
MEBIBYTE = 2**20
# An orientation among entries of every type: texts, numbers, fractions, places outside of the data
EXIF = exif(
    6,
    (0x010E, 2, 12, 80),
    (0x011A, 5, 1, 60),
    (0x0128, 3, 1, 2),
    (0x8769, 4, 1, 0x7FFFFFFF),
    (0x9286, 7, 9, 40),
    (0xFFFF, 12, 2**20, 8),
)
TEXTS = (
    (b"tEXt", b"Software\0cogview_pipelines"),
    (b"zTXt", b"comment\0\0x\x9c\x03\0\0\0\0\1"),
    (b"iTXt", "prompt\0\0\0\0\0一只老虎".encode()),
    (b"pHYs", b"\0\0\x0b\x13\0\0\x0b\x13\1"),
    (b"gAMA", b"\0\0\xb1\x8f"),
    (b"tIME", b"\x07\xe8\1\1\1\1\1"),
    (b"eXIf", EXIF),
)


def png() -> bytes:
    content = encode(corners(), icc_profile=exchanged_primaries())
    for kind, data in TEXTS:
        content = with_chunk(content, kind, data)
    return content


def jpeg() -> bytes:
    content = encode(corners(), "JPEG", icc_profile=exchanged_primaries(), comment=b"made for tests", dpi=(72, 72))
    return with_jpeg_segment(content, 0xE1, b"Exif\0\0" + EXIF)


def tiff() -> bytes:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[270], tags[305], tags[274] = "a picture", "tests", 6
    return encode(corners(), "TIFF", tiffinfo=tags, icc_profile=exchanged_primaries(), dpi=(72, 72))


def animation(kind) -> bytes:
    return encode(corners(), kind, save_all=True, append_images=[corners().rotate(90)], duration=50)


FILES = {
    "png": png,
    "jpeg": jpeg,
    "webp": lambda: with_webp_chunks(
        encode(corners(), "WEBP", lossless=True), corners().size, EXIF=EXIF, ICCP=exchanged_primaries()
    ),
    "tiff": tiff,
    "gif": lambda: encode(corners().convert("P"), "GIF", transparency=0, comment=b"made for tests"),
    "bmp": lambda: encode(corners(), "BMP"),
    "apng": lambda: animation("PNG"),
    "16-bit": lambda: encode(Image.new("I;16", (48, 32), 40000), pnginfo=None),
    "float": lambda: encode(Image.new("F", (48, 32), 0.5), "TIFF"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mutated_file_is_a_picture_or_a_sentence(name):
    whole, before = FILES[name](), peak_memory()
    for seed, source in cases(100):
        last = source.choice([64, 700, None])  # mostly what stands before the pixels
        content = mutated(whole, source, last)
        try:
            image = open_picture(content, MOST_PIXELS, FORMATS)
        except ValueError as error:
            assert str(error) and "\n" not in str(error), seed
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
        else:
            assert image.mode in ("L", "LA", "RGB", "RGBA"), seed
            assert image.width * image.height <= MOST_PIXELS, seed
    assert peak_memory() - before < 300 * MEBIBYTE


def embed(kind: str, data: bytes) -> bytes:
    """A file of a kind with these EXIF data."""
    if kind == "png":
        return with_chunk(encode(corners()), b"eXIf", data)
    if kind == "jpeg":
        return with_jpeg_segment(encode(corners(), "JPEG"), 0xE1, b"Exif\0\0" + data)
    return with_webp_chunks(encode(corners(), "WEBP", lossless=True), corners().size, EXIF=data)


def histogram(image: Image.Image) -> list[int]:
    """What turning a picture leaves as it is."""
    return image.convert("RGB").histogram()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_no_exif_data_are_damage_of_pixels(kind):
    expected = histogram(open_picture(embed(kind, EXIF)))
    for seed, source in cases(100):
        image = open_picture(embed(kind, mutated(EXIF, source)))
        assert image.size in ((48, 32), (32, 48)), seed
        assert histogram(image) == expected, seed


def test_no_chunk_beside_the_pixels_of_a_png_file_is_damage_of_them():
    expected = histogram(corners())
    for seed, source in cases(150):
        kind, data = source.choice(TEXTS)
        data = mutated(data, source)
        chunk = png_chunk(kind, data)
        if source.random() < 0.3:
            chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])  # a wrong checksum
        content = encode(corners())
        at = 33 if source.random() < 0.7 else content.rindex(b"IEND") - 4  # before the pixels, or after them
        assert histogram(open_picture(content[:at] + chunk + content[at:])) == expected, seed


def test_metadata_of_a_mutated_file_are_a_dictionary_or_a_sentence(tmp_path):
    metadata = {"prompt": "一只老虎 \u2028", "seed": 7, "settings": {"top_k": [1, 2]}, "model": "shipped"}
    whole, path = encode_png(corners(), metadata), tmp_path / "a.png"
    for seed, source in cases(100):
        path.write_bytes(mutated(whole, source, source.choice([400, None])))
        try:
            assert isinstance(read_metadata(path), dict), seed
        except ValueError as error:
            assert str(path) in str(error), seed


def test_the_cases_are_the_same_every_time():
    first, second = (mutated(png(), random.Random(5)) for _ in range(2))
    assert first == second != png()
