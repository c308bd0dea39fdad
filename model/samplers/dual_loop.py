"""Dual-loop: easy patches take each step at once, hard patches take it in several small steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patchforge.model.device import upload
from patchforge.model.samplers.base import Sampler, State, easy_patches, estimate, require
from patchforge.model.types import Plan, Prediction


@dataclass(frozen=True)
class DualLoopState(State):
    """Adds the progress of the inner loop."""

    inner: int = 0
    """Number of evaluations done within this step."""
    easy: Tensor | None = None
    """`(P,)` bool: the easy patches, chosen after the step's first evaluation."""
    hard: Tensor | None = None
    """`(a,)` long: the hard patches, which are all others."""


@dataclass(frozen=True)
class DualLoop(Sampler[DualLoopState]):
    """The paper's dual-loop sampler (spec §6). Unless `exact`, later inner evaluations run only the hard patches.

    The first inner evaluation runs every patch, so that the cache holds the easy patches' keys and values at their new
    time. In our trials, keys and values from before the easy patches moved cost visible quality.
    """

    quantile: float = 0.4
    inner_steps: int = 4
    exact: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.quantile <= 1, "quantile", "must be between 0 and 1")
        require(self.inner_steps >= 1, "inner_steps", "must be at least 1")

    @property
    def evaluations(self) -> int:
        return self.steps * self.inner_steps

    def start(self, noise: Tensor) -> DualLoopState:
        return DualLoopState.initial(noise)

    def plan(self, state: DualLoopState) -> Plan | None:
        if state.step == self.steps:
            return None
        if state.easy is None:
            return Plan(state.x, (self.time(state.step),), guidance=self.guidance)
        if state.inner == 1 or self.exact:
            times = self.inner_time(state), self.time(state.step + 1)
            keep = not self.exact and self.inner_steps > 2
            return Plan(state.x, times, state.easy.long(), guidance=self.guidance, keep=keep)
        return Plan(state.x, (self.inner_time(state),), None, state.hard, self.guidance, keep=True)

    def advance(self, state: DualLoopState, prediction: Prediction) -> DualLoopState:
        if state.hard is None:
            return self._advance_outer(state, prediction)
        return self._advance_inner(state, state.hard, prediction)

    def answer(self, state: DualLoopState, answer: Tensor) -> DualLoopState:
        return replace(state, hard=upload(answer[0].nonzero()[:, 0], state.x.device), question=None)

    def inner_time(self, state: DualLoopState) -> float:
        """The current time of the hard patches."""
        return (state.step + state.inner / self.inner_steps) / self.steps

    def _advance_outer(self, state: DualLoopState, prediction: Prediction) -> DualLoopState:
        easy = easy_patches(prediction, self.quantile)
        stride = torch.where(easy, 1 / self.steps, 1 / (self.steps * self.inner_steps)).to(state.x.dtype)
        start = self.time(state.step)
        moved = replace(
            state,
            x=state.x + stride[:, None] * prediction.velocity,
            times=start + stride,
            estimate=estimate(state.x, start, prediction.velocity),
            difficulty=prediction.difficulty,
            inner=1,
            easy=easy,
            question=~easy[None],
            evaluations=state.evaluations + 1,
        )
        return self._end_step(moved)

    def _advance_inner(self, state: DualLoopState, hard: Tensor, prediction: Prediction) -> DualLoopState:
        velocity, difficulty = prediction.velocity, prediction.difficulty
        if velocity.shape[0] == self.grid.patches:
            velocity, difficulty = velocity[hard], difficulty[hard]
        before = state.x[hard]
        inner = replace(state, inner=state.inner + 1)
        moved = replace(
            inner,
            x=state.x.index_copy(0, hard, before + velocity / (self.steps * self.inner_steps)),
            times=state.times.index_fill(0, hard, self.inner_time(inner)),
            estimate=state.estimate.index_copy(0, hard, estimate(before, self.inner_time(state), velocity)),
            difficulty=state.difficulty.index_copy(0, hard, difficulty),
            evaluations=state.evaluations + 1,
        )
        return self._end_step(moved)

    def _end_step(self, state: DualLoopState) -> DualLoopState:
        """End the step if the hard patches have caught up."""
        if state.inner < self.inner_steps:
            return state
        end = self.time(state.step + 1)
        times = state.times.new_full(state.times.shape, end)  # exact: the small steps add rounding errors
        return replace(state, times=times, step=state.step + 1, inner=0, easy=None, hard=None, question=None)
