"""The KV cache: keys and values of patches that are not evaluated this time, for all pictures in progress."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

from patchforge.model.device import upload

GENERATIONS = 2
"""The cache keeps each patch's last two evaluations, so that attention can extrapolate from them."""


@dataclass
class Slot:
    """Rows for one guidance branch of one picture. They return to the pool when the slot is garbage-collected."""

    rows: Tensor = field(repr=False)
    """`(2·P,)` long: the pool's rows of generation 0, then those of generation 1."""
    newest: Tensor = field(repr=False)
    """`(P,)` long: which generation, 0 or 1, holds each patch's latest evaluation."""

    def row_of(self, patches: Tensor, generation: Tensor) -> Tensor:
        """Pool rows `(a,)` of `patches` `(a,)` in `generation` `(a,)`."""
        return self.rows[generation * self.newest.shape[0] + patches]


class CachePool:
    """One matrix per layer, whose rows are patches. It grows when pictures need more rows, and reuses free ones.

    Any free rows make a slot, so pictures of different sizes leave no gaps that are too small for others.
    When no picture holds a slot, the pool frees its memory. So it takes at most twice what its pictures have needed
    at once since it was last empty, or three times while it grows.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """`shape` is the network's `cache_shape`, `(layers, 2, heads, P, d_head)`."""
        layers, pair, self.heads, _, self.head_dim = shape
        self._rows = torch.empty((layers, pair, 0, self.heads * self.head_dim), dtype=dtype, device=device)
        self._free: list[int] = []

    def slot_bytes(self, patches: int) -> int:
        """Memory of a slot for a sequence of `patches` patches, in bytes."""
        layers, pair, _, width = self._rows.shape
        return layers * pair * GENERATIONS * patches * width * self._rows.element_size()

    @property
    def width(self) -> int:
        """Of a patch's keys, or values, of all heads together."""
        return self.heads * self.head_dim

    @property
    def dtype(self) -> torch.dtype:
        """The type in which keys and values are stored."""
        return self._rows.dtype

    @property
    def rows_in_use(self) -> int:
        """The number of rows in slots that pictures hold."""
        return self._rows.shape[2] - len(self._free)

    def slot(self, patches: int) -> Slot:
        """Take a slot for a sequence of `patches` patches; its rows hold nothing useful yet."""
        needed = GENERATIONS * patches
        if len(self._free) < needed:
            self._grow(needed)
        rows = [self._free.pop() for _ in range(needed)]  # one by one: a slot may be freed in between
        newest = torch.zeros(patches, dtype=torch.long, device=self._rows.device)
        slot = Slot(upload(torch.tensor(rows), self._rows.device), newest)
        weakref.finalize(slot, self._free_slot, rows).atexit = False
        return slot

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values `(m, heads, d_head)` in `rows` `(m,)`."""
        for kept, fresh in zip(self._rows[layer], (keys, values), strict=True):
            kept.index_copy_(0, rows, fresh.flatten(1).to(kept.dtype))

    def read(self, layer: int, recent: Tensor, earlier: Tensor | None, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        """Read keys and values, `(b, heads, P, d_head)` each, from the rows `recent` `(b, P)`.

        With `earlier` `(b, P)` and `reach` `(b·P, 1)` the result is extrapolated: `earlier + reach·(recent − earlier)`.
        """
        found = []
        for kept in self._rows[layer]:
            rows = kept.index_select(0, recent.flatten())
            if earlier is not None and reach is not None:
                rows = torch.lerp(kept.index_select(0, earlier.flatten()), rows, reach)
            found.append(rows.view(*recent.shape, self.heads, self.head_dim).transpose(1, 2))
        return found[0], found[1]

    def _free_slot(self, rows: list[int]) -> None:
        self._free.extend(reversed(rows))
        if not self.rows_in_use:
            self._rows = self._rows.new_empty((*self._rows.shape[:2], 0, self._rows.shape[3]))
            self._free.clear()

    def _grow(self, needed: int) -> None:
        """Make room for at least `needed` more rows."""
        old = self._rows.shape[2]
        new = max(4 * needed, 2 * old)
        grown = self._rows.new_zeros((*self._rows.shape[:2], new, self._rows.shape[3]))
        grown[:, :, :old] = self._rows
        self._rows = grown
        self._free[:0] = reversed(range(old, new))
