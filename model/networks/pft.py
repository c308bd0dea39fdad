"""PFT, the class-conditional network: a DiT with a condition per patch (spec §4)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchforge.model.networks.attention import Layout, self_attention
from patchforge.model.networks.config import ClassConfig
from patchforge.model.networks.row_wise import Linear, linear, tanh_gelu
from patchforge.model.types import Grid

TIME_FEATURES = 256


class PFT(nn.Module):
    """Predicts velocity and log-variance of packed patches, each at its own timestep, for a class."""

    pos_embed: Tensor

    def __init__(self, config: ClassConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.grid
        width = config.hidden_size
        self.x_embedder = PatchEmbedding(self.grid, width)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = ClassEmbedding(config.num_classes, width)
        self.register_buffer("pos_embed", position_table(self.grid, width)[None])
        self.blocks = nn.ModuleList(Block(width, config.num_heads) for _ in range(config.depth))
        self.final_layer = FinalLayer(width, self.grid.size**2 * (self.grid.channels + 1))
        self._initialise()

    @property
    def null_class(self) -> int:
        """The label that means no class: the last row of the embedding table."""
        return self.config.num_classes

    @property
    def cache_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one sequence's keys and values, `(layers, 2, heads, P, d_head)`."""
        heads = self.config.num_heads
        return self.config.depth, 2, heads, self.grid.patches, self.config.hidden_size // heads

    def forward(self, patches: Tensor, times: Tensor, labels: Tensor, rows: Tensor | None, layout: Layout) -> Tensor:
        """Evaluate packed patches.

        Args:
            patches: `(n, D)`, the noisy values.
            times: `(u,)`, the timesteps of the distinct conditions.
            labels: `(u,)` long, their classes.
            rows: `(n,)` long, the condition of each patch. None: one per patch (u = n), or one for all (u = 1).
            layout: how the n patches form sequences.

        Returns:
            `(n, size² · (channels + 1))`: per pixel the velocity, then the log-variance.
        """
        x = self.x_embedder(patches) + self.pos_embed[0].index_select(0, layout.positions)
        condition = F.silu(self.t_embedder(times) + self.y_embedder.embedding_table(labels))
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, rows, layout, layer)
        return self.final_layer(x, condition, rows)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "adaLN_modulation" in name or "final_layer.linear" in name:
                nn.init.zeros_(parameter)
            elif name.startswith("t_embedder") and name.endswith("weight"):
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)


class PatchEmbedding(nn.Module):
    """A p×p convolution with stride p. On single patches it is a linear map, and is applied as one."""

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(grid.channels, width, grid.size, stride=grid.size)

    def forward(self, patches: Tensor) -> Tensor:
        """`(n, D)` → `(n, d)`."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # order of a patch's values: row, column, channel
        return linear(patches, weight, self.proj.bias)


class TimeEmbedding(nn.Module):
    """A small MLP on sinusoidal features of t. t is not rescaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Linear(TIME_FEATURES, width), nn.SiLU(), Linear(width, width))

    def forward(self, times: Tensor) -> Tensor:
        """`(u,)` → `(u, d)`."""
        half = TIME_FEATURES // 2
        frequencies = torch.exp(torch.arange(half, device=times.device) * (-math.log(10000) / half))
        angles = times[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class ClassEmbedding(nn.Module):
    """One row per class, and a last row for the null class."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)


class Attention(nn.Module):
    """Multi-head self-attention, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x: Tensor, layout: Layout, layer: int) -> Tensor:
        """`(n, d)` → `(n, d)`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.proj(self_attention(q, k, v, layout, layer))


class MLP(nn.Module):
    """Linear, tanh-GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`(n, d)` → `(n, d)`."""
        return self.fc2(tanh_gelu(self.fc1(x)))


class Modulation(nn.Sequential):
    """adaLN: the linear map from a condition to shifts, scales and gates.

    It runs once per distinct condition, and each patch then gathers its result. This is exact, and saves a third of a
    block's work. The Sequential starts with a SiLU only so that weights have the checkpoint's names: all blocks need
    the same SiLU, so the caller computes it once.
    """

    def __init__(self, width: int, pieces: int) -> None:
        super().__init__(nn.SiLU(), Linear(width, pieces * width))
        self.pieces = pieces

    def gather(self, condition: Tensor, rows: Tensor | None) -> tuple[Tensor, ...]:
        """`condition` `(u, d)` after SiLU → `pieces` tensors `(n, d)`, or `(1, d)` if all patches share it."""
        made: Tensor = self[1](condition)
        return (made if rows is None else made.index_select(0, rows)).chunk(self.pieces, dim=-1)


class Block(nn.Module):
    """Attention, then MLP. Each patch's condition modulates and gates both."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None, layout: Layout, layer: int) -> Tensor:
        """`(n, d)` → `(n, d)`. `condition` `(u, d)` comes after SiLU."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation.gather(condition, rows)
        x = x + gate1 * self.attn(modulated_norm(x, shift1, scale1), layout, layer)
        return x + gate2 * self.mlp(modulated_norm(x, shift2, scale2))


class FinalLayer(nn.Module):
    """Modulated norm, then a linear map to velocity and log-variance."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = Linear(width, out)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        """`(n, d)` → `(n, out)`."""
        shift, scale = self.adaLN_modulation.gather(condition, rows)
        return self.linear(modulated_norm(x, shift, scale))


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`LN(x)·(1 + scale) + shift`."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def position_table(grid: Grid, width: int, finer: Grid | None = None) -> Tensor:
    """Fixed 2-D sin-cos table `(P, d)`. The first half of d encodes the column, the second half the row.

    With `finer`, a grid of more patches on the same canvas, each patch is in the middle of those that it covers there.
    """
    quarter = width // 4
    omega = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    covered = 1 if finer is None else finer.rows / grid.rows
    axes = [(torch.arange(count, dtype=torch.float64) + 0.5) * covered - 0.5 for count in (grid.rows, grid.columns)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    halves = [torch.outer(axis.flatten(), omega) for axis in (column, row)]
    return torch.cat([table for half in halves for table in (half.sin(), half.cos())], dim=1).float()
