"""The samplers that requests can name, their options, and the quality presets."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from patchforge.service.messages.base import Request

MAX_STEPS = 200
MAX_TOLERANCE = 10.0


class Adaptive(Request):
    """Evaluates a patch when extrapolating its path would be too inaccurate, and finishes it as early as possible.

    Tolerances are in units of the latents' standard deviation. If both are 0, this is `multistep`,
    or `euler` if `order` is 1.
    """

    name: Literal["adaptive"] = "adaptive"
    exponent: float = Field(1.0, ge=0.25, le=4, description="Above 1, steps are finer near noise.")
    order: int = Field(2, ge=1, le=2, description="Order of extrapolation: 1 suits few steps, 2 suits more.")
    tolerance: float = Field(
        0.1, ge=0, le=MAX_TOLERANCE, description="A patch finishes when its predicted error is below this."
    )
    skip_tolerance: float = Field(
        0.01, ge=0, le=10, description="A patch is not evaluated in a step whose predicted error is below this."
    )
    guidance_from: float = Field(
        0.0, ge=0, le=1, description="Guidance acts in steps whose middle is at this timestep or later."
    )
    guidance_until: float = Field(
        1.0, ge=0, le=1, description="Guidance acts in steps whose middle is before this timestep."
    )
    refresh: int = Field(0, ge=0, le=200, description="Evaluate all patches every `refresh` steps; 0 = never again.")
    exact: bool = Field(False, description="Evaluate every patch in every step, for comparison.")
    small_until: float = Field(
        0.0,
        ge=0,
        le=0.95,
        exclude_if=lambda time: time == 0,
        description="Until this timestep, steps are taken at half the size, on a quarter of the patches; then the "
        "picture is enlarged and refined. 0 = never. Passed over where the model does not draw half the size, and when "
        "a picture is edited.",
    )


class Euler(Request):
    """All patches together, in uniform steps."""

    name: Literal["euler"] = "euler"


class DualLoop(Request):
    """Easy patches take whole steps, hard patches take `inner_steps` small ones (paper: dual-loop).

    With `exact`, every inner step evaluates all patches, like the paper's reference. Otherwise inner steps evaluate
    only the hard patches, and use cached keys and values for the easy ones.
    """

    name: Literal["dual_loop"] = "dual_loop"
    quantile: float = Field(0.4, ge=0, le=1, description="Share of patches counted as easy.")
    inner_steps: int = Field(4, ge=1, le=16)
    exact: bool = False


class Heun(Request):
    """All patches together, with two evaluations per step: a second-order method."""

    name: Literal["heun"] = "heun"


class LookAhead(Request):
    """Predicts hard patches with easy patches moved ahead, as a cleaner context (paper: look-ahead)."""

    name: Literal["look_ahead"] = "look_ahead"
    quantile: float = Field(0.4, ge=0, le=1, description="Share of patches counted as easy.")
    ratio: float = Field(1.4, ge=1, le=4, description="How far ahead the easy context is moved.")


class Multistep(Request):
    """All patches together, with a second-order method: the uniform baseline. 8 to 12 steps are enough."""

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
    """How a preset changes a model's defaults."""

    steps: float
    """Multiplier for the model's default steps."""
    tolerance: float
    """Multiplier for the model's default tolerance."""
    order: int | None = None
    """Replaces the model's order, unless None."""
    guidance_from: float = 1.0
    """Multiplier for `guidance_from`. Guidance harms the first steps; with more steps, these are over earlier."""


PRESETS: dict[Quality, Preset] = {
    Quality.DRAFT: Preset(0.75, 1.5),
    Quality.STANDARD: Preset(1, 1),
    Quality.HIGH: Preset(2, 0.25, order=2, guidance_from=0.5),
}
UNTUNED = Adaptive(tolerance=0.2), 8
"""Sampler and steps that presets start from if the model's default is another sampler, for which nothing was tuned."""


def preset(quality: Quality, usual: Sampler, steps: int) -> tuple[Adaptive, int]:
    """Returns a preset's sampler and steps, for a model whose defaults are `usual` and `steps`."""
    base, its_steps = (usual, steps) if isinstance(usual, Adaptive) else UNTUNED
    chosen = PRESETS[quality]
    options = {
        "order": chosen.order or base.order,
        "tolerance": min(MAX_TOLERANCE, round(chosen.tolerance * base.tolerance, 6)),
        "guidance_from": chosen.guidance_from * base.guidance_from,
    }
    return base.model_copy(update=options), min(MAX_STEPS, max(1, round(chosen.steps * its_steps)))
