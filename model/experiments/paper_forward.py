"""The network's evaluation in the paper's form: one condition per patch, even where patches share it."""

from __future__ import annotations

from copy import copy

from torch import Tensor

from patchforge.model.denoiser import Denoiser, Piece
from patchforge.model.pipeline import Pipeline


class PaperDenoiser(Denoiser):
    """A denoiser whose mapping and modulations run once per patch. Predictions differ only by rounding."""

    def _index_conditions(self, pieces: list[Piece]) -> tuple[list[tuple[float, int]], Tensor | None]:
        distinct, rows = super()._index_conditions(pieces)
        patches = sum(piece.active for piece in pieces)
        return [distinct[row] for row in ([0] * patches if rows is None else rows.tolist())], None


def as_the_paper(pipeline: Pipeline) -> Pipeline:
    """Copy a pipeline, with the same weights and a `PaperDenoiser`."""
    other = copy(pipeline)
    other.denoiser = PaperDenoiser(pipeline.network)
    return other
