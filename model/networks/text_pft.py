"""TextPFT, the text-to-image network: self-attention, cross-attention to refined text, SwiGLU (spec §5)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from patchforge.model.networks.attention import Layout, TextContext, cross_attention, self_attention
from patchforge.model.networks.config import TextConfig
from patchforge.model.networks.layers import (
    AdaRMSNorm,
    CosineHeads,
    FourierTime,
    Mapping,
    RMSNorm,
    SwiGLU,
    axial_frequencies,
    cos_sin,
    patch_centres,
    rotate,
    sequence_frequencies,
)
from patchforge.model.networks.row_wise import Linear

Centres = tuple[Tensor, ...]
"""Patch centres `(P, 2)` of each grid in a pack."""


class TextPFT(nn.Module):
    """Predicts velocity and log-variance of packed patches, each at its own timestep, for a text."""

    centres: Tensor

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.grid = config.grid
        width = config.hidden_dim
        self.merge = Merge(self.grid.values, width)
        self.t_embedder = TimeEmbedder(config.mapping_dim, config.mapping_depth)
        self.txt_proj = Linear(config.txt_in_dim, config.txt_refiner_dim)
        self.txt_refiner = nn.ModuleList(
            RefinerBlock(config.txt_refiner_dim, config.txt_refiner_head_dim) for _ in range(config.txt_refiner_depth)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.split = Split(width, self.grid.size**2 * (self.grid.channels + 1))
        self.register_buffer("centres", patch_centres(self.grid), persistent=False)
        self._initialise()

    @property
    def cache_shape(self) -> tuple[int, int, int, int, int]:
        """Shape of one sequence's keys and values, `(layers, 2, heads, P, d_head)`."""
        config = self.config
        return config.depth, 2, config.hidden_dim // config.head_dim, self.grid.patches, config.head_dim

    def refine(self, text: Tensor, mask: Tensor | None = None) -> TextContext:
        """Compute everything that depends on the text alone. Once per prompt is enough.

        `text` is `(b, tokens, txt_in_dim)`; `mask` `(b, tokens)` is False on padding that the network must ignore.
        """
        refined = self.txt_proj(text)
        for block in self.txt_refiner:
            refined = block(refined, mask)
        return TextContext(tuple(cast(Block, block).cross_attn.keys_values(refined) for block in self.blocks), mask)

    def forward(self, patches: Tensor, times: Tensor, rows: Tensor | None, layout: Layout) -> Tensor:
        """Evaluate packed patches.

        Args:
            patches: `(n, D)`, the noisy values.
            times: `(u,)`, the distinct timesteps.
            rows: `(n,)` long, the timestep of each patch. None: one per patch (u = n), or one for all (u = 1).
            layout: how the n patches form sequences, and the text of each sequence.

        Returns:
            `(n, size² · (channels + 1))`: per pixel the velocity, then the log-variance.
        """
        x = self.merge.proj(patches)
        condition = self.t_embedder(times)
        centres = layout.centres or (self.centres,)
        for layer, block in enumerate(self.blocks):
            x = block(x, condition, rows, centres, layout, layer)
        return self.split.proj(self.split.norm(x))

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith(("norm.linear.weight", "out_proj.weight", "down_proj.weight")):
                nn.init.zeros_(parameter)
        nn.init.zeros_(self.split.proj.weight)


class Merge(nn.Module):
    """Maps patch values to tokens."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.proj = Linear(values, width, bias=False)


class Split(nn.Module):
    """Maps tokens to velocity and log-variance."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.proj = Linear(width, out, bias=False)


class TimeEmbedder(nn.Module):
    """Maps Fourier features of t through the mapping network."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.time_emb = FourierTime(width // 2)
        self.time_in_proj = Linear(width, width, bias=False)
        self.mapping = Mapping(width, depth)

    def forward(self, times: Tensor) -> Tensor:
        """`(u,)` → `(u, mapping_dim)`."""
        return self.mapping(self.time_in_proj(self.time_emb(times)))


class Frequencies(nn.Module):
    """Fixed rotary frequencies, stored in the checkpoint."""

    freqs: Tensor

    def __init__(self, freqs: Tensor) -> None:
        super().__init__()
        self.register_buffer("freqs", freqs)


class SelfAttention(nn.Module):
    """Cosine self-attention between patches, with 2-D RoPE."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, heads = config.hidden_dim, config.hidden_dim // config.head_dim
        self.norm = AdaRMSNorm(width, config.mapping_dim)
        self.qkv_proj = Linear(width, 3 * width, bias=False)
        self.out_proj = Linear(width, width, bias=False)
        self.scale = CosineHeads.scale_parameter(heads)
        self.pos_emb = Frequencies(axial_frequencies(heads, config.head_dim))
        self.heads = heads

    def forward(
        self, x: Tensor, condition: Tensor, rows: Tensor | None, centres: Centres, layout: Layout, layer: int
    ) -> Tensor:
        """`x` `(n, d)` and patch centres of the pack's grids → the residual `(n, d)`."""
        qkv = self.qkv_proj(self.norm(x, condition, rows)).unflatten(-1, (3, self.heads, -1))
        rotation = axial_cos_sin(self.pos_emb.freqs, centres, layout.positions)[:, :, None]
        q, k = rotate(CosineHeads.normalise(qkv[:, :2], self.scale), rotation).to(qkv.dtype).unbind(1)
        return self.out_proj(self_attention(q, k, qkv[:, 2], layout, layer, scale=1.0))


