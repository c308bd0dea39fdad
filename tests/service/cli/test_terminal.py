"""The environment decides how a terminal shows pictures, and every protocol sends the whole picture."""

from __future__ import annotations

import re
from base64 import b64decode
from io import BytesIO

import pytest
from PIL import Image

from patchforge.service.cli.terminal import COLUMNS, Protocol, escape_sequence, half_blocks, protocol


def encoded(picture: Image.Image, kind: str) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def noise() -> Image.Image:
    """So noisy that it does not fit into one chunk of kitty's protocol."""
    return Image.effect_noise((96, 48), 80).convert("RGB")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TERM": "xterm-kitty"}, Protocol.KITTY),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, Protocol.KITTY),
        ({"TERM": "xterm-ghostty"}, Protocol.KITTY),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, Protocol.ITERM),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, Protocol.ITERM),
        ({"TERM": "screen-256color", "KITTY_WINDOW_ID": "1"}, Protocol.BLOCKS),
        ({"TERM": "xterm-256color"}, Protocol.BLOCKS),
        ({"TERM": "xterm-kitty", "NO_COLOR": "1"}, Protocol.NONE),
        ({"TERM": "dumb"}, Protocol.NONE),
        ({}, Protocol.NONE),
    ],
)
def test_the_protocol(environment: dict[str, str], expected: Protocol) -> None:
    assert protocol(environment, is_terminal=True) is expected
    assert protocol(environment, is_terminal=False) is Protocol.NONE


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_kitty_gets_a_png_in_chunks(noise: Image.Image, kind: str) -> None:
    data = encoded(noise, kind)
    chunks = re.findall("\x1b_G([^;]*);([^\x1b]*)\x1b\\\\", escape_sequence(data, Protocol.KITTY))
    assert len(chunks) > 1
    assert [control.rpartition("m=")[2] for control, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
    assert all(len(payload) <= 4096 for _, payload in chunks)
    with Image.open(BytesIO(b64decode("".join(payload for _, payload in chunks)))) as sent:
        assert (sent.format, sent.size) == ("PNG", noise.size)


def test_iterm_gets_the_file(noise: Image.Image) -> None:
    data = encoded(noise, "JPEG")
    found = re.fullmatch("\x1b]1337;File=([^:]*):([^\a]*)\a\n", escape_sequence(data, Protocol.ITERM))
    assert found
    assert "inline=1" in found[1]
    assert b64decode(found[2]) == data


def test_half_blocks_carry_two_pixels_a_character() -> None:
    picture = Image.new("RGB", (64, 32), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 16, 64, 32))
    text = half_blocks(encoded(picture, "PNG"))
    lines = text.plain.splitlines()
    assert lines == ["▀" * COLUMNS] * (COLUMNS // 4)
    first, last = text.spans[0].style, text.spans[-1].style
    assert (first.color.triplet.rgb, last.bgcolor.triplet.rgb) == ("rgb(255,0,0)", "rgb(0,0,255)")
