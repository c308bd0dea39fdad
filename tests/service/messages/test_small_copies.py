"""A small copy is a PNG for all who look at it, and says where the preview is to those who know how."""

from __future__ import annotations

from base64 import b64decode, b64encode
from io import BytesIO

import pytest
from PIL import Image

from patchforge.service.messages.small_copies import split_reference, with_reference

REFERENCE = "s3://pictures/results/01ABC/preview-0-7-1-0-1.png"


def a_png() -> bytes:
    buffer = BytesIO()
    Image.radial_gradient("L").resize((20, 10)).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def test_the_reference_comes_out_and_leaves_nothing_behind() -> None:
    both = with_reference(a_png(), REFERENCE)
    assert split_reference(both) == (b64encode(a_png()).decode(), REFERENCE)


def test_other_decoders_see_the_picture() -> None:
    with (
        Image.open(BytesIO(b64decode(with_reference(a_png(), REFERENCE)))) as read,
        Image.open(BytesIO(a_png())) as was,
    ):
        read.verify()
        with Image.open(BytesIO(b64decode(with_reference(a_png(), REFERENCE)))) as again:
            assert again.tobytes() == was.tobytes()
        assert not read.info.keys() - was.info.keys()


@pytest.mark.parametrize("png", [a_png(), b"", b"x" * 30, b"not a PNG at all, but long enough to look at"])
def test_whatever_has_no_reference_stays_as_it_is(png: bytes) -> None:
    text = b64encode(png).decode()
    assert split_reference(text) == (text, None)
