"""Samplers as requests name them, with their options, and the presets of the product's own."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from service.messages import Message

MAX_STEPS = 200
MAX_TOLERANCE = 10.0


class Adaptive(Message):
    """Each patch is evaluated when its own path bends too much to be extrapolated, and finishes when it can.

    Tolerances are in units of the latents' standard deviation. With both at 0 this is `multistep`
    or, of order 1, `euler`.
    """

    name: Literal["adaptive"] = "adaptive"
    exponent: float = Field(1.0, ge=0.25, le=4, description="Above 1, steps are finer near noise.")
    order: int = Field(2, ge=1, le=2, description="Of extrapolation: 1 for a handful of steps, 2 for more.")
    tolerance: float = Field(
        0.1, ge=0, le=MAX_TOLERANCE, description="A patch finishes when its predicted error is below this."
    )
    skip_tolerance: float = Field(
        0.01, ge=0, le=10, description="A patch is not evaluated in a step whose predicted error is below this."
    )
    guidance_from: float = Field(0.0, ge=0, le=1, description="Guidance acts in steps whose middle is at least here.")
    guidance_until: float = Field(1.0, ge=0, le=1, description="… and before here.")
    refresh: int = Field(0, ge=0, le=200, description="Evaluate every patch every so many steps; 0: never again.")
    exact: bool = Field(False, description="Evaluate every patch in every step, for comparison.")


class Euler(Message):
    """Every patch, one uniform step at a time."""

    name: Literal["euler"] = "euler"


class DualLoop(Message):
    """Easy patches take whole steps, hard ones ``inner_steps`` small ones (paper: dual-loop).

    ``exact`` evaluates every patch in every inner step, as the paper's reference does; otherwise inner steps
    evaluate only the hard patches, against cached keys and values of the easy ones.
    """

    name: Literal["dual_loop"] = "dual_loop"
    quantile: float = Field(0.4, ge=0, le=1, description="Share of patches counted as easy.")
    inner_steps: int = Field(4, ge=1, le=16)
    exact: bool = False


class Heun(Message):
    """All patches together, two evaluations a step: second order."""

    name: Literal["heun"] = "heun"


class LookAhead(Message):
    """Hard patches are predicted with easy ones moved ahead as cleaner context (paper: look-ahead)."""

    name: Literal["look_ahead"] = "look_ahead"
    quantile: float = Field(0.4, ge=0, le=1, description="Share of patches counted as easy.")
    ratio: float = Field(1.4, ge=1, le=4, description="How far ahead the easy context is moved.")


class Multistep(Message):
    """All patches together, of second order: the uniform baseline; 8 to 12 steps are plenty."""

    name: Literal["multistep"] = "multistep"
    exponent: float = Field(1.5, ge=0.25, le=4, description="Above 1, steps are finer near noise.")


Sampler = Annotated[Adaptive | Euler | DualLoop | Heun | LookAhead | Multistep, Field(discriminator="name")]
SAMPLERS: tuple[str, ...] = ("adaptive", "euler", "dual_loop", "heun", "look_ahead", "multistep")


class Quality(StrEnum):
    """Presets of the adaptive sampler."""

    DRAFT = "draft"
    STANDARD = "standard"
    HIGH = "high"


class Preset(NamedTuple):
    """What a preset makes of a model's own choice."""

    steps: float
    """So many times as many."""
    tolerance: float
    """So many times as large."""
    order: int | None = None
    """Instead of the model's own."""
    guidance_from: float = 1.0
    """So many times as late: guidance does harm in the first of a few steps, and the finer they are, the shorter."""


PRESETS: dict[Quality, Preset] = {
    Quality.DRAFT: Preset(0.75, 1.5),
    Quality.STANDARD: Preset(1, 1),
    Quality.HIGH: Preset(2, 0.25, order=2, guidance_from=0.5),
}
UNTUNED = Adaptive(tolerance=0.2), 8
"""Sampler and steps that presets start from where a model's own choice is another sampler: nothing is tuned there."""


def preset(quality: Quality, usual: Sampler, steps: int) -> tuple[Adaptive, int]:
    """The sampler and steps of a preset, for a model whose own choice is ``usual`` in so many steps."""
    base, its_steps = (usual, steps) if isinstance(usual, Adaptive) else UNTUNED
    chosen = PRESETS[quality]
    options = {
        "order": chosen.order or base.order,
        "tolerance": min(MAX_TOLERANCE, round(chosen.tolerance * base.tolerance, 6)),
        "guidance_from": chosen.guidance_from * base.guidance_from,
    }
    return base.model_copy(update=options), min(MAX_STEPS, max(1, round(chosen.steps * its_steps)))
