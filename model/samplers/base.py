"""What every sampler is: a pure state machine that plans evaluations and never runs the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor

from model.errors import ParameterError
from model.types import Grid, Plan, Prediction


@dataclass(frozen=True)
class State:
    """Where one picture stands."""

    x: Tensor
    """``(P, D)``: each patch at its own time."""
    times: Tensor
    """``(P,)``: that time; 1 is finished."""
    estimate: Tensor
    """``(P, D)``: latest one-step estimate of the clean picture, ``x_t + (1 − t)·v``."""
    difficulty: Tensor
    """``(P,)``: latest predicted variance."""
    step: int = 0
    """Whole steps done."""
    evaluations: int = 0
    """Network evaluations done."""
    question: Tensor | None = None
    """``(k, P)`` bool, on the device: what `Sampler.answer` has to be told before the next plan; None: nothing."""

    @classmethod
    def initial(cls, noise: Tensor) -> Self:
        """At t = 0, from noise ``(P, D)``."""
        patches = noise.shape[0]
        return cls(noise, noise.new_zeros(patches), torch.zeros_like(noise), noise.new_ones(patches))


S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Sampler(Generic[S]):
    """Parameters common to all samplers, on the uniform grid of ``steps`` steps.

    Raises:
        ParameterError: a parameter is out of range.
    """

    grid: Grid
    steps: int
    guidance: float

    def __post_init__(self) -> None:
        require(self.steps >= 1, "steps", "must be at least 1")
        require(self.guidance >= 0, "guidance", "must not be negative")

    @property
    def evaluations(self) -> int:
        """Network evaluations of a whole run, guidance branches not counted."""
        raise NotImplementedError

    @property
    def branches(self) -> int:
        """Guidance branches of a dense evaluation."""
        return 1 if self.guidance == 1 else 2

    @property
    def dense_patch_evaluations(self) -> int:
        """Patch evaluations of a run that evaluates every patch and branch every time, as the paper does."""
        return self.grid.patches * self.branches * self.evaluations

    def start(self, noise: Tensor) -> S:
        """State at t = 0 from noise ``(P, D)``."""
        raise NotImplementedError

    def start_from(self, noise: Tensor, clean: Tensor, times: Tensor) -> S:
        """State that begins with a picture, for editing it.

        ``clean`` ``(P, D)`` are its latents; ``times`` ``(P,)`` says how much of each patch is there: at 1 it is known
        and stays as it is, the others begin at the least of these times.

        Raises:
            ParameterError: this sampler moves all patches alike.
        """
        raise ParameterError("sampler", "cannot start from a picture; 'adaptive' can")

    def plan(self, state: S) -> Plan | None:
        """What to evaluate next; None when the picture is finished."""
        raise NotImplementedError

    def advance(self, state: S, prediction: Prediction) -> S:
        """The state after the plan's prediction came back. It may have a `State.question`."""
        raise NotImplementedError

    def answer(self, state: S, answer: Tensor) -> S:
        """The state once its question is answered: ``answer`` ``(k, P)`` bool is the same on the CPU.

        It may have another one. Apart from `advance`, so that one wait for the device can serve many pictures.
        """
        raise NotImplementedError

    def time(self, step: int) -> float:
        """Time of grid point ``step``."""
        return step / self.steps


def require(condition: bool, field: str, message: str) -> None:
    """Raise `ParameterError` for ``field`` unless ``condition`` holds (NaN never does)."""
    if not condition:
        raise ParameterError(field, message)


def easy_patches(prediction: Prediction, quantile: float) -> Tensor:
    """``(P,)`` bool: patches whose difficulty lies strictly below the picture's quantile (spec §6).

    The quantile is taken over pixels, each carrying its patch's value, which shifts the interpolation.
    """
    difficulty = prediction.difficulty.double()
    pixels = difficulty.repeat_interleave(prediction.log_variance.shape[-1])
    return difficulty < torch.quantile(pixels, quantile)


def estimate(x: Tensor, times: float | Tensor, velocity: Tensor) -> Tensor:
    """Clean patches ``(…, D)`` as seen from ``x`` at ``times`` (one for all, or ``(…,)``)."""
    ahead = 1 - times
    return x + (ahead[..., None] if isinstance(ahead, Tensor) else ahead) * velocity
