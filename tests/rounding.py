"""Whether packing may change a bit here: that depends on the matrix library, not on us."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from model.linear import FEW_ROWS, ROW_BLOCK


@cache
def products_are_alike() -> bool:
    """Do whole blocks of rows, and many rows, come out of a matrix product the same whatever their number?"""
    rows, weight = torch.randn(4 * FEW_ROWS, 48), torch.randn(80, 48)
    made = F.linear(rows, weight)
    counts = [*range(ROW_BLOCK, FEW_ROWS, ROW_BLOCK), *range(FEW_ROWS, len(rows), 7)]
    return all(torch.equal(F.linear(rows[:count], weight), made[:count]) for count in counts)


def assert_same(packed: Tensor, alone: Tensor) -> None:
    """Bit for bit where the library allows it, else within what packing may change."""
    torch.testing.assert_close(packed, alone, atol=0.0 if products_are_alike() else 1e-4, rtol=0)
