"""The network's evaluation as the paper has it: every patch conditioned by itself, whatever patches share."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy

from torch import Tensor

from model.denoiser import Denoiser, PackedSequence
from model.pipeline import Pipeline


class PaperDenoiser(Denoiser):
    """A denoiser whose mapping and modulations run once per patch; the same predictions, but for rounding."""

    def _conditions(self, sequences: Sequence[PackedSequence]) -> tuple[list[tuple[float, int]], Tensor | None]:
        distinct, rows = super()._conditions(sequences)
        patches = sum(sequence.active for sequence in sequences)
        return [distinct[row] for row in ([0] * patches if rows is None else rows.tolist())], None


def as_the_paper(pipeline: Pipeline) -> Pipeline:
    """The same pipeline, on the same weights, with a `PaperDenoiser`."""
    other = copy(pipeline)
    other.denoiser = PaperDenoiser(pipeline.network)
    return other
