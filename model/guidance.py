"""Classifier-free guidance: the only place that knows there are two branches."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from model.types import Grid, Plan, Prediction


class Branch(Enum):
    """What a forward pass is conditioned on."""

    NULL = "null"
    CONDITIONAL = "conditional"


def branches(plan: Plan) -> tuple[Branch, ...]:
    """The branches a plan needs: at scale 1 guidance is the conditional branch."""
    return (Branch.CONDITIONAL,) if plan.guidance == 1 else (Branch.NULL, Branch.CONDITIONAL)


def combine(outputs: dict[Branch, Tensor], plan: Plan, grid: Grid) -> Prediction:
    """``v_u + s·(v_c − v_u)``, and the same for the log-variance (spec §6).

    ``outputs`` holds, per branch, the network's ``(a, size² · (channels + 1))``.
    """
    conditional = outputs[Branch.CONDITIONAL]
    guided = conditional
    if Branch.NULL in outputs:
        null = outputs[Branch.NULL]
        guided = null + plan.guidance * (conditional - null)
    velocity, log_variance = _split(guided, grid)
    return Prediction(velocity, _split(conditional, grid)[0], log_variance)


def _split(output: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Velocity ``(a, D)`` and log-variance ``(a, size²)``."""
    pixels = output.unflatten(-1, (grid.size**2, grid.channels + 1))
    return pixels[..., :-1].flatten(1), pixels[..., -1]
