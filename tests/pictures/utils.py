"""Picture files for tests: encoded with what PIL would not write, colour profiles, EXIF data."""

import io
import struct
import zlib

from PIL import Image, ImageCms

# Colorants of Display P3, adapted to D50 as ICC profiles hold them (SMPTE EG 432-1, ICC)
DISPLAY_P3 = {
    b"rXYZ": (0.51512, 0.24120, -0.00105),
    b"gXYZ": (0.29198, 0.69225, 0.04189),
    b"bXYZ": (0.15710, 0.06657, 0.78407),
}


def encode(image, kind="PNG", **options):
    """The bytes of a picture file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def srgb_profile() -> bytes:
    """An sRGB profile."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def profile_with(colorants: dict[bytes, tuple[float, float, float]]) -> bytes:
    """The sRGB profile with other primaries."""
    profile = bytearray(srgb_profile())
    (count,) = struct.unpack_from(">I", profile, 128)
    for index in range(count):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if tag in colorants:
            numbers = [round(value * 65536) for value in colorants[tag]]
            struct.pack_into(">iii", profile, offset + 8, *numbers)
    return bytes(profile)


def exchanged_primaries() -> bytes:
    """The sRGB profile with red and blue exchanged."""
    profile = bytearray(srgb_profile())
    (count,) = struct.unpack_from(">I", profile, 128)
    for index in range(count):
        (tag,) = struct.unpack_from(">4s", profile, 132 + 12 * index)
        other = {b"rXYZ": b"bXYZ", b"bXYZ": b"rXYZ"}.get(tag)
        if other is not None:
            struct.pack_into(">4s", profile, 132 + 12 * index, other)
    return bytes(profile)


def exif(orientation: int, *others: tuple[int, int, int, int], order: str = "<") -> bytes:
    """EXIF data (a TIFF header) with an orientation, after entries of (tag, type, count, value or offset)."""
    entries = sorted([*others, (0x0112, 3, 1, orientation if order == "<" else orientation << 16)])
    table = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(entries)) + table + bytes(4)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    """A PNG file with one more chunk, after its header."""
    return png[:33] + png_chunk(kind, data) + png[33:]


def with_jpeg_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    """A JPEG file with one more segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]


def with_webp_chunks(webp: bytes, size: tuple[int, int], **chunks: bytes) -> bytes:
    """A simple WebP file as an extended one, with these chunks after the pixels."""
    flags = (0x08 if "EXIF" in chunks else 0) | (0x20 if "ICCP" in chunks else 0)
    width, height = (struct.pack("<I", side - 1)[:3] for side in size)
    parts = [(b"VP8X", bytes([flags, 0, 0, 0]) + width + height)]
    parts += [(b"ICCP", chunks["ICCP"])] if "ICCP" in chunks else []
    body = b"".join(kind + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2) for kind, data in parts)
    body += webp[12:]
    if "EXIF" in chunks:
        body += b"EXIF" + struct.pack("<I", len(chunks["EXIF"])) + chunks["EXIF"] + b"\0" * (len(chunks["EXIF"]) % 2)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def corners(size=(48, 32)) -> Image.Image:
    """A picture whose four quarters have different colours."""
    image = Image.new("RGB", size, "red")
    width, height = size
    image.paste("lime", (width // 2, 0, width, height // 2))
    image.paste("blue", (0, height // 2, width // 2, height))
    image.paste("white", (width // 2, height // 2, width, height))
    return image
