"""Opens picture files that nobody trusts: limited in size, upright, 8 bits, sRGB; damaged metadata costs nothing."""

from __future__ import annotations

from io import BytesIO

from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

from patchforge.service.errors import InvalidRequest, PayloadTooLarge
from patchforge.service.gateway.colour import to_srgb
from patchforge.service.gateway.picture_metadata import add_end_mark, keep_only_pixels, keep_only_useful
from patchforge.service.memory import require_memory_for

MAX_SOURCE_PIXELS = 1 << 24  # fits a phone's photograph; takes up to 64 MiB while decoded
FORMATS = ("PNG", "WEBP", "JPEG")
STRIP = 256  # rows compared at a time


def open_picture(data: bytes, field: str) -> Image.Image:
    """Decodes a picture. Checks the size in its header before it unpacks anything.

    Metadata that cannot be read is dropped, as viewers do. Damaged pixels are an error.

    Raises:
        PayloadTooLarge: there is too little memory to decode it; `field` is the one given.
        InvalidRequest: it is no picture, too large, or its pixels are damaged; `field` is the one given.
    """
    try:
        try:
            return _decode(keep_only_useful(data), field)
        except (InvalidRequest, MemoryError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise
        except Exception:  # decoders raise all kinds of errors, and do so for mere metadata too
            return _decode(keep_only_pixels(data), field)
    except InvalidRequest:
        raise
    except MemoryError as error:
        message = f"is too large for the memory of this server: {error}. Send a smaller one"
        raise PayloadTooLarge(message, field=field) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InvalidRequest(f"must have at most {MAX_SOURCE_PIXELS} pixels", field=field) from None
    except UnidentifiedImageError:
        raise InvalidRequest("is not a PNG, WebP or JPEG picture", field=field) from None
    except Exception:
        raise InvalidRequest("is damaged and cannot be decoded", field=field) from None


def _decode(data: bytes, field: str) -> Image.Image:
    ended = add_end_mark(data)
    picture = _load(data if ended is None else ended.with_mark, field)
    if ended is not None and not _same_pixels(picture, _load(ended.with_filler, field)):
        raise OSError("pixels are missing, and not only the end mark")
    profile = picture.info.get("icc_profile")
    return to_srgb(_to_8_bits(_turn_upright(picture)), profile if isinstance(profile, bytes) else None)


def _load(data: bytes, field: str) -> Image.Image:
    picture = Image.open(BytesIO(data), formats=FORMATS)
    width, height = picture.size
    if width * height > MAX_SOURCE_PIXELS:
        raise InvalidRequest(f"must have at most {MAX_SOURCE_PIXELS} pixels, not {width}x{height}", field=field)
    require_memory_for(width * height)
    picture.load()
    return picture


def _same_pixels(one: Image.Image, other: Image.Image) -> bool:
    """Compares strip by strip: a copy of a whole picture takes much memory."""
    if (one.size, one.mode) != (other.size, other.mode):
        return False
    strips = [(0, top, one.width, min(top + STRIP, one.height)) for top in range(0, one.height, STRIP)]
    return all(one.crop(strip).tobytes() == other.crop(strip).tobytes() for strip in strips)


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # damaged EXIF: whatever it said, nobody can know
        return picture


def _to_8_bits(picture: Image.Image) -> Image.Image:
    """Greyscale of 16 bits as `L`, or as `LA` if one value is transparent; other pictures as they are."""
    if not picture.mode.startswith("I"):
        return picture
    raw = picture.convert("I;16").tobytes()
    low, high = (Image.frombytes("L", picture.size, raw[first::2]) for first in (0, 1))
    transparent = picture.info.get("transparency")
    if not isinstance(transparent, int):
        return high
    differ = [
        part.point([0 if value == wanted else 255 for value in range(256)])
        for part, wanted in (
            (low, transparent & 255),
            (high, transparent >> 8),
        )
    ]
    return Image.merge("LA", (high, ImageChops.lighter(*differ)))
