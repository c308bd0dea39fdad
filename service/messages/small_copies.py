"""Small copies of previews: what events hold of a preview that is in an object store.

A small copy is a PNG with a chunk of its own that says where the preview is. So processes that know nothing of this, or
have no object store, show the small copy, and nothing in the event is new to them.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64decode, b64encode

SMALL_COPY_BYTES = 8 << 10
"""Most bytes of a small copy, without its reference."""

_HEAD = 33  # bytes of a PNG's signature and its first chunk, whose length is fixed
_CHUNK = b"pfRF"  # by its letters: decoders may ignore it, nobody else uses it, editors must not keep it
_FRAME = 12  # bytes of a chunk besides its content
_BEGINNING = 60  # characters of base64 in which the chunk's name is


def with_reference(png: bytes, reference: str) -> str:
    """Returns a PNG in base64, with a reference in it."""
    content = _CHUNK + reference.encode()
    chunk = struct.pack(">I", len(content) - len(_CHUNK)) + content + struct.pack(">I", zlib.crc32(content))
    return b64encode(png[:_HEAD] + chunk + png[_HEAD:]).decode()


def split_reference(b64_png: str) -> tuple[str, str | None]:
    """Returns a PNG, both times in base64, without the reference in it, and the reference; None if there is none."""
    if b64decode(b64_png[:_BEGINNING])[_HEAD + 4 : _HEAD + 8] != _CHUNK:
        return b64_png, None
    png = b64decode(b64_png)
    end = _HEAD + _FRAME + int.from_bytes(png[_HEAD : _HEAD + 4])
    reference = png[_HEAD + 8 : end - 4].decode(errors="replace")
    return b64encode(png[:_HEAD] + png[end:]).decode(), reference
