"""Encoding of pictures for clients."""

from __future__ import annotations

from io import BytesIO

from PIL import Image
from torch import Tensor

from service.schemas import OutputFormat


def encode_picture(pixels: Tensor, output_format: OutputFormat, compression: int = 90) -> bytes:
    """``(height, width, 3)`` uint8 as png, webp or jpeg; ``compression`` is the quality of the latter two."""
    buffer = BytesIO()
    picture = Image.fromarray(pixels.numpy())
    if output_format is OutputFormat.PNG:
        picture.save(buffer, "png")
    else:
        picture.save(buffer, output_format.value, quality=compression)
    return buffer.getvalue()
