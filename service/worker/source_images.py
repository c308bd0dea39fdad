"""Where a job that starts from a picture begins: its patches, their times, and what of the picture stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from model.device import upload
from model.pipeline import Pipeline
from service.queue_records import Source

STRENGTH = 0.6
"""How far a picture may change if nothing is said: enough for other details, too little for another subject."""


@dataclass(frozen=True)
class SourceImage:
    """A picture to start from, prepared once for all pictures of its job."""

    clean: Tensor
    """``(P, D)``: its patches."""
    times: Tensor
    """``(P,)``: where each patch starts; at 1 it is known, and evaluated once, for the others to see."""
    original: Image.Image
    """RGB, as large as the finished picture."""
    changes: Image.Image | None
    """Greyscale of the same size: 255 marks what may change; None: everything."""

    def over(self, picture: Image.Image) -> Image.Image:
        """A finished picture of that size, with the original wherever the mask keeps it."""
        return picture if self.changes is None else Image.composite(picture, self.original, self.changes)


def prepare(pipeline: Pipeline, source: Source, strength: float | None) -> SourceImage:
    """Encode a picture and decide where its patches start.

    A patch is known if the mask marks none of its pixels for change; all others start at 1 − ``strength``.
    """
    original, grid = _opened(source.image), pipeline.grid
    changes = None if source.mask is None else _opened(source.mask)
    if strength is None:
        strength = STRENGTH if changes is None else 1.0
    clean = pipeline.encode(_pixels(original.resize(pipeline.manifest.size, Image.Resampling.LANCZOS))[None])[0]
    times = torch.full((grid.patches,), 1 - strength)
    if changes is not None:
        marked = adaptive_max_pool2d(_pixels(changes)[None].float(), (grid.rows, grid.columns))
        times[marked.flatten() == 0] = 1.0
    return SourceImage(clean, upload(times, clean.device), original, changes)


def _opened(png: bytes) -> Image.Image:
    picture = Image.open(BytesIO(png), formats=("PNG",))
    picture.load()
    return picture


def _pixels(picture: Image.Image) -> Tensor:
    """``(height, width, 3)`` or ``(height, width)`` uint8."""
    return torch.from_numpy(np.array(picture))
