"""Extrapolate each patch's last evaluations in time, and predict the error of doing so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Track:
    """The last two values of a quantity, for every patch. Each patch was evaluated at its own times."""

    latest: Tensor
    """`(P, D)`: the last value."""
    earlier: Tensor
    """`(P, D)`: the value before."""
    at: Tensor
    """`(P,)`: the time of `latest`; NaN without a value."""
    before: Tensor
    """`(P,)`: the time of `earlier`; equal to `at` if there is only one value."""
    slope: Tensor
    """`(P,)`: first divided difference of the last two values, root mean square over a patch. Infinite with fewer than
    two values."""
    curvature: Tensor
    """`(P,)`: second divided difference of the last three values, root mean square over a patch. Infinite with fewer
    than three values."""

    @classmethod
    def begin(cls, like: Tensor) -> Self:
        """Make an empty track for values like `like` `(P, D)`."""
        unknown = like.new_full(like.shape[:1], torch.nan)
        return cls(
            torch.zeros_like(like), torch.zeros_like(like), unknown, unknown, *2 * [torch.full_like(unknown, torch.inf)]
        )

    def record(self, patches: Tensor, values: Tensor, time: float) -> Self:
        """Return the track after `patches` `(a,)` had the `values` `(a, D)` at `time`."""
        at, before, latest = self.at[patches], self.before[patches], self.latest[patches]
        first = at.isnan()
        # At a third point, a line through two points misses by the second divided difference × both distances.
        missed = (values - self.extrapolate(time)[patches]).square().mean(dim=1).sqrt()
        slope = torch.where(first, torch.inf, (values - latest).square().mean(dim=1).sqrt() / (time - at))
        curvature = torch.where(at > before, missed / ((time - at) * (time - before)), torch.inf)
        return type(self)(
            latest=self.latest.index_copy(0, patches, values),
            earlier=self.earlier.index_copy(0, patches, torch.where(first[:, None], values, latest)),
            at=self.at.index_fill(0, patches, time),
            before=self.before.index_copy(0, patches, torch.where(first, time, at)),
            slope=self.slope.index_copy(0, patches, slope),
            curvature=self.curvature.index_copy(0, patches, curvature),
        )

    def reach(self, time: float) -> Tensor:
        """`(P,)`: how far `time` lies beyond the latest value, in units of the time between the last two."""
        span = self.at - self.before
        return torch.where(span > 0, (time - self.at) / span, 0.0)

    def extrapolate(self, time: float, order: int = 2) -> Tensor:
        """`(P, D)`: the value at `time`, on the line through both values (order 2); or the latest value (order 1)."""
        if order == 1:
            return self.latest
        return torch.lerp(self.earlier, self.latest, 1 + self.reach(time)[:, None])

    def error(self, start: float, end: float, order: int = 2) -> Tensor:
        """Predict the root mean square error, `(P,)`, of moving from `start` to `end` on the extrapolated values.

        The prediction assumes that the derivative of this order stays constant. Infinite with fewer than `order + 1`
        values.
        """
        middle = (start + end) / 2
        changed = self.slope if order == 1 else self.curvature * (middle - self.before)
        error = (end - start) * changed * (middle - self.at)
        return error.nan_to_num(nan=torch.inf, posinf=torch.inf)

    def size(self, start: float, end: float) -> Tensor:
        """`(P,)`: how far the latest value moves a patch from `start` to `end`, root mean square over the patch.

        Infinite without a value.
        """
        size = (end - start) * self.latest.square().mean(dim=1).sqrt()
        return torch.where(self.at.isnan(), torch.inf, size)
