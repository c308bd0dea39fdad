"""The picture that an edit starts from, as it travels from gateway to worker."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """A picture to edit and its mask, both PNG files as large as the finished picture."""

    image: bytes
    """RGB."""
    mask: bytes | None = None
    """Greyscale: 255 marks what may change, 0 what is kept. None: everything may change."""
