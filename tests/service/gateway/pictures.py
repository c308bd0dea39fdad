"""Pictures for tests to send."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import Any

from PIL import Image


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
    """An RGB picture no two columns or rows of which are alike."""
    across, down = (Image.linear_gradient("L").rotate(angle).resize((width, height)) for angle in (0, 90))
    return Image.merge("RGB", (across, down, across))


def mask(width: int = 48, height: int = 32, change: tuple[int, int, int, int] | None = (0, 0, 16, 16)) -> Image.Image:
    """Opaque but for the box to ``change``."""
    picture = Image.new("RGBA", (width, height), (0, 0, 0, 255))
    if change is not None:
        picture.paste((0, 0, 0, 0), change)
    return picture
