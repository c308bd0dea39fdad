"""What `Pipeline.generate` returns: pictures and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from patchforge.model.metadata import save_options


@dataclass(frozen=True)
class Report:
    """Work done and saved, in patch evaluations, guidance branches included."""

    patch_evaluations: int
    dense_patch_evaluations: int
    """What the same sampler would have done with every patch evaluated in every step."""

    @property
    def savings_ratio(self) -> float:
        """1 − done / dense: 0.3 means that 30 % of the work was saved."""
        return 1 - self.patch_evaluations / self.dense_patch_evaluations


@dataclass(frozen=True)
class Picture:
    """One finished picture and its seed."""

    image: Image.Image
    seed: int
    report: Report
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What it was made with, by the names of a request's fields."""

    def save(self, path: str | Path, *, metadata: bool = True) -> None:
        """Write it in the format that `path` ends in; with `metadata`, `settings` are written into the file."""
        kind = Image.registered_extensions().get(Path(path).suffix.lower(), "")
        self.image.save(path, **self._save_options(kind if metadata else ""))

    def encode(self, output_format: str, *, metadata: bool = True) -> bytes:
        """The picture as a file of this format, as Pillow names it."""
        buffer = BytesIO()
        self.image.save(buffer, output_format, **self._save_options(output_format if metadata else ""))
        return buffer.getvalue()

    def _save_options(self, output_format: str) -> dict[str, Any]:
        return save_options(output_format, self.image, self.settings) if self.settings else {}


@dataclass(frozen=True)
class Result:
    """Pictures, in the order of the request."""

    pictures: Sequence[Picture]

    @property
    def report(self) -> Report:
        """The work for all pictures together."""
        reports = [picture.report for picture in self.pictures]
        return Report(
            sum(each.patch_evaluations for each in reports), sum(each.dense_patch_evaluations for each in reports)
        )
