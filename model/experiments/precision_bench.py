"""What bf16 matrix products change in a model's pictures: the same prompts and noise, in float32 and in bf16."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from patchforge.model.evaluation.frechet import Interval
from patchforge.model.evaluation.lineup import worse
from patchforge.model.experiments.sampler_bench import PACK, Configuration, Gallery, picture_psnr
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import run

ALONE = 16
"""Pictures that are drawn alone too, to see what packing changes."""


@dataclass(frozen=True)
class Drawn:
    """Pictures of all prompts in one precision."""

    precision: str
    """Type of its matrix products."""
    pictures: Tensor
    """`(n, height, width, 3)` uint8."""
    processor_seconds: float
    """Of sampling and decoding on a CPU, per picture, of all threads."""
    packed_differs: float
    """Share of the pictures in which packing changes any pixel."""
    packed_most: int
    """Largest change of a pixel by packing, of 255."""


@dataclass(frozen=True)
class PrecisionRow:
    """bf16 beside float32, paired by prompt and noise."""

    float32: Drawn
    bfloat16: Drawn
    psnr: float
    """dB of the pictures in bf16 against those in float32."""
    figures: dict[str, Interval]
    """What the judges see in float32: see `Gallery.figures`."""
    differences: dict[str, Interval]
    """The same figures in bf16 less those in float32."""

    @property
    def worse(self) -> list[str]:
        """The figures that show, beyond their interval, that pictures in bf16 are worse."""
        return worse(self.differences)


def bench_precision(
    bundle: Path | str, words: Sequence[str], gallery: Gallery, configuration: Configuration, guidance: float, seed: int
) -> PrecisionRow:
    """Draw a picture of each prompt in both precisions, and show them to both judges.

    Raises:
        BundleError: the bundle cannot be loaded.
    """
    first, other = (
        _draw(Pipeline.open(bundle, precision=precision), words, configuration, guidance, seed)
        for precision in ("float32", "bfloat16")
    )
    seen, seen_other = gallery.view(first.pictures), gallery.view(other.pictures)
    return PrecisionRow(
        float32=first,
        bfloat16=other,
        psnr=picture_psnr(other.pictures, first.pictures),
        figures=gallery.figures(seen),
        differences=gallery.differences(seen_other, seen),
    )


def _draw(pipeline: Pipeline, words: Sequence[str], configuration: Configuration, guidance: float, seed: int) -> Drawn:
    sampler = pipeline.sampler(configuration.sampler, guidance=guidance, **configuration.options)
    pairs = [(pipeline.condition_on(prompt), pipeline.noise(seed + row)) for row, prompt in enumerate(words)]

    def draw(rows: slice) -> Tensor:
        runs = [pipeline.begin(sampler, *pair) for pair in pairs[rows]]
        run(pipeline.denoiser, runs)
        return pipeline.decode(torch.stack([each.state.x for each in runs]))

    draw(slice(1))  # warms up
    began = time.process_time()
    pictures = torch.cat([draw(slice(start, start + PACK)) for start in range(0, len(pairs), PACK)])
    seconds = time.process_time() - began
    alone = torch.cat([draw(slice(row, row + 1)) for row in range(min(ALONE, len(pairs)))])
    change = (alone.int() - pictures[: len(alone)].int()).abs().flatten(1).amax(dim=1)
    return Drawn(
        precision=str(pipeline.denoiser.dtype).removeprefix("torch."),
        pictures=pictures,
        processor_seconds=seconds / len(pairs),
        packed_differs=float((change > 0).float().mean()),
        packed_most=int(change.max()),
    )
