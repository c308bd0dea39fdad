"""Multistep: second order from the previous step's velocity, with one evaluation per step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from patchforge.model.samplers.base import Sampler, State, estimate, require
from patchforge.model.types import Plan, Prediction


@dataclass(frozen=True)
class MultistepState(State):
    """Adds the velocity of the previous step."""

    velocity: Tensor | None = None
    """`(P, D)`, guided. None: before the first step."""


@dataclass(frozen=True)
class Multistep(Sampler[MultistepState]):
    """Adams–Bashforth 2 for all patches together: the baseline that an adaptive sampler must beat.

    Step k starts at time `(k / steps)^exponent`. With an exponent above 1, steps near noise are finer: paths bend most
    there.
    """

    exponent: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.25 <= self.exponent <= 4, "exponent", "must be between 0.25 and 4")

    @property
    def evaluations(self) -> int:
        return self.steps

    def time(self, step: int) -> float:
        return float((step / self.steps) ** self.exponent)

    def start(self, noise: Tensor) -> MultistepState:
        return MultistepState.initial(noise)

    def plan(self, state: MultistepState) -> Plan | None:
        if state.step == self.steps:
            return None
        return Plan(state.x, (self.time(state.step),), guidance=self.guidance)

    def advance(self, state: MultistepState, prediction: Prediction) -> MultistepState:
        start, end = self.time(state.step), self.time(state.step + 1)
        velocity = middle = prediction.velocity
        if state.velocity is not None:
            before = self.time(state.step - 1)
            middle = velocity + (velocity - state.velocity) * ((end - start) / (2 * (start - before)))
        return replace(
            state,
            x=state.x + (end - start) * middle,
            times=state.times.new_full(state.times.shape, end),
            estimate=estimate(state.x, start, velocity),
            difficulty=prediction.difficulty,
            velocity=velocity,
            step=state.step + 1,
            evaluations=state.evaluations + 1,
        )
