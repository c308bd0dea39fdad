"""Pictures to start from: conversion, limits and errors."""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import pytest
from PIL import Image

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.picture_files import MAX_SOURCE_PIXELS
from patchforge.service.gateway.source_pictures import SourcePictures
from patchforge.service.messages.schemas import MAX_PIXELS, MAX_SIDE, STRENGTH, GenerationRequest
from patchforge.service.messages.source import Source
from tests.service.gateway.pictures import base64, decoded, encoded, gradient, mask


async def taken(image: bytes, mask: bytes | None = None, **fields: Any) -> tuple[GenerationRequest, Source]:
    given = {"prompt": "x", "image": base64(image), "mask": None if mask is None else base64(mask)} | fields
    request, source = await SourcePictures().prepare(GenerationRequest.model_validate(given))
    assert source is not None
    return request, source


async def test_without_a_picture_nothing_happens() -> None:
    request = GenerationRequest(prompt="x")
    assert await SourcePictures().prepare(request) == (request, None)


@pytest.mark.parametrize("kind", ["png", "webp"])
async def test_a_picture_is_kept_exactly_and_named_by_its_digest(kind: str) -> None:
    sent = encoded(gradient(), kind, **({"lossless": True} if kind == "webp" else {}))
    request, source = await taken(sent)
    assert decoded(source.image).tobytes() == gradient().tobytes()
    assert source.mask is None
    assert request.image == f"sha256:{sha256(sent).hexdigest()}"
    assert (request.width, request.height) == (48, 32)


async def test_it_is_brought_to_the_size_asked_for_with_its_mask() -> None:
    _, source = await taken(encoded(gradient()), encoded(mask()), width=96, height=64)
    assert decoded(source.image).size == decoded(source.mask or b"").size == (96, 64)
    assert source.mask is not None
    assert decoded(source.mask).getbbox() == (0, 0, 32, 32)


async def test_a_size_of_another_shape_gets_white_bars_that_stay() -> None:
    red = encoded(Image.new("RGB", (48, 32), "red"))
    request, source = await taken(red, width=96, height=96)
    picture = decoded(source.image)
    assert [picture.getpixel((48, row)) for row in (15, 16, 79, 80)] == [
        (255,) * 3,
        (255, 0, 0),
        (255, 0, 0),
        (255,) * 3,
    ]
    assert source.mask is not None
    assert decoded(source.mask).getbbox() == (0, 16, 96, 80)
    assert (request.mask, request.strength) == (None, STRENGTH), "and the rest changes as far as without bars"
    _, source = await taken(red, encoded(mask()), width=96, height=96)
    assert decoded(source.mask or b"").getbbox() == (0, 16, 32, 48)


async def test_a_size_of_another_shape_may_crop_or_stretch() -> None:
    _, source = await taken(encoded(gradient()), encoded(mask(change=(16, 0, 24, 8))), width=32, height=32, fit="cover")
    assert decoded(source.image).tobytes() == gradient().crop((8, 0, 40, 32)).tobytes()
    assert decoded(source.mask or b"").getbbox() == (8, 0, 16, 8)
    with pytest.raises(InvalidRequest, match="cover") as caught:
        await taken(encoded(gradient()), encoded(mask(change=(0, 0, 8, 8))), width=32, height=32, fit="cover")
    assert caught.value.field == "mask"
    request, source = await taken(encoded(gradient()), width=32, height=32, fit="stretch")
    assert decoded(source.image).tobytes() == gradient().resize((32, 32), Image.Resampling.LANCZOS).tobytes()
    assert (source.mask, request.strength) == (None, None)


@pytest.mark.parametrize("size", [(4096, 4096), (4096, 1000), (3000, 40), (10, 10)])
async def test_without_a_size_it_keeps_its_own_within_bounds(size: tuple[int, int]) -> None:
    request, source = await taken(encoded(Image.new("RGB", size)))
    width, height = decoded(source.image).size
    assert (request.width, request.height) == (width, height)
    assert max(width, height) <= MAX_SIDE
    assert width * height <= MAX_PIXELS
    if min(size) > 16:
        assert width / height == pytest.approx(size[0] / size[1], rel=0.1)


async def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    request, source = await taken(encoded(gradient(48, 32), "jpeg", exif=exif), encoded(mask(32, 48)))
    assert decoded(source.image).size == (32, 48) == (request.width, request.height)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
async def test_pictures_of_all_usual_kinds(mode: str) -> None:
    kind = "jpeg" if mode == "CMYK" else "png"
    _, source = await taken(encoded(gradient().convert(mode), kind))
    assert decoded(source.image).mode == "RGB"


