"""
What stands in a picture file beside its pixels: how the camera was held, the colour profile, texts.

The decoders of PIL read all of it on the way to the pixels, and stumble over what cameras and editors leave wrong. So
it is taken out first, by readers that take only what is asked for and pass over everything else.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

LARGEST_PROFILE = 8 * 2**20  # bytes, once it is decompressed
LARGEST_TEXT = 16 * 2**20
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_ORIENTATION, _PROFILE = 274, 34675  # tags of TIFF, which EXIF data are made of, too
# Tags of TIFF files that say nothing of how pixels are stored: names, dates, resolutions, EXIF, GPS, XMP and the like
_TIFF_METADATA = {
    *(269, 270, 271, 272, _ORIENTATION, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316, 700, 33432, 33723),
    *(34377, 34665, _PROFILE, 34853, 37724, 40965, *range(50706, 50742)),
}


@dataclass
class PictureFile:
    """
    A picture file, taken apart.

    Args:
        content (`bytes`): The file without what the other fields hold, as far as its kind allows.
        orientation (`int`): 1 to 8 as in EXIF; 1 is upright.
        profile (`bytes`, *optional*): The ICC profile.
        num_frames (`int`): Of a PNG file, as it says itself; 1 of other kinds.
    """

    content: bytes
    orientation: int = 1
    profile: bytes | None = None
    num_frames: int = 1


def take_apart(content: bytes) -> PictureFile:
    """The parts of a file. What cannot be understood stays in it: no file raises an error here."""
    try:
        if content.startswith(PNG_SIGNATURE):
            return _take_png_apart(content)
        if content.startswith(b"\xff\xd8"):
            return _take_jpeg_apart(content)
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _read_webp(content)
        if content[:4] in (b"II*\0", b"MM\0*"):
            return _take_tiff_apart(content)
    except (struct.error, IndexError, ValueError):  # it ends where something should stand
        pass
    return PictureFile(content)


# PNG -----------------------------------------------------------------------------------------------------------------


def png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Kind, data and all the bytes of each chunk of a PNG file, up to its end or to a chunk that was cut off."""
    start = len(PNG_SIGNATURE)
    while start + 12 <= len(content):
        (length,) = struct.unpack_from(">I", content, start)
        end = start + 12 + length
        kind = content[start + 4 : start + 8]
        if end > len(content):
            return
        yield kind, content[start + 8 : end - 4], content[start:end]
        if kind == b"IEND":
            return
        start = end


def png_texts(content: bytes) -> dict[str, str]:
    """The text chunks of a PNG file by name; those that are damaged or larger than [`LARGEST_TEXT`] are left out."""
    texts = {}
    for kind, data, _ in png_chunks(content):
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            continue
        name, _, rest = data.partition(b"\0")
        try:
            if kind == b"iTXt":
                is_compressed, (_, _, rest) = rest[0] == 1, rest[2:].split(b"\0", 2)
            else:
                is_compressed, rest = kind == b"zTXt", rest[1:] if kind == b"zTXt" else rest
            text = _decompress(rest, LARGEST_TEXT) if is_compressed else rest[:LARGEST_TEXT]
            texts[name.decode("latin-1")] = text.decode("utf-8" if kind == b"iTXt" else "latin-1")
        except (IndexError, ValueError, zlib.error):
            continue
    return texts


def _take_png_apart(content: bytes) -> PictureFile:
    kept, found = [PNG_SIGNATURE], PictureFile(b"")
    length, has_pixels, kind = len(PNG_SIGNATURE), False, b""
    for kind, data, whole in png_chunks(content):
        length += len(whole)
        has_pixels |= kind == b"IDAT"
        if kind == b"eXIf":
            found.orientation = _orientation(data)
        elif kind == b"iCCP":
            found.profile = _png_profile(data)
        elif kind == b"acTL" and not has_pixels and len(data) >= 4:
            found.num_frames = struct.unpack_from(">I", data)[0]
        if kind[:1].isupper() or kind == b"tRNS":  # upper case: without it, there is no picture
            kept.append(whole)
    rest = b"" if kind == b"IEND" else content[length:]  # a chunk that was cut off stays one
    found.content = b"".join([*kept, rest])
    return found


