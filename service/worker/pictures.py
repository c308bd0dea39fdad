"""Finished pictures, as clients want them: of their size, in their format."""

from __future__ import annotations

from io import BytesIO

from PIL import Image
from torch import Tensor

from service.schemas import GenerationRequest, OutputFormat
from service.worker.source_images import SourceImage


def encode_preview(pixels: Tensor) -> bytes:
    """``(height, width, 3)`` uint8 as PNG, in the model's own size."""
    return _encoded(Image.fromarray(pixels.numpy()), OutputFormat.PNG, 0)


def encode_picture(pixels: Tensor, request: GenerationRequest, source: SourceImage | None = None) -> bytes:
    """``(height, width, 3)`` uint8 as ``request`` asks for it; what a mask keeps of ``source`` is kept exactly."""
    picture = Image.fromarray(pixels.numpy())
    if request.width and request.height:
        picture = picture.resize((request.width, request.height), Image.Resampling.LANCZOS)
    if source is not None:
        picture = source.over(picture)
    return _encoded(picture, request.output_format, request.output_compression)


def _encoded(picture: Image.Image, output_format: OutputFormat, quality: int) -> bytes:
    buffer = BytesIO()
    if output_format is OutputFormat.PNG:
        picture.save(buffer, "png")
    else:
        picture.save(buffer, output_format.value, quality=quality)
    return buffer.getvalue()
