"""Picture files as cameras, editors and broken transfers make them: colours, depths, and metadata nobody needs."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

import pytest
from PIL import Image, ImageCms

from patchforge.service import memory
from patchforge.service.errors import InvalidRequest, PayloadTooLarge
from patchforge.service.gateway.picture_files import open_picture
from patchforge.service.gateway.picture_metadata import MAX_PARTS
from tests.service.gateway.pictures import (
    cmyk_profile,
    encoded,
    gradient,
    grey_profile,
    png_chunk,
    rgb_profile,
    with_chunk,
    with_segment,
)

DISPLAY_P3 = rgb_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
RED_IS_BLUE = rgb_profile((0.1431, 0.0606, 0.7141), (0.3851, 0.7169, 0.0971), (0.4361, 0.2225, 0.0139))
PNG, JPEG = encoded(gradient()), encoded(gradient(), "jpeg")
WEBP = encoded(gradient(), "webp", lossless=True)
SIDEWAYS = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_colours_of_an_embedded_profile_become_srgb(kind: str) -> None:
    sent = encoded(Image.new("RGB", (16, 16), (255, 0, 0)), kind, icc_profile=RED_IS_BLUE, quality=100)
    red, green, blue = open_picture(sent, "image").getpixel((8, 8))
    assert (red, green, blue) == pytest.approx((0, 0, 255), abs=6)


def test_a_wider_colour_space_keeps_its_transparency() -> None:
    for mode, colour in (("RGBA", (200, 100, 100, 77)), ("RGB", (200, 100, 100))):
        made = open_picture(encoded(Image.new(mode, (4, 4), colour), icc_profile=DISPLAY_P3), "image").getpixel((0, 0))
        assert made[:3] == pytest.approx((216, 93, 97), abs=2)
        assert made[3:] == colour[3:]
    palette = Image.new("RGB", (4, 4), (200, 100, 100)).convert("P")
    assert open_picture(encoded(palette, icc_profile=DISPLAY_P3), "image").getpixel((0, 0))[0] > 205


def test_profiles_of_greyscale_and_of_printers() -> None:
    grey = encoded(Image.new("L", (4, 4), 128), icc_profile=grey_profile(1.0))
    assert open_picture(grey, "image").convert("RGB").getpixel((0, 0)) == pytest.approx((188, 188, 188), abs=2)
    ink = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "jpeg", icc_profile=cmyk_profile(), quality=100)
    red, green, blue = open_picture(ink, "image").getpixel((8, 8))
    assert red > 90 > 30 > max(green, blue), "what the profile says of cyan, and not what its name says"


def test_srgb_under_whatever_name_changes_no_pixel() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert open_picture(encoded(gradient(), icc_profile=srgb), "image").tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    "profile", [b"nonsense", DISPLAY_P3[:200], grey_profile(1.0), cmyk_profile(), DISPLAY_P3[:-40] + bytes(40)]
)
def test_a_profile_that_does_not_fit_is_passed_over(profile: bytes) -> None:
    picture = open_picture(encoded(gradient(), icc_profile=profile), "image")
    assert picture.size == (48, 32)
    if profile is not DISPLAY_P3[:-40] + bytes(40):
        assert picture.convert("RGB").getpixel((0, 0)) == pytest.approx(gradient().getpixel((0, 0)), abs=60)


def grey_16(value: int, transparent: int | None = None) -> bytes:
    """One pixel twice; Pillow itself writes no transparency of 16 bits."""
    chunks = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 0, 0, 0, 0))]
    if transparent is not None:
        chunks.append(png_chunk(b"tRNS", struct.pack(">H", transparent)))
    chunks.append(png_chunk(b"IDAT", zlib.compress(b"\0" + struct.pack(">HH", value, 0x8001))))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(("value", "shown"), [(0, 0), (0x0180, 1), (0x8000, 128), (0xFFFF, 255)])
def test_greyscale_of_16_bits(value: int, shown: int) -> None:
    assert open_picture(grey_16(value), "image").getpixel((0, 0)) == shown
    clear = open_picture(grey_16(value, value), "image")
    assert (clear.getpixel((0, 0)), clear.getpixel((1, 0))) == ((shown, 0), (128, 255))


@pytest.mark.parametrize("chunk", [b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"gAMA", b"cHRM", b"pHYs", b"acTL"])
@pytest.mark.parametrize(
    "content",
    [b"", b"x", b"a\0\0nonsense", b"a\0\0" + zlib.compress(bytes(3 << 20)), b"a\0" + b"x" * (2 << 20)],
    ids=["empty", "short", "broken", "unpacks to much", "huge"],
)
def test_damaged_metadata_of_a_png_is_dropped(chunk: bytes, content: bytes) -> None:
    for checksum in (None, 1):
        assert open_picture(with_chunk(PNG, chunk, content, checksum), "image").tobytes() == gradient().tobytes()
    at_the_end = PNG[:-12] + png_chunk(chunk, content) + PNG[-12:]
    assert open_picture(at_the_end, "image").tobytes() == gradient().tobytes()


@pytest.mark.parametrize(
    ("marker", "content"),
    [
        (0xE0, b"JFIF"),
        (0xE1, b"Exif\0\0nonsense"),
        (0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0<<<"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1\3nonsense"),
        (0xE2, b"MPF\0nonsense"),
        (0xED, b"Photoshop 3.0\x008BIM\4\xed"),
        (0xEE, b"Adobe"),
        (0xFE, b"\xff" * 60_000),
    ],
)
def test_damaged_metadata_of_a_jpeg_is_dropped(marker: int, content: bytes) -> None:
    expected = open_picture(JPEG, "image").tobytes()
    assert open_picture(with_segment(JPEG, marker, content), "image").tobytes() == expected


def test_damage_beside_it_does_not_cost_a_photograph_its_orientation_or_colours() -> None:
    turned = encoded(Image.new("RGB", (32, 16), (255, 0, 0)), "jpeg", exif=SIDEWAYS, icc_profile=RED_IS_BLUE)
    picture = open_picture(with_segment(turned, 0xED, b"Photoshop 3.0\x008BIM\4\xed"), "image")
    assert picture.size == (16, 32)
    assert picture.getpixel((8, 8))[2] > 240
    png = encoded(Image.new("RGB", (32, 16), (255, 0, 0)), exif=SIDEWAYS, icc_profile=RED_IS_BLUE)
    assert open_picture(with_chunk(png, b"tEXt", b"a\0b", 1), "image").size == (16, 32)


@pytest.mark.parametrize(
    "sent",
    [
        encoded(gradient(), "webp", lossless=True, exif=b"Exif\0\0nonsense", icc_profile=b"nonsense", xmp=b"<"),
        encoded(gradient(), "webp", lossless=True, exif=b"Exif\0\0nonsense")[:-4],
        encoded(gradient(), "webp", lossless=True, icc_profile=b"x" * 50) + b"garbage",
        WEBP[:4] + struct.pack("<I", 10) + WEBP[8:],
    ],
    ids=["nonsense", "cut off in it", "more after it", "wrong length"],
)
def test_damaged_metadata_of_a_webp_is_dropped(sent: bytes) -> None:
    assert open_picture(sent, "image").convert("RGB").tobytes() == gradient().tobytes()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_mark_is_whole_if_its_pixels_are(progressive: bool) -> None:
    sent = encoded(gradient(160, 120), "jpeg", progressive=progressive)
    assert sent.endswith(b"\xff\xd9")
    assert open_picture(sent[:-2], "image").tobytes() == open_picture(sent, "image").tobytes()
    first_scan = sent.index(b"\xff\xda") + 14
    for cut in range(first_scan, len(sent) - 8, 5):
        with pytest.raises(InvalidRequest, match="damaged"):
            open_picture(sent[:cut], "image")


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-40]])
@pytest.mark.parametrize("sent", [PNG, JPEG, WEBP], ids=["png", "jpeg", "webp"])
def test_damaged_pixels_stay_an_error(sent: bytes, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InvalidRequest, match="damaged"):
        open_picture(damage(sent), "image")


def test_a_file_of_a_million_parts_is_refused_at_once() -> None:
    many = b"\x89PNG\r\n\x1a\n" + png_chunk(b"tEXt", b"") * (MAX_PARTS + 1)
    comments, chunks = b"\xff\xfe\0\2" * (MAX_PARTS + 1), b"abcd\0\0\0\0" * (MAX_PARTS + 1)
    for sent in (many, b"\xff\xd8" + comments, b"RIFF....WEBP" + chunks):
        with pytest.raises(InvalidRequest):
            open_picture(sent, "image")


def test_a_picture_that_would_take_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container of 512 MB with a worker in it has no room for a phone's photograph; the kernel would kill."""
    small, large = encoded(Image.new("RGB", (64, 64))), encoded(Image.new("RGB", (4000, 3000)), "jpeg")
    monkeypatch.setattr(memory, "free_memory", lambda: 100.0 * (1 << 20))
    open_picture(small, "image")
    with pytest.raises(PayloadTooLarge, match="274 MiB; 100 MiB are free") as caught:
        open_picture(large, "image")
    assert caught.value.field == "image"
