"""Euler: all patches move together, one evaluation per step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from patchforge.model.samplers.base import Sampler, State, estimate
from patchforge.model.types import Plan, Prediction


@dataclass(frozen=True)
class Euler(Sampler[State]):
    """`x += dt·v` for all patches (spec §6)."""

    @property
    def evaluations(self) -> int:
        return self.steps

    def start(self, noise: Tensor) -> State:
        return State.initial(noise)

    def plan(self, state: State) -> Plan | None:
        if state.step == self.steps:
            return None
        return Plan(state.x, (self.time(state.step),), guidance=self.guidance)

    def advance(self, state: State, prediction: Prediction) -> State:
        return replace(
            state,
            x=state.x + prediction.velocity / self.steps,
            times=state.times.new_full(state.times.shape, self.time(state.step + 1)),
            estimate=estimate(state.x, self.time(state.step), prediction.velocity),
            difficulty=prediction.difficulty,
            step=state.step + 1,
            evaluations=state.evaluations + 1,
        )
