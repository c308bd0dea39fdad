"""Pictures in a terminal: with the terminal's own protocol if we know it, otherwise as coloured half blocks.

Not textual-image: its import writes queries to the terminal and reads the answers from stdin, so it crashes if stdin is
a pipe, prints rubbish on a dumb terminal, may swallow a key, and has no iTerm2 protocol.

Pillow is loaded only when it is needed: the base install does not have it.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from enum import Enum
from io import BytesIO

from rich.color import Color
from rich.style import Style
from rich.text import Text

COLUMNS = 32
"""Width of a picture in characters; half blocks show two rows of pixels per line of text."""
KITTY_CHUNK = 4096


class Protocol(Enum):
    """How a terminal shows pictures."""

    KITTY = "kitty"
    ITERM = "iterm"
    BLOCKS = "blocks"
    NONE = "none"


def protocol(environment: Mapping[str, str], *, is_terminal: bool) -> Protocol:
    """What the terminal supports, according to its environment variables."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if not is_terminal or term in ("", "dumb") or environment.get("NO_COLOR"):
        return Protocol.NONE
    if term.startswith(("screen", "tmux")):
        return Protocol.BLOCKS  # a multiplexer does not pass the outer terminal's protocols on
    if term in ("xterm-kitty", "xterm-ghostty") or "KITTY_WINDOW_ID" in environment:
        return Protocol.KITTY
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return Protocol.ITERM
    return Protocol.BLOCKS


def escape_sequence(data: bytes, how: Protocol) -> str:
    """An encoded picture for kitty or iTerm2, `COLUMNS` wide; the cursor ends on the line below."""
    if how is Protocol.KITTY:
        return "".join(_kitty(_as_png(data))) + "\n"
    options = f"inline=1;width={COLUMNS};preserveAspectRatio=1;size={len(data)}"
    return f"\x1b]1337;File={options}:{b64encode(data).decode()}\a\n"


def half_blocks(data: bytes) -> Text:
    """An encoded picture as text, two pixels per character; rich reduces the colours to those of the terminal."""
    from PIL import Image

    with Image.open(BytesIO(data)) as opened:
        rows = max(2, 2 * round(COLUMNS * opened.height / opened.width / 2))
        picture = opened.convert("RGB").resize((COLUMNS, rows), Image.Resampling.LANCZOS)
    pixels = picture.tobytes()
    text = Text(no_wrap=True, end="")
    for row in range(0, rows, 2):
        for column in range(COLUMNS):
            upper, lower = (_pixel(pixels, line, column) for line in (row, row + 1))
            text.append("▀", Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def _pixel(pixels: bytes, row: int, column: int) -> Color:
    start = 3 * (row * COLUMNS + column)
    red, green, blue = pixels[start : start + 3]
    return Color.from_rgb(red, green, blue)


def _kitty(png: bytes) -> Iterator[str]:
    encoded = b64encode(png).decode()
    for start in range(0, len(encoded), KITTY_CHUNK):
        more = int(start + KITTY_CHUNK < len(encoded))
        control = f"f=100,a=T,c={COLUMNS},q=2,m={more}" if start == 0 else f"m={more}"
        yield f"\x1b_G{control};{encoded[start : start + KITTY_CHUNK]}\x1b\\"


def _as_png(data: bytes) -> bytes:
    from PIL import Image

    with Image.open(BytesIO(data)) as picture:
        if picture.format == "PNG":
            return data
        buffer = BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue()
