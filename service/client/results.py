"""What a client gets: pictures, and what making them cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from service.schemas import Job, SavingsReport

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One finished picture, encoded as it came."""

    data: bytes = field(repr=False)
    content_type: str
    seed: int

    def save(self, path: str | Path) -> None:
        """Write it as it came, whatever ``path`` ends in."""
        Path(path).write_bytes(self.data)

    @property
    def image(self) -> Image:
        """Decoded, for Pillow."""
        from PIL import Image

        return Image.open(BytesIO(self.data))


@dataclass(frozen=True)
class Result:
    """A completed job with its pictures."""

    job: Job
    pictures: list[Picture]
    report: SavingsReport
