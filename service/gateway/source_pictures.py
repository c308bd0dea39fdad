"""Pictures that callers send to start from: bounded, decoded once, and brought into one form before they are queued."""

from __future__ import annotations

import asyncio
from base64 import b64decode
from hashlib import sha256
from io import BytesIO
from math import sqrt

from PIL import Image, ImageOps, UnidentifiedImageError

from service.errors import InvalidRequest
from service.queue_records import Source
from service.schemas import MAX_PIXELS, MAX_SIDE, MIN_SIDE, GenerationRequest
from service.threads import in_thread

MAX_SOURCE_PIXELS = 1 << 24  # a phone's photograph; decoded, it takes up to 64 MiB for a moment
FORMATS = ("PNG", "WEBP", "JPEG")
ANY = [0] + [255] * 255  # for Image.point: 255 wherever there is something,
NONE = [255] + [0] * 255  # and wherever there is nothing


class SourcePictures:
    """Takes pictures in, one at a time in this process, so that no number of callers can fill its memory."""

    def __init__(self) -> None:
        self._turn = asyncio.Semaphore(1)

    async def take_in(self, request: GenerationRequest) -> tuple[GenerationRequest, Source | None]:
        """The request with digests for its pictures, and the pictures, as the worker wants them.

        Raises:
            InvalidRequest: one cannot be read, is too large, or does not fit the other; ``field`` says which.
        """
        if request.image is None:
            return request, None
        async with self._turn:
            return await in_thread(_take_in, request)


def _take_in(request: GenerationRequest) -> tuple[GenerationRequest, Source]:
    sent = _bytes_of(request.image or "", "image")
    picture = _opened(sent, "image")
    size = (request.width, request.height) if request.width and request.height else _fitting(picture.size)
    known = {"image": _digest(sent), "width": size[0], "height": size[1]}
    mask = None
    if request.mask is not None:
        sent = _bytes_of(request.mask, "mask")
        mask = _png(_changes(_opened(sent, "mask"), picture.size, size))
        known["mask"] = _digest(sent)
    image = _png(_on_white(picture).resize(size, Image.Resampling.LANCZOS))
    return request.model_copy(update=known), Source(image, mask)


def _bytes_of(text: str, field: str) -> bytes:
    try:
        return b64decode(text, validate=True)
    except ValueError:
        raise InvalidRequest("must be a picture in base64", field=field) from None


def _opened(data: bytes, field: str) -> Image.Image:
    """A decoded picture, upright. Its size is looked at before anything of it is unpacked."""
    try:
        picture = Image.open(BytesIO(data), formats=FORMATS)
        width, height = picture.size
        if width * height > MAX_SOURCE_PIXELS:
            raise InvalidRequest(f"must have at most {MAX_SOURCE_PIXELS} pixels, not {width}x{height}", field=field)
        if picture.mode.startswith(("I", "F")):
            raise InvalidRequest("must have 8 bits a channel", field=field)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except InvalidRequest:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(f"must have at most {MAX_SOURCE_PIXELS} pixels", field=field) from None
    except UnidentifiedImageError:
        raise InvalidRequest("is not a PNG, WebP or JPEG picture", field=field) from None
    except Exception:  # decoders raise whatever comes to their mind over a stranger's bytes
        raise InvalidRequest("is damaged: it cannot be decoded", field=field) from None


def _fitting(size: tuple[int, int]) -> tuple[int, int]:
    """The size of a finished picture if none is asked for: that of the picture sent, as far as it is within bounds."""
    width, height = size
    scale = min(1.0, MAX_SIDE / max(size), sqrt(MAX_PIXELS / (width * height)))
    return max(MIN_SIDE, int(width * scale)), max(MIN_SIDE, int(height * scale))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    layer = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _changes(mask: Image.Image, expected: tuple[int, int], size: tuple[int, int]) -> Image.Image:
    """255 where a mask is fully transparent, resampled to ``size`` so that no such pixel is lost."""
    if mask.size != expected:
        shown = "{}x{}".format(*expected)
        raise InvalidRequest(f"must be as large as the picture, {shown}", field="mask")
    if not mask.has_transparency_data:
        raise InvalidRequest("has no alpha channel: fully transparent pixels are those to change", field="mask")
    changes = mask.convert("RGBA").getchannel("A").point(NONE)
    if changes.getbbox() is None:
        raise InvalidRequest("leaves nothing to change: none of its pixels is fully transparent", field="mask")
    # Averages of a few pixels at a time, for in those of many a single one would be rounded away.
    while changes.width > 2 * size[0] or changes.height > 2 * size[1]:
        changes = changes.reduce((1 + (changes.width > 2 * size[0]), 1 + (changes.height > 2 * size[1]))).point(ANY)
    return changes.resize(size, Image.Resampling.BOX).point(ANY)


def _png(picture: Image.Image) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, "png", compress_level=1)  # it lies in Redis only for a while
    return buffer.getvalue()


def _digest(data: bytes) -> str:
    return f"sha256:{sha256(data).hexdigest()}"
