"""Colours as browsers show them: an embedded ICC profile is applied, and the result is sRGB."""

from __future__ import annotations

from functools import cache
from io import BytesIO

from PIL import Image, ImageChops, ImageCms

MAX_PROFILE_BYTES = 4 << 20  # those of printers have about one
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Mode of the pixels that a profile describes, by the profile's colour space."""
DIFFERENT = ([0] * 3 + [255] * 253) * 3
"""A lookup table for `Image.point`: conversion to bytes and back may round by 2."""
FITTING = {"RGB": ("RGB", "RGBA", "P", "PA"), "L": ("1", "L", "LA"), "CMYK": ("CMYK",)}
"""Modes of pictures that such a profile can belong to."""


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """Converts a picture from its embedded `profile` to sRGB, with its transparency.

    A profile that cannot be read, or that is for pixels of another kind, is passed over, as viewers do.
    """
    if not profile or len(profile) > MAX_PROFILE_BYTES:
        return picture
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        mode = MODES[source.profile.xcolor_space.strip()]
        if picture.mode not in FITTING[mode] or _changes_nothing(source, mode):
            return picture
        alpha = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
        converted = _convert(picture.convert(mode), source)
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):
        return picture
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _convert(pixels: Image.Image, source: ImageCms.ImageCmsProfile) -> Image.Image:
    converted = ImageCms.profileToProfile(pixels, source, _srgb(), ImageCms.Intent.PERCEPTUAL, "RGB")
    if converted is None:
        raise ValueError("nothing was converted")
    return converted


def _changes_nothing(source: ImageCms.ImageCmsProfile, mode: str) -> bool:
    """Whether this is sRGB under whatever name. Then pixels are kept exactly, without rounding."""
    if mode == "CMYK":
        return False
    ramp = Image.linear_gradient("L")
    probe = ramp if mode == "L" else Image.merge("RGB", (ramp, ramp.rotate(90), ramp.rotate(180)))
    difference = ImageChops.difference(_convert(probe, source), probe.convert("RGB"))
    return difference.point(DIFFERENT).getbbox() is None


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
