"""What a patch's last evaluations say of the time between and after them, and how wrong that may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Track:
    """The last two values of a quantity of every patch, each patch evaluated at times of its own."""

    latest: Tensor
    """``(P, D)``"""
    earlier: Tensor
    """``(P, D)``"""
    at: Tensor
    """``(P,)``: when ``latest`` was evaluated."""
    before: Tensor
    """``(P,)``: when ``earlier`` was; equal to ``at`` where there is only one value."""
    curvature: Tensor
    """``(P,)``: second divided difference of the last three values, root mean square over a patch; infinite before
    there are three."""

    @classmethod
    def begin(cls, like: Tensor) -> Self:
        """One that knows nothing yet, for values like ``like`` ``(P, D)``."""
        unknown = like.new_full(like.shape[:1], torch.nan)
        return cls(
            torch.zeros_like(like), torch.zeros_like(like), unknown, unknown, torch.full_like(unknown, torch.inf)
        )

    def record(self, patches: Tensor, values: Tensor, time: float) -> Self:
        """After an evaluation of ``patches`` ``(a,)`` that gave ``values`` ``(a, D)`` at ``time``."""
        at, before, latest = self.at[patches], self.before[patches], self.latest[patches]
        first = at.isnan()
        # The error of a line through two points, at a third, is the second divided difference times both distances.
        missed = (values - self.extrapolate(time)[patches]).square().mean(dim=1).sqrt()
        curvature = torch.where(at > before, missed / ((time - at) * (time - before)), torch.inf)
        return type(self)(
            latest=self.latest.index_copy(0, patches, values),
            earlier=self.earlier.index_copy(0, patches, torch.where(first[:, None], values, latest)),
            at=self.at.index_fill(0, patches, time),
            before=self.before.index_copy(0, patches, torch.where(first, time, at)),
            curvature=self.curvature.index_copy(0, patches, curvature),
        )

    def reach(self, time: float) -> Tensor:
        """``(P,)``: how far ``time`` lies beyond the latest value, in units of the distance between the two."""
        span = self.at - self.before
        return torch.where(span > 0, (time - self.at) / span, 0.0)

    def extrapolate(self, time: float) -> Tensor:
        """``(P, D)``: the line through both values, at ``time``; the one value where there is only one."""
        return torch.lerp(self.earlier, self.latest, 1 + self.reach(time)[:, None])

    def error(self, start: float, end: float) -> Tensor:
        """``(P,)``: root mean square error of moving from ``start`` to ``end`` on the extrapolated values, if their
        second derivative stays as it was."""
        middle = (start + end) / 2
        error = (end - start) * self.curvature * (middle - self.at) * (middle - self.before)
        return error.nan_to_num(nan=torch.inf, posinf=torch.inf)
