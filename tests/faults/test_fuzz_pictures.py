"""Uploaded pictures and forms are accepted completely, or refused with the field at fault. Memory stays small."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.openai.multipart import form_body
from patchforge.service.gateway.openai.requests import EditRequest
from patchforge.service.gateway.source_pictures import _prepare
from patchforge.service.messages.schemas import GenerationRequest
from patchforge.service.settings import Settings
from tests.faults.fuzzing import ODD_TEXT, amounts, damaged, fuzz, little_memory
from tests.faults.test_fuzz_requests import sound, well_told
from tests.service.gateway.harness import CARDS
from tests.service.gateway.pictures import cmyk_profile, grey_profile, rgb_profile

SIDE = 24
BOUNDARY = b"xYzZy"


def encoded(kind: str, mode: str, **options: Any) -> bytes:
    """A picture whose left half is fully transparent, if its format allows that."""
    picture = Image.linear_gradient("L").resize((SIDE, SIDE)).convert(mode)
    if "A" in mode:
        picture.paste(0, (0, 0, SIDE // 2, SIDE))
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


PICTURES = [
    encoded("png", "RGBA"),
    encoded("png", "LA"),
    encoded("png", "P", transparency=0),
    encoded("png", "1"),
    encoded("jpeg", "RGB", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    encoded("jpeg", "CMYK", progressive=True),
    encoded("webp", "RGBA"),
    encoded("webp", "RGB", lossless=True),
    encoded("png", "RGB", icc_profile=rgb_profile((0.14, 0.06, 0.71), (0.39, 0.72, 0.1), (0.44, 0.22, 0.01))),
    encoded("webp", "RGBA", icc_profile=grey_profile(1.0)),
    encoded("jpeg", "CMYK", icc_profile=cmyk_profile()),
    encoded("jpeg", "RGB", progressive=True)[:-2],
    encoded("png", "I;16"),
]
ANY_PICTURE = st.sampled_from(PICTURES) | st.sampled_from(PICTURES).flatmap(damaged) | st.binary(max_size=60)


@amounts
def test_pictures(cases: int) -> None:
    """An accepted picture has the requested size, and the worker gets only valid PNGs."""

    @fuzz(cases)
    @given(ANY_PICTURE, st.none() | ANY_PICTURE, st.none() | st.tuples(st.integers(16, 64), st.integers(16, 64)))
    @little_memory(160)  # a damaged header may still claim the 16.8 million pixels that are allowed
    def holds(picture: bytes, mask: bytes | None, size: tuple[int, int] | None) -> None:
        fields: dict[str, Any] = {"prompt": "x", "image": b64encode(picture).decode() or "="}
        if mask:
            fields["mask"] = b64encode(mask).decode()
        if size:
            fields |= {"width": size[0], "height": size[1]}
        try:
            request, source = _prepare(GenerationRequest.model_validate(fields))
        except InvalidRequest as error:
            well_told(error)
            return
        assert size in (None, (request.width, request.height))
        for data in (source.image, *([source.mask] if source.mask else [])):
            taken = Image.open(BytesIO(data), formats=["png"])
            taken.load()
            assert taken.size == (request.width, request.height)

    holds()


TEXTS = ODD_TEXT.map(lambda text: text.encode("utf-8", "surrogatepass"))
NAMES = st.sampled_from(
    ["prompt", "n", "image", "image[]", "mask", "sampler", "sampler[name]", "size", "steps", "stream"]
)
PARTS = st.tuples(NAMES | ODD_TEXT, TEXTS | st.sampled_from([b"7", b"true", b"dual_loop", PICTURES[0]]), st.booleans())


def form(parts: list[tuple[str, bytes, bool]]) -> bytes:
    """A form as a client sends it, with random quoting of field names."""
    body = b""
    for name, content, is_file in parts:
        file_name = b'; filename="x.png"' if is_file else b""
        head = b'Content-Disposition: form-data; name="' + name.encode("utf-8", "surrogatepass") + b'"' + file_name
        body += b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + content + b"\r\n"
    return body + b"--" + BOUNDARY + b"--\r\n"


SOUND_FORM = form([("prompt", b"a red apple", False), ("image", PICTURES[0], True), ("n", b"2", False)])


FORMS = st.lists(PARTS, max_size=6).map(form) | damaged(SOUND_FORM) | st.binary(max_size=100)


# If a form breaks off, starlette leaves the last file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
@amounts
def test_forms(cases: int) -> None:
    """A form that can be read becomes a valid request. All others get a 4xx."""

    @fuzz(cases)
    @given(FORMS, st.sampled_from(CARDS))
    @little_memory(64)
    def holds(body: bytes, card: Any) -> None:
        try:
            generation = asyncio.run(read(body)).generation(card)
        except InvalidRequest as error:
            well_told(error)
        except HTTPException as error:
            statuses.add(error.status_code)
        else:
            sound(generation)

    statuses = set[int]()
    holds()
    assert statuses <= {400, 413}


def test_the_sound_form_is_read() -> None:
    assert asyncio.run(read(SOUND_FORM)).n == 2


@pytest.mark.parametrize("length", [0, 1, 70, 71, 5000])
def test_boundaries_of_any_length(length: int) -> None:
    content_type = f"multipart/form-data; boundary={'x' * length}"
    with pytest.raises((InvalidRequest, HTTPException)):
        asyncio.run(read(SOUND_FORM, content_type))


async def read(body: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY.decode()}") -> EditRequest:
    """Reads a form as the gateway does."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    settings = Settings()
    app = SimpleNamespace(state=SimpleNamespace(settings=settings))
    scope = {"type": "http", "app": app, "headers": [(b"content-type", content_type.encode())]}
    scope["state"] = {"body_limit": settings.max_upload_bytes}
    return await form_body(EditRequest)(Request(scope, receive))
