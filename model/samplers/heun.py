"""Heun: all patches move together, two evaluations per step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from patchforge.model.samplers.base import Sampler, State, estimate
from patchforge.model.types import Plan, Prediction


@dataclass(frozen=True)
class HeunState(State):
    """Adds the result of a step's first evaluation."""

    velocity: Tensor | None = None
    """`(P, D)`: velocity at the start of the step. None: before the first evaluation."""


@dataclass(frozen=True)
class Heun(Sampler[HeunState]):
    """Second order: the mean of the velocities at both ends of a step.

    The last step is an Euler step, because at t = 1 there is nothing left to predict.
    """

    @property
    def evaluations(self) -> int:
        return 2 * self.steps - 1

    def start(self, noise: Tensor) -> HeunState:
        return HeunState.initial(noise)

    def plan(self, state: HeunState) -> Plan | None:
        if state.step == self.steps:
            return None
        if state.velocity is None:
            return Plan(state.x, (self.time(state.step),), guidance=self.guidance)
        ahead = state.x + state.velocity / self.steps
        return Plan(ahead, (self.time(state.step + 1),), guidance=self.guidance)

    def advance(self, state: HeunState, prediction: Prediction) -> HeunState:
        begun = replace(state, evaluations=state.evaluations + 1, difficulty=prediction.difficulty)
        if state.velocity is None and state.step < self.steps - 1:
            seen = estimate(state.x, self.time(state.step), prediction.velocity)
            return replace(begun, velocity=prediction.velocity, estimate=seen)
        velocity = prediction.velocity
        if state.velocity is not None:
            velocity = (state.velocity + prediction.velocity) / 2
        return replace(
            begun,
            x=state.x + velocity / self.steps,
            times=state.times.new_full(state.times.shape, self.time(state.step + 1)),
            estimate=estimate(state.x, self.time(state.step), velocity),
            step=state.step + 1,
            velocity=None,
        )
