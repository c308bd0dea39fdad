"""Classifier-free guidance (spec §6): its two branches, and how their outputs combine."""

from __future__ import annotations

from enum import Enum

from torch import Tensor

from patchforge.model.types import Grid, Plan, Prediction


class Branch(Enum):
    """A guidance branch: with the null condition, or with the request's condition."""

    NULL = "null"
    CONDITIONAL = "conditional"


def branches(plan: Plan) -> tuple[Branch, ...]:
    """List the branches that a plan needs. At guidance scale 1, only the conditional one."""
    return (Branch.CONDITIONAL,) if plan.guidance == 1 else (Branch.NULL, Branch.CONDITIONAL)


def combine(outputs: dict[Branch, Tensor], plan: Plan, grid: Grid) -> Prediction:
    """Combine the branches: `v_u + s·(v_c − v_u)`, and the same for the log-variance (spec §6).

    `outputs` maps each branch to the network's output `(a, size² · (channels + 1))`. Patches that did not run in the
    null branch keep the conditional prediction.
    """
    conditional = guided = outputs[Branch.CONDITIONAL]
    null = outputs.get(Branch.NULL)
    if null is not None:
        index = plan.null_index
        both = conditional if index is None else conditional[index]
        mixed = null + plan.guidance * (both - null)
        guided = mixed if index is None else conditional.index_copy(0, index, mixed)
    velocity, log_variance = _split(guided, grid)
    own_velocity, own_log_variance = _split(conditional, grid)
    return Prediction(
        velocity=velocity,
        conditional=own_velocity,
        log_variance=log_variance,
        null=None if null is None else _split(null, grid)[0],
        conditional_log_variance=own_log_variance,
    )


def _split(output: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Split the network's output into velocity `(a, D)` and log-variance `(a, size²)`."""
    pixels = output.unflatten(-1, (grid.size**2, grid.channels + 1))
    return pixels[..., :-1].flatten(1), pixels[..., -1]
