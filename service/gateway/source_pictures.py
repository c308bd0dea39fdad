"""Pictures to start from: limited in size, decoded once, and converted to one form before they are queued."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from hashlib import sha256
from io import BytesIO
from math import sqrt
from typing import Any

from PIL import Image

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.picture_files import open_picture
from patchforge.service.messages.fit import Fit, Placement, Size, place, size_of
from patchforge.service.messages.schemas import MAX_PIXELS, MAX_SIDE, MIN_SIDE, STRENGTH, GenerationRequest
from patchforge.service.messages.source import Source
from patchforge.service.threads import in_thread

NONZERO_TO_255 = [0] + [255] * 255  # lookup tables for Image.point
ZERO_TO_255 = [255] + [0] * 255


class SourcePictures:
    """Prepares pictures one at a time, so that many callers cannot fill this process's memory."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def prepare(self, request: GenerationRequest) -> tuple[GenerationRequest, Source | None]:
        """Returns the request with digests in place of its pictures, and the pictures in the form the worker needs.

        Raises:
            InvalidRequest: a picture cannot be read, is too large, or does not fit the mask; `field` says which.
        """
        if request.image is None:
            return request, None
        async with self._turn:
            return await in_thread(_prepare, request)


def _prepare(request: GenerationRequest) -> tuple[GenerationRequest, Source]:
    sent = _decode_base64(request.image or "", "image")
    picture = open_picture(sent, "image")
    size = (request.width, request.height) if request.width and request.height else _fit_size(picture.size)
    fields: dict[str, Any] = {"image": _digest(sent), "width": size[0], "height": size[1]}
    placement = place(picture.size, size, request.fit or Fit.CONTAIN)
    changes = None
    if request.mask is not None:
        sent = _decode_base64(request.mask, "mask")
        changes = _resample_mask(open_picture(sent, "mask"), picture.size, placement)
        fields["mask"] = _digest(sent)
    elif size_of(placement.place) != size:  # the bars stay white
        changes = Image.new("L", size_of(placement.place), 255)
        fields["strength"] = request.strength or STRENGTH
    mask = None if changes is None else _encode_png(_put_in_place(changes, size, placement, 0))
    pixels = _put_on_white(picture).crop(placement.crop).resize(size_of(placement.place), Image.Resampling.LANCZOS)
    image = _encode_png(_put_in_place(pixels, size, placement, "white"))
    return request.model_copy(update=fields), Source(image, mask)


def _put_in_place(picture: Image.Image, size: Size, placement: Placement, beside: str | int) -> Image.Image:
    """A canvas of this size with the picture in its place."""
    if picture.size == size:
        return picture
    canvas = Image.new(picture.mode, size, beside)
    canvas.paste(picture, placement.place)
    return canvas


def _decode_base64(text: str, field: str) -> bytes:
    """Decodes base64 in all its usual dresses: as a data URL, with line breaks, URL-safe, without padding."""
    if text[:8].lower().startswith(("http://", "https://")):
        raise InvalidRequest("must be the picture itself, in base64: this server fetches no addresses", field=field)
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise InvalidRequest("must be a data URL in base64: data:image/png;base64,…", field=field)
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise InvalidRequest("must be a base64-encoded picture", field=field) from None


def _fit_size(size: tuple[int, int]) -> tuple[int, int]:
    """The size of the finished picture if the request has none: that of the picture sent, scaled to the limits."""
    width, height = size
    scale = min(1.0, MAX_SIDE / max(size), sqrt(MAX_PIXELS / (width * height)))
    return max(MIN_SIDE, int(width * scale)), max(MIN_SIDE, int(height * scale))


def _put_on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _resample_mask(mask: Image.Image, expected: Size, placement: Placement) -> Image.Image:
    """Returns 255 where the mask is fully transparent, for the picture in its place. No transparent pixel gets lost."""
    if mask.size != expected:
        shown = "{}x{}".format(*expected)
        raise InvalidRequest(f"must be the same size as the picture, {shown}", field="mask")
    if not mask.has_transparency_data:
        raise InvalidRequest("requires an alpha channel: fully transparent pixels may change", field="mask")
    changes = mask.convert("RGBA").getchannel("A").point(ZERO_TO_255)
    if changes.getbbox() is None:
        raise InvalidRequest("marks nothing to change: no pixel is fully transparent", field="mask")
    changes, size = changes.crop(placement.crop), size_of(placement.place)
    if changes.getbbox() is None:
        raise InvalidRequest("marks nothing to change in the part that fit=cover leaves", field="mask")
    # Halve step by step: an average over many pixels would round a single one down to zero.
    while changes.width > 2 * size[0] or changes.height > 2 * size[1]:
        factors = (1 + (changes.width > 2 * size[0]), 1 + (changes.height > 2 * size[1]))
        changes = changes.reduce(factors).point(NONZERO_TO_255)
    return changes.resize(size, Image.Resampling.BOX).point(NONZERO_TO_255)


def _encode_png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "png", compress_level=1)  # fast: Redis keeps it only for a short time
    return buffer.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"
