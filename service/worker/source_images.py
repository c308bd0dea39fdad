"""Prepares a job that edits a picture: clean patches, start times, and which pixels stay as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d, conv2d, pad

from patchforge.model.device import upload
from patchforge.model.pipeline import Pipeline
from patchforge.model.samplers import Sampler, State
from patchforge.service.memory import require_memory_for
from patchforge.service.messages.fit import Box, Fit, Size, place, size_of
from patchforge.service.messages.schemas import STRENGTH
from patchforge.service.messages.source import Source

SEAM = 1 / 96
"""How far the colours of kept pixels reach into what changes: a standard deviation, as a share of the longer side."""


@dataclass(frozen=True)
class SourceImage:
    """A picture to edit, prepared once for all pictures of its job."""

    clean: Tensor
    """`(P, D)`: the patches of the picture."""
    times: Tensor
    """`(P,)`: the start time of each patch. Patches at 1 are known; they are evaluated once, as context for others."""
    kept: Tensor | None
    """`(P, D)` bool: latent values that the mask keeps, also in patches that change in part. None: there is no mask."""
    original: Image.Image
    """RGB, as large as the finished picture."""
    changes: Image.Image | None
    """Greyscale, same size: 255 marks what may change. None: everything may change."""
    region: Box
    """Where the picture lies in what the model draws."""

    def begin(self, sampler: Sampler[State], noise: Tensor) -> State:
        """Return the state from which `sampler` edits the picture, with noise `(P, D)`.

        Raises:
            ParameterError: the sampler needs all patches at the same time.
        """
        return sampler.start_from(noise, self.clean, self.times, self.kept)

    def over(self, picture: Image.Image) -> Image.Image:
        """Return the finished picture, with the original's pixels wherever the mask keeps them."""
        if self.changes is None:
            return picture
        return Image.composite(_without_seam(picture, self.original, self.changes), self.original, self.changes)


def prepare_source(
    pipeline: Pipeline, source: Source, strength: float | None, fit: Fit | None = None, canvas: Size | None = None
) -> SourceImage:
    """Encode a picture, and decide where its patches start.

    A patch is known if the mask lets none of its pixels change. All others start at 1 − `strength`. Unless `fit` is to
    stretch, a picture of another shape than `canvas` lies in its middle, and what is beside it is known too. `canvas`
    is one of the model's native sizes, by default its own.
    """
    original, canvas = _open_png(source.image), canvas or pipeline.manifest.size
    grid = pipeline.grids[canvas]
    changes = None if source.mask is None else _open_png(source.mask)
    if strength is None:
        strength = STRENGTH if changes is None else 1.0
    region = place(original.size, canvas, Fit.STRETCH if fit in (None, Fit.STRETCH) else Fit.CONTAIN).place
    seen = original.resize(size_of(region), Image.Resampling.LANCZOS)
    if seen.size != canvas:
        seen, around = Image.new("RGB", canvas, "white"), seen
        seen.paste(around, region)
    clean = pipeline.encode(_to_pixels(seen)[None])[0]
    times, kept = torch.full((grid.patches,), 1 - strength), None
    marks = _marks(changes, region, canvas)
    if marks is not None:
        # Marks of whole latent cells: a cut inside a patch then shows no seam, because both sides belong together.
        marked = adaptive_max_pool2d(marks, grid.latent_shape[1:]).expand(grid.latent_shape)
        kept = grid.patchify(marked) == 0
        times[kept.all(dim=1)] = 1.0
        kept = upload(kept, clean.device)
    return SourceImage(clean, upload(times, clean.device), kept, original, changes, region)


def _without_seam(picture: Image.Image, original: Image.Image, changes: Image.Image) -> Image.Image:
    """Return the picture, shifted near kept pixels by the difference that there is between the two at these.

    So the colours meet where the mask cuts. The shift fades with the distance from kept pixels.
    """
    shrink = max(1.0, max(picture.size) / 256)  # the shift is smooth, and a large picture in float32 takes much memory
    small = math.ceil(picture.width / shrink), math.ceil(picture.height / shrink)
    nothing = Image.new("RGB", picture.size)
    wanted, drawn, keeps = (
        np.asarray(each.resize(small, Image.Resampling.BOX), np.float32)
        for each in (
            Image.composite(nothing, original, changes),
            Image.composite(nothing, picture, changes),
            ImageChops.invert(changes),
        )
    )
    missing = torch.from_numpy(wanted - drawn).movedim(-1, 0)
    *found, near = _blurred(torch.cat([missing, torch.from_numpy(keeps)[None] / 255]))
    # Half of what is near the cut is kept, so that the whole difference is made up for there.
    shift = (torch.stack(found) / near.clamp(min=0.5)).movedim(0, -1)
    more, less = (
        Image.fromarray(part.clamp(0, 255).round().byte().numpy()).resize(picture.size, Image.Resampling.BILINEAR)
        for part in (shift, -shift)
    )
    return ImageChops.subtract(ImageChops.add(picture, more), less)


def _blurred(values: Tensor) -> Tensor:
    """Blur `(c, height, width)` with a deviation of `SEAM`, as a share of the longer side."""
    deviation = max(values.shape[1:]) * SEAM
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    weights /= weights.sum()
    blurred = values[:, None]
    for kernel, margin in ((weights[None], (reach, reach, 0, 0)), (weights[:, None], (0, 0, reach, reach))):
        blurred = conv2d(pad(blurred, margin, mode="replicate"), kernel[None, None])
    return blurred[:, 0]


def _marks(changes: Image.Image | None, region: Box, canvas: Size) -> Tensor | None:
    """`(1, height, width)`: above 0 where the picture that is drawn may change; None: everywhere."""
    pixels = None if changes is None else _to_pixels(changes)[None].float()
    if size_of(region) == canvas:
        return pixels
    width, height = size_of(region)
    marks = torch.zeros(1, canvas[1], canvas[0])
    inside = 1.0 if pixels is None else adaptive_max_pool2d(pixels, (height, width))
    marks[:, region[1] : region[3], region[0] : region[2]] = inside
    return marks


def _open_png(png: bytes) -> Image.Image:
    picture = Image.open(BytesIO(png), formats=("PNG",))
    require_memory_for(picture.width * picture.height)
    picture.load()
    return picture


def _to_pixels(picture: Image.Image) -> Tensor:
    """`(height, width, 3)` or `(height, width)` uint8."""
    return torch.from_numpy(np.array(picture))