def _png_profile(data: bytes) -> bytes | None:
    try:
        return _decompress(data[data.index(b"\0") + 2 :], LARGEST_PROFILE)
    except (ValueError, zlib.error):
        return None


def _decompress(data: bytes, most: int) -> bytes:
    """Raises `ValueError` if there is more than `most`, without making it."""
    decompressor = zlib.decompressobj()
    text = decompressor.decompress(data, most)
    if decompressor.unconsumed_tail:
        raise ValueError("too large")
    return text


# JPEG ----------------------------------------------------------------------------------------------------------------


def _take_jpeg_apart(content: bytes) -> PictureFile:
    kept, found, profile = [content[:2]], PictureFile(b""), {}
    start = 2
    while True:
        if content[start] != 0xFF:
            return PictureFile(content)
        marker = content[start + 1]
        if marker == 0xFF:  # bytes to fill up
            start += 1
            continue
        if marker == 0xDA:  # from here on there are pixels
            break
        (length,) = struct.unpack_from(">H", content, start + 2)
        end = start + 2 + length
        if length < 2 or end > len(content):
            return PictureFile(content)
        data = content[start + 4 : end]
        if marker == 0xE1 and data.startswith(b"Exif\0"):
            found.orientation = _orientation(data[6:])
        elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0") and len(data) > 14:
            profile[data[12]] = data[14:]
        # JFIF and Adobe say how colours are stored
        is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
        if not is_metadata or (marker == 0xE0 and length >= 16) or (marker == 0xEE and length >= 14):
            kept.append(content[start:end])
        start = end
    found.profile = b"".join(part for _, part in sorted(profile.items())) or None
    found.content = b"".join([*kept, content[start:]])
    return found


# WebP and TIFF -------------------------------------------------------------------------------------------------------


def _read_webp(content: bytes) -> PictureFile:
    found, start = PictureFile(content), 12
    while start + 8 <= len(content):
        kind, length = content[start : start + 4], struct.unpack_from("<I", content, start + 4)[0]
        data = content[start + 8 : start + 8 + length]
        if kind == b"EXIF":
            found.orientation = _orientation(data.removeprefix(b"Exif\0\0"))
        elif kind == b"ICCP":
            found.profile = data
        start += 8 + length + length % 2
    return found


def _take_tiff_apart(content: bytes) -> PictureFile:
    order, start, entries = _tiff_entries(content)
    found, kept = PictureFile(content, _orientation(content)), []
    for entry in entries:
        tag, kind, count, offset = struct.unpack(f"{order}HHII", entry)
        if tag == _PROFILE and kind in (1, 7) and 4 < count <= LARGEST_PROFILE:
            found.profile = content[offset : offset + count]
        if tag not in _TIFF_METADATA:
            kept.append(entry)
    end = start + 2 + 12 * len(entries)
    table = struct.pack(f"{order}H", len(kept)) + b"".join(kept) + content[end : end + 4]  # where the next one stands
    found.content = content[:start] + table + content[start + len(table) :]
    return found


def _tiff_entries(content: bytes) -> tuple[str, int, list[bytes]]:
    """Byte order, place and entries of the first table of a TIFF file, or of EXIF data."""
    order = {b"II": "<", b"MM": ">"}[bytes(content[:2])]
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    places = range(start + 2, start + 2 + 12 * count, 12)
    return order, start, [content[place : place + 12] for place in places if place + 12 <= len(content)]


def _orientation(exif: bytes) -> int:
    """The orientation alone, whatever else of EXIF data is wrong; 1 if there is none."""
    try:
        order, _, entries = _tiff_entries(exif)
    except (KeyError, struct.error):
        return 1
    for entry in entries:
        tag, kind, count = struct.unpack_from(f"{order}HHI", entry)
        form = {1: "B", 3: "H", 4: "I"}.get(kind)
        if tag == _ORIENTATION and form is not None and count == 1:
            (value,) = struct.unpack_from(f"{order}{form}", entry, 8)
            return value if 1 <= value <= 8 else 1
    return 1
