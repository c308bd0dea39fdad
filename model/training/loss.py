"""The training loss: flow matching plus the likelihood of the predicted uncertainty (spec §3)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from patchforge.model.types import LOG_VARIANCE_RANGE

UNCERTAINTY_WEIGHT = 0.01


@dataclass(frozen=True)
class Loss:
    """Mean loss of both terms, each a scalar."""

    flow: Tensor
    nll: Tensor

    @property
    def total(self) -> Tensor:
        return self.flow + UNCERTAINTY_WEIGHT * self.nll


def patch_forcing_loss(output: Tensor, velocity: Tensor, weight: Tensor | None = None) -> Loss:
    """Compare the network's output with the true velocity.

    Args:
        output: `(n, pixels · (c + 1))`, as a network returns it; the log-variance is last in each pixel.
        velocity: `(n, pixels · c)`: `x1 − x0` of the same patches.
        weight: `(n,)` of 0 or 1: which patches count. None: all.
    """
    pixels = output.shape[-1] - velocity.shape[-1]
    cells = output.float().unflatten(-1, (pixels, -1))
    predicted, log_variance = cells[..., :-1], cells[..., -1:].clamp(*LOG_VARIANCE_RANGE)
    target = velocity.unflatten(-1, (pixels, -1))
    flow = (target - predicted).square()
    nll = 0.5 * (math.log(2 * math.pi) + log_variance + (target - predicted.detach()).square() / log_variance.exp())
    if weight is None:
        return Loss(flow.mean(), nll.mean())
    share = weight / weight.mean()
    return Loss((flow.mean((1, 2)) * share).mean(), (nll.mean((1, 2)) * share).mean())


def interpolate(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """`x_t = t·x1 + (1 − t)·x0` of patches `(…, P, D)` at times `(…, P)`."""
    return torch.lerp(noise, clean, times.unsqueeze(-1))