async def test_transparent_parts_show_white() -> None:
    _, source = await taken(encoded(Image.new("RGBA", (16, 16), (0, 0, 0, 0))))
    assert decoded(source.image).getpixel((3, 3)) == (255, 255, 255)


async def test_only_what_is_fully_transparent_changes() -> None:
    picture = mask(change=None)
    picture.putpixel((5, 6), (9, 9, 9, 0))
    picture.putpixel((7, 8), (9, 9, 9, 1))
    _, source = await taken(encoded(gradient()), encoded(picture))
    assert source.mask is not None
    assert decoded(source.mask).getbbox() == (5, 6, 6, 7)
    assert decoded(source.mask).getpixel((5, 6)) == 255


async def test_a_single_pixel_to_change_survives_any_resampling() -> None:
    picture = mask(2048, 2048, change=(1000, 1000, 1001, 1001))
    _, source = await taken(encoded(Image.new("RGB", (2048, 2048))), encoded(picture), width=16, height=16)
    assert source.mask is not None
    assert decoded(source.mask).getbbox() == (7, 7, 8, 8)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to unpack to a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PNG = encoded(gradient())
REFUSED: dict[str, tuple[bytes, str]] = {
    "a bomb": (bomb(30_000, 30_000), "pixels"),
    "a bomb that only earns a warning": (bomb(10_000, 10_000), "pixels"),
    "just too large": (bomb(4097, 4096), "pixels"),
    "no picture": (b"GIF89a", "PNG, WebP or JPEG"),
    "another kind": (encoded(gradient(), "gif"), "PNG, WebP or JPEG"),
    "a TIFF": (encoded(gradient(), "tiff"), "PNG, WebP or JPEG"),
    "cut off": (PNG[: len(PNG) // 2], "damaged"),
    "only a head": (PNG[:33], "PNG, WebP or JPEG"),
    "nonsense inside": (PNG.replace(b"IDAT", b"IDAt"), "PNG, WebP or JPEG"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("field", ["image", "mask"])
async def test_what_is_no_fit_picture_is_refused_by_name(what: str, field: str) -> None:
    data, message = REFUSED[what]
    with pytest.raises(InvalidRequest, match=message) as caught:
        await taken(**({"image": PNG} | {field: data}))
    assert caught.value.field == field
    assert MAX_SOURCE_PIXELS < 4097 * 4096


@pytest.mark.parametrize(
    "dress",
    [
        lambda text: f"data:image/png;base64,{text}",
        lambda text: f"DATA:image/png;name=a.png;Base64,{text}",
        lambda text: "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n",
        lambda text: text.replace("+", "-").replace("/", "_"),
        lambda text: text.rstrip("="),
        lambda text: " " + text,
    ],
    ids=["data URL", "data URL with more", "wrapped", "URL-safe", "unpadded", "blank"],
)
async def test_base64_in_every_usual_dress(dress: Callable[[str], str]) -> None:
    for width in (48, 49, 50):  # so that each amount of padding comes, and both letters that are not URL-safe
        text = base64(encoded(gradient(width)))
        request, source = await SourcePictures().prepare(GenerationRequest(prompt="x", image=dress(text)))
        plain, _ = await SourcePictures().prepare(GenerationRequest(prompt="x", image=text))
        assert source is not None
        assert decoded(source.image).tobytes() == gradient(width).tobytes()
        assert request.image == plain.image, "a retry in another dress is the same request"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://example.com/a.png", "fetches no addresses"),
        ("data:image/png,raw", "data URL in base64"),
        ("data:image/png;base64", "data URL in base64"),
        ("AAAAA", "base64-encoded"),
        ("AA=A", "base64-encoded"),
        ("=", "PNG, WebP or JPEG"),
    ],
)
async def test_text_that_is_no_picture_says_what_to_send(text: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        await SourcePictures().prepare(GenerationRequest(prompt="x", image=text))


@pytest.mark.parametrize("text", ["?", "a", "data:image/png;base64,AAAA", "sha256:" + "0" * 64, "é"])
async def test_what_is_not_base64(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await SourcePictures().prepare(GenerationRequest(prompt="x", image=text))
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (mask(47, 32), "the same size as the picture, 48x32"),
        (mask(96, 64), "the same size as the picture, 48x32"),
        (gradient(), "alpha channel"),
        (mask(change=None), "nothing to change"),
    ],
)
async def test_masks_that_do_not_fit(picture: Image.Image, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        await taken(PNG, encoded(picture))
    assert caught.value.field == "mask"


async def test_pictures_are_taken_in_one_at_a_time() -> None:
    pictures = SourcePictures()
    request = GenerationRequest(prompt="x", image=base64(PNG))
    results = await asyncio.gather(*(pictures.prepare(request) for _ in range(20)))
    assert {source.image for _, source in results if source} == {results[0][1].image if results[0][1] else b""}
