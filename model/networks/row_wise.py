"""Linear layers and activations whose result for a row does not depend, in any bit, on the number of rows beside it.

So a picture does not depend on what is packed with it. This holds for `(n, width)` rows in float32 on a CPU, with
PyTorch's usual matrix library (MKL). Elsewhere these functions are PyTorch's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROW_BLOCK = 16
"""MKL processes rows in blocks, of four on most processors, of up to sixteen on an Emerald Rapids without AMX. Leftover
rows use another kernel, which adds in another order."""
FEW_ROWS = 128
"""From this many rows on, leftover rows gave the same bits with up to 16 threads, so they need no padding."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, which pads a small number of rows to whole blocks."""
    if x.device.type != "cpu" or x.dim() != 2 or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if rows >= FEW_ROWS or rows % ROW_BLOCK == 0:
        return F.linear(x, weight, bias)
    return F.linear(F.pad(x, (0, 0, 0, -rows % ROW_BLOCK)), weight, bias)[:rows]


class Linear(nn.Linear):
    """`torch.nn.Linear` that uses `linear`, and takes weights of a narrower type than its input."""

    def forward(self, x: Tensor) -> Tensor:
        """`(n, in)` → `(n, out)`. Other shapes work as in `torch.nn.Linear`."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            # Exact, so the result is that of weights which were wide from the beginning.
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return linear(x, weight, bias)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh approximation.

    With `tanh(y) = 2·sigmoid(2y) − 1` it becomes `x·sigmoid(2·√(2/π)·(x + 0.044715·x³))`. On CPUs this takes little
    more than half the time of PyTorch's own, which spends its time in tanh.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return F.gelu(x, approximate="tanh")
    scale = 2 * math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (scale + 0.044715 * scale * x.square()))


def convert_products(network: nn.Module, dtype: torch.dtype) -> None:
    """Store the weights of the blocks' products as `dtype`, so that autocast does not convert them at every call.

    For float32 there is no autocast: weights of a narrower type stay, to save memory, and `Linear` converts them.
    """
    if dtype is not torch.float32:
        for _, module in _products(network):
            module.to(dtype)


def product_weights(network: nn.Module) -> set[str]:
    """Names of the weights that may have a narrower type than the rest: nearly all of a large network."""
    return {f"blocks.{name}.weight" for name, _ in _products(network)}


def _products(network: nn.Module) -> Iterator[tuple[str, Linear]]:
    for name, module in network.get_submodule("blocks").named_modules():
        if isinstance(module, Linear):
            yield name, module
