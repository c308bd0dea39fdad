"""Pictures for tests to send."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from io import BytesIO
from typing import Any

from PIL import Image

Xyz = tuple[float, float, float]


def encoded(picture: Image.Image, kind: str = "png", **options: Any) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def base64(data: bytes) -> str:
    return b64encode(data).decode("ascii")


def decoded(data: bytes) -> Image.Image:
    picture = Image.open(BytesIO(data))
    picture.load()
    return picture


def gradient(width: int = 48, height: int = 32) -> Image.Image:
    """An RGB picture with no two equal columns or rows."""
    across, down = (Image.linear_gradient("L").rotate(angle).resize((width, height)) for angle in (0, 90))
    return Image.merge("RGB", (across, down, across))


def mask(width: int = 48, height: int = 32, change: tuple[int, int, int, int] | None = (0, 0, 16, 16)) -> Image.Image:
    """A mask, opaque except for the box to `change`."""
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    if change is not None:
        picture.paste((0, 0, 0, 0), change)
    return picture


def png_chunk(kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG, with a wrong `checksum` if one is given."""
    checksum = zlib.crc32(kind + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def with_chunk(png: bytes, kind: bytes, data: bytes, checksum: int | None = None) -> bytes:
    """A PNG with another chunk before its pixels."""
    return png[:33] + png_chunk(kind, data, checksum) + png[33:]


def with_segment(jpeg: bytes, marker: int, data: bytes) -> bytes:
    """A JPEG with another segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + jpeg[2:]


def rgb_profile(
    red: tuple[float, float, float], green: tuple[float, float, float], blue: tuple[float, float, float]
) -> bytes:
    """An ICC profile of gamma 2.2 whose primaries have these XYZ coordinates, which should add up to D50's white."""
    primaries = [(b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue)]
    curves = [(name, _gamma(2.2)) for name in (b"rTRC", b"gTRC", b"bTRC")]
    return _profile(b"RGB ", [*((name, _xyz(*values)) for name, values in primaries), *curves])


def grey_profile(gamma: float) -> bytes:
    """An ICC profile for greyscale."""
    return _profile(b"GRAY", [(b"kTRC", _gamma(gamma))])


def cmyk_profile() -> bytes:
    """An ICC profile of a printer whose ink, of whatever colour, is at its fullest a strong red."""
    corners = [(255, 128, 128) if ink == 0 else (136, 208, 195) for ink in range(16)]  # L*a*b* in bytes
    straight = bytes(range(256))
    table = struct.pack(">4sIBBBx", b"mft1", 0, 4, 3, 2) + struct.pack(">9i", *(65536, 0, 0, 0, 65536, 0, 0, 0, 65536))
    table += straight * 4 + bytes(value for corner in corners for value in corner) + straight * 3
    return _profile(b"CMYK", [(b"A2B0", table)], connection=b"Lab ", kind=b"prtr")


def _profile(
    space: bytes, tags: list[tuple[bytes, bytes]], connection: bytes = b"XYZ ", kind: bytes = b"mntr"
) -> bytes:
    text = b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(78)
    tags = [(b"desc", text), (b"wtpt", _xyz(0.9642, 1.0, 0.8249)), (b"cprt", b"text\0\0\0\0none\0"), *tags]
    start, body, table = 128 + 4 + 12 * len(tags), b"", struct.pack(">I", len(tags))
    for name, data in tags:
        table += struct.pack(">4sII", name, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    white = struct.pack(">iii", 63190, 65536, 54061)
    return _header(start + len(body), kind, space, connection, white) + table + body


def _header(size: int, kind: bytes, space: bytes, connection: bytes, white: bytes) -> bytes:
    head = struct.pack(">I4xI4s4s4s12x4s", size, 0x02400000, kind, space, connection, b"acsp")
    return (head + bytes(28) + white).ljust(128, b"\0")


def _xyz(x: float, y: float, z: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(value * 65536) for value in (x, y, z)))


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256))
