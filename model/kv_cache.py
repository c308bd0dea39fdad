"""Keys and values of patches that are not evaluated this time: one pool of rows for all pictures in flight."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor

GENERATIONS = 2
"""Each patch keeps its last two evaluations, so that what lies between evaluations can be extrapolated."""


@dataclass
class Slot:
    """Rows of one guidance branch of one picture; given back to the pool when nothing refers to it any more."""

    base: int
    """First row in the pool."""
    newest: Tensor = field(repr=False)
    """``(P,)`` long: generation of each patch's latest evaluation."""

    def row_of(self, patches: Tensor, generation: Tensor) -> Tensor:
        """Pool rows ``(a,)`` of these patches' ``generation`` ``(a,)``."""
        return self.base + generation * self.newest.shape[0] + patches


class CachePool:
    """Per layer, one matrix whose rows are patches. Grows as pictures come; what they leave is used again.

    Once all have left, their memory is given back. So the pool is never more than twice as large as its pictures ever
    needed at once since it was last empty, and three times while it grows.
    """

    def __init__(self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> None:
        """``shape`` is a network's ``(layers, 2, heads, P, d_head)``: what one evaluation of a sequence leaves."""
        layers, pair, self.heads, self.patches, self.head_dim = shape
        self._rows = torch.empty((layers, pair, 0, self.heads * self.head_dim), dtype=dtype, device=device)
        self._free: list[int] = []

    @property
    def slot_rows(self) -> int:
        """Rows of one slot."""
        return GENERATIONS * self.patches

    @property
    def slot_bytes(self) -> int:
        """What one slot takes."""
        layers, pair, _, width = self._rows.shape
        return layers * pair * self.slot_rows * width * self._rows.element_size()

    @property
    def dtype(self) -> torch.dtype:
        """What keys and values are kept in."""
        return self._rows.dtype

    @property
    def held_bytes(self) -> int:
        """What the pool takes, free slots included."""
        return self._rows.numel() * self._rows.element_size()

    @property
    def in_use(self) -> int:
        """Slots that pictures hold."""
        return self._rows.shape[2] // self.slot_rows - len(self._free)

    def slot(self) -> Slot:
        """A slot with nothing in it."""
        if not self._free:
            self._grow()
        base = self._free.pop()
        slot = Slot(base, torch.zeros(self.patches, dtype=torch.long, device=self._rows.device))
        weakref.finalize(slot, self._take_back, base).atexit = False
        return slot

    def write(self, layer: int, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values ``(m, heads, d_head)`` in ``rows`` ``(m,)``."""
        for kept, fresh in zip(self._rows[layer], (keys, values), strict=True):
            kept.index_copy_(0, rows, fresh.flatten(1).to(kept.dtype))

    def read(self, layer: int, recent: Tensor, earlier: Tensor | None, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values ``(b, heads, P, d_head)`` each, of ``recent`` ``(b·P,)`` rows.

        With ``earlier`` ``(b·P,)`` and ``reach`` ``(b·P, 1)`` they are extrapolated: ``earlier + reach·(recent −
        earlier)``, so that at reach 1 they are as kept.
        """
        found = []
        for kept in self._rows[layer]:
            rows = kept.index_select(0, recent)
            if earlier is not None and reach is not None:
                rows = torch.lerp(kept.index_select(0, earlier), rows, reach)
            found.append(rows.view(-1, self.patches, self.heads, self.head_dim).transpose(1, 2))
        return found[0], found[1]

    def _take_back(self, base: int) -> None:
        self._free.append(base)
        if not self.in_use:
            self._rows = self._rows.new_empty((*self._rows.shape[:2], 0, self._rows.shape[3]))
            self._free.clear()

    def _grow(self) -> None:
        old = self._rows.shape[2]
        new = max(4 * self.slot_rows, 2 * old)
        grown = self._rows.new_zeros((*self._rows.shape[:2], new, self._rows.shape[3]))
        grown[:, :, :old] = self._rows
        self._rows = grown
        self._free.extend(reversed(range(old, new, self.slot_rows)))
