"""Look-ahead: hard patches are predicted beside easy patches that were moved ahead, as a cleaner context."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchforge.model.samplers.base import Sampler, State, easy_patches, estimate, require
from patchforge.model.types import Plan, Prediction

EARLY = 0.05  # up to this time, a step is an Euler step on the conditional velocity


@dataclass(frozen=True)
class LookAheadState(State):
    """Adds the result of a step's first evaluation."""

    first: Prediction | None = None
    easy: Tensor | None = None
    """`(P,)` bool: the easy patches, for both the context and the update."""


@dataclass(frozen=True)
class LookAhead(Sampler[LookAheadState]):
    """The paper's look-ahead sampler (spec §6). Early steps do not use the null branch, so they do not run it."""

    quantile: float = 0.4
    ratio: float = 1.4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.quantile <= 1, "quantile", "must be between 0 and 1")
        require(self.ratio >= 1, "ratio", "must be at least 1")

    @property
    def evaluations(self) -> int:
        return sum(1 if self.time(step) <= EARLY else 2 for step in range(self.steps))

    def start(self, noise: Tensor) -> LookAheadState:
        return LookAheadState.initial(noise)

    def plan(self, state: LookAheadState) -> Plan | None:
        if state.step == self.steps:
            return None
        time = self.time(state.step)
        if state.first is None or state.easy is None:
            return Plan(state.x, (time,), guidance=1.0 if time <= EARLY else self.guidance)
        ahead = min(self.ratio * time, 1.0)
        context = state.x + (ahead - time) * state.first.conditional
        latent = torch.where(state.easy[:, None], context, state.x)
        return Plan(latent, (time, ahead), state.easy.long(), guidance=self.guidance)

    def advance(self, state: LookAheadState, prediction: Prediction) -> LookAheadState:
        time = self.time(state.step)
        if time <= EARLY:
            return self._end_step(state, prediction.conditional, prediction.difficulty)
        if state.first is None or state.easy is None:
            easy = easy_patches(prediction, self.quantile)
            return replace(state, first=prediction, easy=easy, evaluations=state.evaluations + 1)
        velocity = torch.where(state.easy[:, None], state.first.velocity, prediction.velocity)
        return self._end_step(state, velocity, state.first.difficulty)

    def _end_step(self, state: LookAheadState, velocity: Tensor, difficulty: Tensor) -> LookAheadState:
        return replace(
            state,
            x=state.x + velocity / self.steps,
            times=state.times.new_full(state.times.shape, self.time(state.step + 1)),
            estimate=estimate(state.x, self.time(state.step), velocity),
            difficulty=difficulty,
            step=state.step + 1,
            evaluations=state.evaluations + 1,
            first=None,
            easy=None,
        )
