"""Linear layers whose every row comes out the same, bit for bit, however many rows they are given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

ROW_BLOCK = 4
"""On CPUs the matrix product (MKL) takes rows four at a time. What is left over goes through another kernel, which sums
in another order: then what a picture becomes depends on what is packed with it."""
FEW_ROWS = 128
"""From here on leftovers did not differ, with up to 16 threads: filling up would be work for nothing."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; few rows on a CPU are filled up to whole blocks."""
    rows = x.shape[0]
    if x.dim() != 2 or rows >= FEW_ROWS or rows % ROW_BLOCK == 0 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, -rows % ROW_BLOCK)), weight, bias)[:rows]


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in)`` → ``(n, out)``."""
        return linear(x, self.weight, self.bias)
