"""Reads the settings in a picture's file as other tools do: not with the code that wrote them."""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any

from PIL import Image

USER_COMMENT, MAKER_NOTE, EXIF = 0x9286, 0x927C, 0x8769


def written_settings(data: bytes) -> tuple[str, dict[str, Any]]:
    """The text `parameters` and the JSON object of a PNG, JPEG or WebP file."""
    picture = Image.open(BytesIO(data))
    if picture.format == "PNG":
        picture.load()
        return picture.info["parameters"], json.loads(picture.info["patchforge"])
    inside = picture.getexif().get_ifd(EXIF)
    comment, details = inside[USER_COMMENT], inside[MAKER_NOTE]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be"), json.loads(details)
