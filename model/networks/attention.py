"""Attention from packed active patches to all patches of their picture. Some keys and values come from a cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Barrier

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.networks.kv_cache import CachePool


@dataclass(frozen=True)
class TextContext:
    """Keys and values of the refined text of b sequences, computed once per prompt."""

    keys_values: tuple[Tensor, ...]
    """One `(2, b, heads, tokens, d_head)` per layer."""
    mask: Tensor | None
    """`(b, tokens)` bool, False on padding. None: the network attends to padding as to any token."""

    @property
    def bytes(self) -> int:
        """Memory of the keys and values, in bytes."""
        return sum(layer.nbytes for layer in self.keys_values)

    @classmethod
    def stack(cls, contexts: list[TextContext]) -> TextContext:
        """Join the contexts of several sequences, which must have the same number of tokens."""
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
    """Places in the pool of the keys and values of b sequences: all P patches of each, fresh ones included."""

    recent: Tensor
    """`(b, P)` long: the row of each patch's latest evaluation."""
    earlier: Tensor | None = None
    """`(b, P)` long: the row of the evaluation before. None: nothing is extrapolated."""
    reach: Tensor | None = None
    """`(b·P, 1)`: how far to go on the line from earlier to recent. At 1 the result is the recent one."""


@dataclass(frozen=True)
class Group:
    """Neighbouring sequences in the pack that have equal numbers of patches, active ones and all.

    Equal counts let one batched attention call serve all of them without padding.
    """

    start: int
    sequences: int
    active: int
    kept: Kept | None = None
    """None: every patch of the grid is active, so all keys and values are fresh."""
    context: TextContext | None = None
    shared: slice | None = None
    """Of a sequence that is cut: where all its keys and values lie in what the parts of the pack exchange."""

    @property
    def rows(self) -> slice:
        """The rows of the pack that belong to this group."""
        return slice(self.start, self.start + self.sequences * self.active)

    def unpack(self, packed: Tensor) -> Tensor:
        """Select this group's rows: `(n, heads, d_head)` → `(b, heads, a, d_head)`."""
        return packed[self.rows].unflatten(0, (self.sequences, self.active)).transpose(1, 2)


@dataclass(frozen=True)
class Keeping:
    """Which packed patches write their keys and values to the pool, and to which rows."""

    pool: CachePool
    packed: Tensor
    """`(m,)` long: rows of the pack."""
    rows: Tensor
    """`(m,)` long: rows of the pool."""

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a layer's keys and values `(n, heads, d_head)` of the whole pack."""
        self.pool.write(layer, self.rows, keys.index_select(0, self.packed), values.index_select(0, self.packed))


@dataclass(frozen=True)
class Exchange:
    """Where the parts of a pack of n patches, each computed by its own thread, leave keys and values for each other."""

    keys_values: Tensor
    """`(2, 2, n, heads · d_head)`: of layers in turn, since a part may be a layer ahead of those that still read."""
    meeting: Barrier
    """Of all parts."""
    start: int = 0
    """The pack's row that this part begins with."""

    def share(self, layer: int, keys: Tensor, values: Tensor) -> Tensor:
        """Leave what this part made, `(rows, heads, d_head)` each; `(2, n, heads, d_head)` once all parts did."""
        room = self.keys_values[layer % 2]
        for place, made in zip(room, (keys, values), strict=True):
            place[self.start : self.start + len(made)] = made.flatten(1)
        self.meeting.wait()
        return room.unflatten(-1, keys.shape[1:])


@dataclass(frozen=True)
class Layout:
    """Which rows of a pack of n patches belong together, and each patch's place in its grid."""

    groups: tuple[Group, ...]
    positions: Tensor = field(repr=False)
    """`(n,)` long: the index of each packed patch in its grid; if there are several grids, in all of them in a row."""
    keeping: Keeping | None = None
    """None: no sequence uses the cache."""
    exchange: Exchange | None = None
    """None: no sequence of the pack is cut."""
    centres: tuple[Tensor, ...] | None = field(default=None, repr=False)
    """`(P, 2)` for each grid in the pack: where its patches lie. None: there is only the network's own grid."""

    @classmethod
    def dense(cls, sequences: int, patches: int, device: torch.device, context: TextContext | None = None) -> Layout:
        """Lay out every patch of every sequence, in order, as training does."""
        positions = torch.arange(patches, device=device).repeat(sequences)
        return cls((Group(0, sequences, patches, context=context),), positions)


def self_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, layer: int, scale: float | None = None) -> Tensor:
    """Let each active patch attend to every patch of its own sequence.

    `q`, `k` and `v` are `(n, heads, d_head)`; the result is `(n, heads · d_head)`. `scale` multiplies the scores;
    None means d_head^-½.
    """
    if layout.keeping is not None:
        layout.keeping.write(layer, k, v)
    shared = None if layout.exchange is None else layout.exchange.share(layer, k, v)
    outputs = []
    for group in layout.groups:
        if group.kept is not None and layout.keeping is not None:
            kept = group.kept
            keys, values = layout.keeping.pool.read(layer, kept.recent, kept.earlier, kept.reach)
        elif group.shared is not None and shared is not None:
            keys, values = shared[:, None, group.shared].transpose(2, 3)
        else:
            keys, values = group.unpack(k), group.unpack(v)
        out = F.scaled_dot_product_attention(group.unpack(q), keys, values, scale=scale)
        outputs.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def cross_attention(q: Tensor, layout: Layout, layer: int, scale: float | None = None) -> Tensor:
    """Let each active patch `(n, heads, d_head)` attend to the text of its own sequence → `(n, heads · d_head)`.

    Raises:
        ValueError: a group has no text.
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
