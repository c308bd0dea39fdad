"""Encodes finished pictures in the size and format that the client wants."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from math import sqrt
from typing import Any

from PIL import Image
from torch import Tensor

from patchforge.model.metadata import save_options
from patchforge.model.pipeline import Pipeline
from patchforge.service.messages.fit import Fit, Size, place, size_of
from patchforge.service.messages.schemas import GenerationRequest, OutputFormat
from patchforge.service.worker.source_images import SourceImage

DENSEST = 2
"""Pixels of a preview for each byte that it may have, at first: trying more would take long, and rarely fit."""
SETTINGS = {
    "model",
    "prompt",
    "negative_prompt",
    "class_label",
    "sampler",
    "steps",
    "guidance",
    "budget",
    "path",
    "image",
    "mask",
    "strength",
}
"""Fields of a request that decide what is drawn; of `image` and `mask` a job holds only the SHA-256."""


def encode_preview(pixels: Tensor, most: int) -> bytes:
    """Encode `(height, width, 3)` uint8 as a PNG of at most `most` bytes, smaller than it is drawn if it has to be."""
    return _encode_within(Image.fromarray(pixels.numpy()), most)


def shrink_preview(png: bytes, most: int) -> bytes:
    """Encode a preview again, as a PNG of at most `most` bytes."""
    with Image.open(BytesIO(png)) as drawn:
        return _encode_within(drawn, most)


def _encode_within(drawn: Image.Image, most: int) -> bytes:
    scale = min(1.0, sqrt(DENSEST * most / (drawn.width * drawn.height)))
    while True:
        size = max(1, int(scale * drawn.width)), max(1, int(scale * drawn.height))
        picture = drawn if size == drawn.size else drawn.resize(size, Image.Resampling.BOX)
        data = _encode(picture, OutputFormat.PNG, 0, {})
        if len(data) <= most:
            return data
        scale *= 0.95 * sqrt(most / len(data))


def picture_settings(request: GenerationRequest, seed: int, pipeline: Pipeline) -> dict[str, Any]:
    """How one picture of a request is made, for its metadata."""
    drawn_by = {"model_digest": pipeline.digest, "weights_sha256": pipeline.weights_sha256}
    return request.model_dump(include=SETTINGS) | {"seed": seed} | drawn_by


def encode_picture(
    pixels: Tensor,
    request: GenerationRequest,
    settings: Mapping[str, Any],
    source: SourceImage | None = None,
) -> bytes:
    """Encode `(height, width, 3)` uint8 as `request` says. Pixels of `source` that a mask keeps are kept exactly.

    `settings` are written into the file, unless the request asks for no metadata.
    """
    picture = Image.fromarray(pixels.numpy())
    fit = request.fit
    if source is not None:  # drawn in the shape of the answer, with bars beside it that nobody needs
        picture, fit = picture.crop(source.region), Fit.STRETCH
    if request.width and request.height:
        picture = _fitted(picture, (request.width, request.height), fit)
    if source is not None:
        picture = source.over(picture)
    metadata = save_options(request.output_format, picture, settings) if request.metadata else {}
    return _encode(picture, request.output_format, request.output_compression, metadata)


def _fitted(picture: Image.Image, size: Size, fit: Fit | None) -> Image.Image:
    """A picture brought to this size. Gateways that say nothing of `fit` mean to stretch."""
    crop, box = place(picture.size, size, fit or Fit.STRETCH)
    fitted = picture.resize(size_of(box), Image.Resampling.LANCZOS, box=crop)
    if fitted.size == size:
        return fitted
    canvas = Image.new("RGB", size, "white")
    canvas.paste(fitted, box)
    return canvas


def _encode(picture: Image.Image, output_format: OutputFormat, quality: int, options: Mapping[str, Any]) -> bytes:
    lossy = {} if output_format is OutputFormat.PNG else {"quality": quality}
    buffer = BytesIO()
    picture.save(buffer, output_format.value, **lossy, **options)
    return buffer.getvalue()
