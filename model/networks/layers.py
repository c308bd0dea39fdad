"""Parts of the text-to-image network: norms, feed-forward, time features, rotary embedding (spec §5)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchforge.model.networks.row_wise import Linear
from patchforge.model.types import Grid

EPS = 1e-6


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`(…, d)` → `(…, d)`."""
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x.dtype), EPS)


class AdaRMSNorm(nn.Module):
    """`RMSNorm(x)·(1 + W·condition)`. W runs once per distinct condition; each patch then gathers its result."""

    def __init__(self, width: int, condition: int) -> None:
        super().__init__()
        self.linear = Linear(condition, width, bias=False)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        """`x` `(n, d)`, `condition` `(u, m)`, `rows` `(n,)` as in `TextPFT.forward` → `(n, d)`."""
        scale: Tensor = 1 + self.linear(condition)
        return F.rms_norm(x, x.shape[-1:], eps=EPS) * (scale if rows is None else scale.index_select(0, rows))


class SwiGLU(nn.Module):
    """Linear to 2·hidden, split into (a, g), `a·SiLU(g)`, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up_proj = Linear(width, 2 * hidden, bias=False)
        self.down_proj = Linear(hidden, width, bias=False)

    def gated(self, x: Tensor) -> Tensor:
        """`(…, d)` → `(…, d)`."""
        a, g = self.up_proj(x).chunk(2, dim=-1)
        return self.down_proj(a * F.silu(g))


class FourierTime(nn.Module):
    """`[cos(2πtw), sin(2πtw)]` with fixed random w."""

    weight: Tensor

    def __init__(self, frequencies: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(frequencies, 1))

    def forward(self, times: Tensor) -> Tensor:
        """`(u,)` → `(u, 2·frequencies)`."""
        angles = 2 * math.pi * times[:, None] * self.weight[:, 0]
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class MappingBlock(SwiGLU):
    """Norm, SwiGLU and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(u, m)` → `(u, m)`."""
        return x + self.gated(self.norm(x))


class Mapping(nn.Module):
    """Maps time features to the condition that every block uses."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.in_norm = RMSNorm(width)
        self.blocks = nn.ModuleList(MappingBlock(width) for _ in range(depth))
        self.out_norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(u, m)` → `(u, m)`."""
        x = self.in_norm(x)
        for block in self.blocks:
            x = block(x)
        return self.out_norm(x)


class CosineHeads:
    """Cosine-similarity attention: each head is l2-normalised, then multiplied by its learned √scale."""

    @staticmethod
    def scale_parameter(heads: int) -> nn.Parameter:
        """Make the learned scales, `(heads,)`."""
        return nn.Parameter(torch.full((heads,), 10.0))

    @staticmethod
    def normalise(x: Tensor, scale: Tensor) -> Tensor:
        """`(…, heads, d_head)` → the same shape, in float32: the scores need its precision."""
        x = x.float()
        return x * (torch.rsqrt(x.square().sum(-1, keepdim=True) + EPS) * scale.float().sqrt()[:, None])


def cos_sin(angles: Tensor) -> Tensor:
    """Cosines and sines, `(2, …)`, of angles `(…)`."""
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Apply RoPE to the first half of each head of `x` `(…, heads, d_head)`.

    `rotation` `(2, …, heads, d_head/4)` is the `cos_sin` of the angles.
    """
    cos, sin = rotation
    quarter = rotation.shape[-1]
    a, b, rest = x.split([quarter, quarter, x.shape[-1] - 2 * quarter], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def axial_frequencies(heads: int, head_dim: int) -> Tensor:
    """2-D rotary frequencies `(2 axes [y, x], heads, d_head/8)`: π·10^(m/n), m = k·heads + head."""
    per_axis = head_dim // 8
    m = torch.arange(heads * per_axis).view(per_axis, heads).T
    return (math.pi * 10.0 ** (m / (heads * per_axis))).expand(2, -1, -1).clone()


def sequence_frequencies(heads: int, head_dim: int) -> Tensor:
    """1-D rotary frequencies `(heads, d_head/4)`: 10⁻⁴·10000^(m/n), m = k·heads + head."""
    count = head_dim // 4
    m = torch.arange(heads * count).view(count, heads).T
    return 1e-4 * 10000.0 ** (m / (heads * count))


def patch_centres(grid: Grid) -> Tensor:
    """Patch centres as (y, x), `(P, 2)`, row-major, on a canvas whose longer side spans [−1, 1]."""
    longer = max(grid.rows, grid.columns)
    y, x = ((2 * torch.arange(count) + 1 - count) / longer for count in (grid.rows, grid.columns))
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
