"""Whether packing may change a bit on this machine. That depends on the matrix library, not on us."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model import parallel
from patchforge.model.networks.row_wise import FEW_ROWS, ROW_BLOCK

SHAPES = ((32, 48), (48, 32), (48, 144), (96, 192), (192, 96), (192, 576), (768, 192))
"""(in, out) of matrix products like those of the networks in tests and of the shipped ones."""


def products_are_alike() -> bool:
    """Tells whether a row's result is the same for every number of rows, in whole blocks and in large numbers.

    Computes this with PyTorch, in a thread like those that compute pictures.
    """
    return parallel.crew(torch.device("cpu")).run([_all_alike])[0]


@cache
def _all_alike() -> bool:
    return all(_alike(shape) for shape in SHAPES)


def _alike(shape: tuple[int, int]) -> bool:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(4 * FEW_ROWS, shape[0], generator=generator)
    weight = torch.randn(shape[1], shape[0], generator=generator)
    made = F.linear(rows, weight)
    counts = [*range(ROW_BLOCK, FEW_ROWS, ROW_BLOCK), *range(FEW_ROWS, len(rows), 7)]
    return all(torch.equal(F.linear(rows[:count], weight), made[:count]) for count in counts)


def assert_same(packed: Tensor, alone: Tensor) -> None:
    """Compare bit for bit if the library allows it, otherwise within what packing may change."""
    torch.testing.assert_close(packed, alone, atol=0.0 if products_are_alike() else 1e-4, rtol=0)
