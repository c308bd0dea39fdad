"""Linear layers and activations that make the same of a row, bit for bit, however many rows there are beside it.

So what a picture becomes does not depend on what is packed with it. That holds when serving in float32 on a CPU with
PyTorch's usual matrix library (MKL) and ``(n, width)`` rows; elsewhere these are PyTorch's own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_BLOCK = 4
"""MKL takes rows four at a time. What is left over goes through another kernel, which sums in another order."""
FEW_ROWS = 128
"""From here on leftovers did not differ, with up to 16 threads: filling up would be work for nothing."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`; few rows are filled up to whole blocks."""
    if x.device.type != "cpu" or x.dim() != 2 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows >= FEW_ROWS or rows % ROW_BLOCK == 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, -rows % ROW_BLOCK)), weight, bias)[:rows]


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """``(n, in)`` → ``(n, out)``; any other shape as `torch.nn.Linear` takes it."""
        return linear(x, self.weight, self.bias)


def silu(x: Tensor) -> Tensor:
    """``x·sigmoid(x)``."""
    if _serves_on_cpu(x) and torch.get_num_threads() > 1:
        return _times_sigmoid(x, x)
    return F.silu(x)


class SiLU(nn.Module):
    """`torch.nn.SiLU` by `silu`."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        return silu(x)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation.

    ``tanh(y) = 2·sigmoid(2y) − 1`` makes it ``x·sigmoid(2·√(2/π)·(x + 0.044715·x³))``. On CPUs that takes a little more
    than half as long as PyTorch's own, which spends its time in tanh.
    """
    if not _serves_on_cpu(x):
        return F.gelu(x, approximate="tanh")
    scale = 2 * math.sqrt(2 / math.pi)
    return _times_sigmoid(x, x * (scale + 0.044715 * scale * x.square()))


def _serves_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def _times_sigmoid(x: Tensor, y: Tensor) -> Tensor:
    """``x·sigmoid(y)``.

    Several threads share a large tensor in portions, whose last values PyTorch computes one by one: of ``sigmoid`` that
    gives other bits, of ``exp`` it does not. One thread does all in one go, faster.
    """
    if torch.get_num_threads() > 1:
        return x / (1 + torch.exp(-y))
    return x * torch.sigmoid(y)