class CrossAttention(nn.Module):
    """Cosine attention from patches to text. RoPE rotates only the queries."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, heads = config.hidden_dim, config.hidden_dim // config.head_dim
        self.norm = AdaRMSNorm(width, config.mapping_dim)
        self.norm_cross = RMSNorm(config.txt_refiner_dim)
        self.q_proj = Linear(width, width, bias=False)
        self.kv_proj = Linear(config.txt_refiner_dim, 2 * width, bias=False)
        self.out_proj = Linear(width, width, bias=False)
        self.scale = CosineHeads.scale_parameter(heads)
        self.pos_emb = Frequencies(axial_frequencies(heads, config.head_dim))
        self.heads = heads

    def keys_values(self, text: Tensor) -> Tensor:
        """Refined text `(b, tokens, d_text)` → `(2, b, heads, tokens, d_head)`."""
        kv = self.kv_proj(self.norm_cross(text)).unflatten(-1, (2, self.heads, -1))
        keys = CosineHeads.normalise(kv[:, :, 0], self.scale).to(kv.dtype)
        return torch.stack([keys, kv[:, :, 1]]).transpose(2, 3)

    def forward(
        self, x: Tensor, condition: Tensor, rows: Tensor | None, centres: Centres, layout: Layout, layer: int
    ) -> Tensor:
        """`x` `(n, d)` and patch centres of the pack's grids → the residual `(n, d)`."""
        q = self.q_proj(self.norm(x, condition, rows)).unflatten(-1, (self.heads, -1))
        rotation = axial_cos_sin(self.pos_emb.freqs, centres, layout.positions)
        q = rotate(CosineHeads.normalise(q, self.scale), rotation).to(q.dtype)
        return self.out_proj(cross_attention(q, layout, layer, scale=1.0))


class FeedForward(SwiGLU):
    """Adaptive norm and SwiGLU."""

    def __init__(self, width: int, mapping: int) -> None:
        super().__init__(width, 3 * width)
        self.norm = AdaRMSNorm(width, mapping)

    def forward(self, x: Tensor, condition: Tensor, rows: Tensor | None) -> Tensor:
        """`(n, d)` → the residual `(n, d)`."""
        return self.gated(self.norm(x, condition, rows))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward: each with a norm before it and a residual connection."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.cross_attn = CrossAttention(config)
        self.ff = FeedForward(config.hidden_dim, config.mapping_dim)

    def forward(
        self, x: Tensor, condition: Tensor, rows: Tensor | None, centres: Centres, layout: Layout, layer: int
    ) -> Tensor:
        """`(n, d)` → `(n, d)`."""
        x = x + self.self_attn(x, condition, rows, centres, layout, layer)
        x = x + self.cross_attn(x, condition, rows, centres, layout, layer)
        return x + self.ff(x, condition, rows)


class RefinerAttention(nn.Module):
    """Cosine self-attention between text tokens, with 1-D RoPE on the token index."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.heads = width // head_dim
        self.norm = RMSNorm(width)
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.scale = CosineHeads.scale_parameter(self.heads)
        self.pos_emb = Frequencies(sequence_frequencies(self.heads, head_dim))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`(b, tokens, d)` → the residual, of the same shape."""
        qkv = self.qkv_proj(self.norm(x)).unflatten(-1, (3, self.heads, -1))
        index = torch.arange(x.shape[1], device=x.device, dtype=self.pos_emb.freqs.dtype)
        rotation = cos_sin(index[:, None, None] * self.pos_emb.freqs)
        q, k = (rotate(CosineHeads.normalise(qkv[:, :, i], self.scale), rotation).transpose(1, 2) for i in (0, 1))
        allowed = None if mask is None else mask[:, None, None, :]
        v = qkv[:, :, 2].transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=allowed, scale=1.0)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class RefinerFeedForward(SwiGLU):
    """Norm and SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__(width, 3 * width)
        self.norm = RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`(b, tokens, d)` → the residual, of the same shape."""
        return self.gated(self.norm(x))


class RefinerBlock(nn.Module):
    """One block of the text refiner."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.self_attn = RefinerAttention(width, head_dim)
        self.ff = RefinerFeedForward(width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`(b, tokens, d)` → `(b, tokens, d)`."""
        x = x + self.self_attn(x, mask)
        return x + self.ff(x)


def axial_cos_sin(frequencies: Tensor, centres: Centres, positions: Tensor) -> Tensor:
    """`cos_sin` of the angles `[y·freq_y, x·freq_x]`, `(2, n, heads, d_head/4)`.

    For the patches at `positions` `(n,)` in the grids with these centres, one after the other. Each grid has a table of
    its own, so that no bit of it can depend on what is packed beside: PyTorch may compute a tensor's last values in
    another way than the others.
    """
    tables = []
    for each in centres:
        y, x = each[:, 0, None, None], each[:, 1, None, None]
        tables.append(cos_sin(torch.cat([y * frequencies[0], x * frequencies[1]], dim=-1)))
    return (tables[0] if len(tables) == 1 else torch.cat(tables, dim=1)).index_select(1, positions)
