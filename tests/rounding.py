"""Whether packing may change a bit here: that depends on the matrix library, not on us."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.row_wise import FEW_ROWS, ROW_BLOCK

SHAPES = ((32, 48), (48, 32), (48, 144), (96, 192), (192, 96), (192, 576), (768, 192))
"""(in, out) of products like the networks' here and the shipped ones'."""


def products_are_alike() -> bool:
    """Do whole blocks of rows, and many rows, come out of a matrix product the same whatever their number?

    Asked of PyTorch itself, for as many threads as it now uses.
    """
    return all(_alike(shape, torch.get_num_threads()) for shape in SHAPES)


@cache
def _alike(shape: tuple[int, int], threads: int) -> bool:
    generator = torch.Generator().manual_seed(threads)
    rows = torch.randn(4 * FEW_ROWS, shape[0], generator=generator)
    weight = torch.randn(shape[1], shape[0], generator=generator)
    made = F.linear(rows, weight)
    counts = [*range(ROW_BLOCK, FEW_ROWS, ROW_BLOCK), *range(FEW_ROWS, len(rows), 7)]
    return all(torch.equal(F.linear(rows[:count], weight), made[:count]) for count in counts)


def assert_same(packed: Tensor, alone: Tensor) -> None:
    """Bit for bit where the library allows it, else within what packing may change."""
    torch.testing.assert_close(packed, alone, atol=0.0 if products_are_alike() else 1e-4, rtol=0)
