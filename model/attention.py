"""Attention of packed active patches over keys and values that may partly come from a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kv_cache import CachePool


@dataclass(frozen=True)
class TextContext:
    """Refined text of b sequences as keys and values, computed once per prompt."""

    keys_values: tuple[Tensor, ...]
    """Per layer ``(2, b, heads, tokens, d_head)``."""
    mask: Tensor | None
    """``(b, tokens)`` bool, False on padding; None where padding is attended like any token."""

    @property
    def bytes(self) -> int:
        """What the keys and values take."""
        return sum(layer.nbytes for layer in self.keys_values)

    @classmethod
    def stack(cls, contexts: list[TextContext]) -> TextContext:
        """One context of several sequences with the same number of tokens."""
        if len(contexts) == 1:
            return contexts[0]
        layers = zip(*(context.keys_values for context in contexts), strict=True)
        masks = [context.mask for context in contexts if context.mask is not None]
        return cls(
            tuple(torch.cat(layer, dim=1) for layer in layers),
            torch.cat(masks) if masks else None,
        )


@dataclass(frozen=True)
class Kept:
    """Where the keys and values of b sequences lie in the pool: all P patches of each, the fresh ones included."""

    recent: Tensor
    """``(b·P,)`` long, rows of each patch's latest evaluation."""
    earlier: Tensor | None = None
    """``(b·P,)`` long, rows of the one before; None where nothing is extrapolated."""
    reach: Tensor | None = None
    """``(b·P, 1)``: how far to extrapolate from the earlier to the recent and beyond; 1 is as kept."""


@dataclass(frozen=True)
class Group:
    """``sequences`` neighbours in the pack, each with the same number of active patches.

    Grouping equal counts lets one batched attention call serve them without padding.
    """

    start: int
    sequences: int
    active: int
    kept: Kept | None = None
    """None when every patch of the grid is active, so that all keys and values are fresh."""
    context: TextContext | None = None

    @property
    def rows(self) -> slice:
        """The pack's rows that belong to this group."""
        return slice(self.start, self.start + self.sequences * self.active)

    def unpack(self, packed: Tensor) -> Tensor:
        """Rows of this group: ``(n, heads, d_head)`` → ``(b, heads, a, d_head)``."""
        return packed[self.rows].unflatten(0, (self.sequences, self.active)).transpose(1, 2)


@dataclass(frozen=True)
class Keeping:
    """Which packed patches leave their keys and values in the pool, and where."""

    pool: CachePool
    packed: Tensor
    """``(m,)`` long, rows of the pack."""
    rows: Tensor
    """``(m,)`` long, rows of the pool."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keep what a layer made: ``(n, heads, d_head)`` each."""
        self.pool.write(layer, self.rows, keys.index_select(0, self.packed), values.index_select(0, self.packed))


@dataclass(frozen=True)
class Layout:
    """Which rows of a pack of n patches belong together, and where each patch lies in its grid."""

    groups: tuple[Group, ...]
    positions: Tensor = field(repr=False)
    """``(n,)`` long: index of each packed patch in its grid."""
    keeping: Keeping | None = None
    """None when no sequence keeps or reads anything."""

    @classmethod
    def dense(cls, sequences: int, patches: int, device: torch.device, context: TextContext | None = None) -> Layout:
        """Every patch of every sequence, in order: the layout of training."""
        positions = torch.arange(patches, device=device).repeat(sequences)
        return cls((Group(0, sequences, patches, context=context),), positions)


def self_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, scale: float | None = None) -> Tensor:
    """Each active patch attends to every patch of its own sequence.

    ``q, k, v`` are ``(n, heads, d_head)``; the result is ``(n, heads · d_head)``. ``scale`` multiplies the
    scores; None means d_head^-½.
    """
    if layout.keeping is not None:
        layout.keeping.write(layer, k, v)
    outputs = []
    for group in layout.groups:
        if group.kept is None or layout.keeping is None:
            keys, values = group.unpack(k), group.unpack(v)
        else:
            kept = group.kept
            keys, values = layout.keeping.pool.read(layer, kept.recent, kept.earlier, kept.reach)
        out = F.scaled_dot_product_attention(group.unpack(q), keys, values, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cross_attention(q: Tensor, layout: Layout, layer: int, scale: float | None = None) -> Tensor:
    """Each active patch ``(n, heads, d_head)`` attends to the text of its own sequence → ``(n, heads · d_head)``.

    Raises:
        ValueError: a group carries no text.
    """
    outputs = []
    for group in layout.groups:
        if group.context is None:
            raise ValueError("cross-attention needs a text context in every group")
        keys, values = group.context.keys_values[layer]
        mask = group.context.mask
        allowed = None if mask is None else mask[:, None, None, :]
        out = F.scaled_dot_product_attention(group.unpack(q), keys, values, attn_mask=allowed, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
