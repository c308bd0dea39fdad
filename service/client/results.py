"""What a client gets: pictures and the report of their job."""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from patchforge.service.messages.schemas import Job, SavingsReport

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Picture:
    """One finished picture, as encoded by the server."""

    data: bytes = field(repr=False)
    content_type: str
    seed: int

    def save(self, path: str | Path) -> None:
        """Write the encoded picture; the extension of `path` does not change its format."""
        Path(path).write_bytes(self.data)

    @property
    def image(self) -> Image:
        """The picture, decoded by Pillow.

        Raises:
            ImportError: Pillow is not installed; the base install does not have it.
        """
        from PIL import Image

        return Image.open(BytesIO(self.data))


@dataclass(frozen=True)
class Result:
    """A completed job with its pictures."""

    job: Job
    pictures: list[Picture]
    report: SavingsReport
