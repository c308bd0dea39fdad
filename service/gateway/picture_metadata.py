"""Takes picture files apart into their chunks, without decoding any, and leaves out what no pixel depends on.

Text, thumbnails and the like are never of use here, are often damaged, and may unpack to any size. What is kept is in
the same order as before. A file that is not of these three kinds comes back as it is.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from hashlib import sha256
from typing import NamedTuple

PNG, RIFF, JPEG = b"\x89PNG\r\n\x1a\n", b"RIFF", b"\xff\xd8"
SCAN = 0xDA
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7]")
"""A marker; inside a scan, only zeros and restarts follow this byte."""
MAX_METADATA = 4 << 20  # bytes of one chunk of metadata
END_MARK = b"\xff\xd9"
FILLER = b"".join(sha256(bytes([turn])).digest() for turn in range(8)).replace(b"\xff", b"\xfe")
"""To a decoder that still waits for pixels these are some; to one that has them all they mean nothing."""
MAX_PARTS = 50_000
"""In one file. Cameras and editors write some thousands at most; millions of tiny ones would take seconds to read."""
WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
WEBP_FLAGS = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
"""Bits of a WebP's header that announce a chunk of metadata."""


class Ended(NamedTuple):
    """A JPEG without an end mark, completed in two ways. If its pixels are complete, both decode to the same."""

    with_mark: bytes
    with_filler: bytes


def keep_only_useful(data: bytes) -> bytes:
    """Leaves out all metadata but colour profile, orientation and transparency, and those too if damaged in transit.

    Raises:
        ValueError: the file has absurdly many parts.
    """
    return _filter(data, profile=True)


def keep_only_pixels(data: bytes) -> bytes:
    """Leaves out colour profile and orientation too; raises the same."""
    return _filter(data, profile=False)


def add_end_mark(data: bytes) -> Ended | None:
    """Completes a JPEG that has no end mark after the start of its pixels; None for any other file.

    Raises:
        ValueError: it lacks more than the mark.
    """
    if not data.startswith(JPEG) or data.find(END_MARK, _find_pixels(data)) >= 0:
        return None
    if not _has_all_scans(data):
        raise ValueError("the file ends before its last scan")
    return Ended(data + END_MARK, data + FILLER + END_MARK)


def _filter(data: bytes, *, profile: bool) -> bytes:
    if data.startswith(PNG):
        return b"".join(_png_parts(data, profile=profile))
    if data.startswith(JPEG):
        return b"".join(_jpeg_parts(data, profile=profile))
    if data.startswith(RIFF) and data[8:12] == b"WEBP":
        body = b"".join(_webp_parts(data, profile=profile))
        return RIFF + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    return data


def _count_part(count: int) -> int:
    if count >= MAX_PARTS:
        raise ValueError("the file has too many parts")
    return count + 1


def _png_parts(data: bytes, *, profile: bool) -> Iterator[bytes]:
    """A chunk is its length, its kind, its content and a checksum. Kinds in small letters are optional."""
    wanted = {b"tRNS", b"iCCP", b"eXIf"} if profile else {b"tRNS"}
    yield PNG
    at, count = len(PNG), 0
    while at < len(data):
        count = _count_part(count)
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        end = at + 12 + length
        optional = kind[:1].islower()
        if not optional or (kind in wanted and length <= MAX_METADATA and _is_sound(data[at + 4 : end])):
            yield data[at:end]
        at = end


def _is_sound(chunk: bytes) -> bool:
    """Whether a PNG's chunk, from its kind on, has the checksum of its content."""
    return zlib.crc32(chunk[:-4]) == int.from_bytes(chunk[-4:], "big")


def _jpeg_parts(data: bytes, *, profile: bool) -> Iterator[bytes]:
    """Segments up to the start of the pixels, then all the rest."""
    yield JPEG
    at = len(JPEG)
    for start, end, marker in _jpeg_segments(data):
        content = data[start + 4 : end]
        if not _is_metadata(marker) or _decides_colours(marker, content) or (profile and _is_useful(marker, content)):
            yield data[start:end]
        at = end
    yield data[at:]


def _jpeg_segments(data: bytes, *, scans: bool = False) -> Iterator[tuple[int, int, int]]:
    """`(start, end, marker)` of each segment before the pixels; with `scans`, of every segment in the file."""
    at, count = len(JPEG), 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        count = _count_part(count)
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        if (marker == SCAN and not scans) or length < 2:
            return
        yield at, at + 2 + length, marker
        at += 2 + length
        if marker == SCAN:
            after = AFTER_SCAN.search(data, at)
            at = after.start() if after else len(data)


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans begun in a JPEG bring every coefficient of every component to its last bit."""
    components, complete = 0, set[tuple[int, int]]()
    for start, end, marker in _jpeg_segments(data, scans=True):
        content = data[start + 4 : end]
        if marker in FRAMES and len(content) > 5:
            components = content[5]
        if marker == SCAN and content and len(content) >= 4 + 2 * content[0]:
            names = content[1 : 1 + 2 * content[0] : 2]
            first, last, bits = content[1 + 2 * content[0] :][:3]
            if bits & 15 == 0:  # the lowest bit
                complete.update((name, place) for name in names for place in range(first, last + 1))
    return len(complete) == 64 * components > 0


def _find_pixels(data: bytes) -> int:
    return max((end for _, end, _ in _jpeg_segments(data)), default=len(JPEG))


def _is_metadata(marker: int) -> bool:
    return 0xE0 <= marker <= 0xEF or marker == 0xFE  # for applications; comments


def _decides_colours(marker: int, content: bytes) -> bool:
    """JFIF and Adobe's segment say what the components of the pixels mean."""
    return (marker == 0xE0 and content.startswith(b"JFIF\0") and len(content) >= 14) or (
        marker == 0xEE and content.startswith(b"Adobe") and len(content) >= 12
    )


def _is_useful(marker: int, content: bytes) -> bool:
    """EXIF, and parts of a colour profile."""
    return (marker == 0xE1 and content.startswith(b"Exif\0\0")) or (
        marker == 0xE2 and content.startswith(b"ICC_PROFILE\0") and len(content) > 14
    )


def _webp_parts(data: bytes, *, profile: bool) -> Iterator[bytes]:
    """A chunk is its kind, its length and its content, of even length. A truncated one of metadata is left out."""
    wanted = {*WEBP_PIXELS, *((b"ICCP", b"EXIF") if profile else ())}
    chunks = [(kind, chunk) for kind, chunk in _webp_chunks(data) if kind in wanted]
    absent = sum(flag for kind, flag in WEBP_FLAGS.items() if kind not in dict(chunks))
    for kind, chunk in chunks:
        if kind == b"VP8X" and len(chunk) > 8:
            chunk = chunk[:8] + bytes([chunk[8] & ~absent & 0xFF]) + chunk[9:]
        yield chunk


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at, count = 12, 0
    while at + 8 <= len(data):
        count = _count_part(count)
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        end = at + 8 + length + length % 2
        if kind not in WEBP_FLAGS or end <= len(data):
            yield kind, data[at:end]
        at = end
