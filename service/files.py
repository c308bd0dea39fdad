"""Where the command line puts pictures, made here or by a server."""

from __future__ import annotations

import re
from pathlib import Path


def picture_path(out: Path, number: int, prompt: str, seed: int) -> Path:
    """The file of the ``number``-th prompt's picture: its name tells what was asked for."""
    name = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    return out / f"{number:02d}-{name}-{seed}.png"
