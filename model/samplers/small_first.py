"""Small first: what a picture shows is decided at half the size, on a quarter of the patches; then it is refined."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from patchforge.model.samplers.adaptive import Adaptive, AdaptiveState
from patchforge.model.samplers.base import State, require
from patchforge.model.types import Grid, Plan, Prediction

FEWEST_STEPS = 3
"""With fewer, the small picture would come from one step before its last, and not be worth refining."""
ROUNDING = 1e-9
"""A step this close to `small_until` counts as being there."""


@dataclass(frozen=True)
class SmallFirstState(AdaptiveState):
    """Adds the picture of half the size. Until it is enlarged, `x` is the noise."""

    small: AdaptiveState | None = None
    """None: it has been enlarged, or there is none, because a picture is edited."""
    expected: Tensor | None = None
    """`(P, D)`: the estimate of the clean picture before the last evaluation at full size; the first is the enlarged
    picture. None: it has not been enlarged."""
    lands: bool = False
    """Whether the picture is finished as soon as it is enlarged."""


@dataclass(frozen=True)
class SmallFirst(Adaptive):
    """`Adaptive`, whose steps until `small_until` are taken at half the size, where they cost a quarter.

    The last of these steps, the first at `small_until` or later, gives an estimate of the small picture. Enlarged, and
    with its noise added back as at the time of that step, it is what this and the remaining steps at full size start
    from. Near noise a model knows more of the prompt at the size where a picture has fewer patches (docs/samplers.md).
    This needs a model that was trained at half the size too.
    """

    small_until: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_small_until(self.small_until)
        require(self.grid.rows % 2 == self.grid.columns % 2 == 0, "small_until", "needs even numbers of patches")

    @cached_property
    def small(self) -> Adaptive:
        """The sampler of the small picture."""
        options = {field.name: getattr(self, field.name) for field in fields(Adaptive)}
        return Adaptive(**options | {"grid": self.grid.half})

    @property
    def last_small(self) -> int:
        """The last step that is taken at half the size. It is taken again at full size, from the same time."""
        late = (step for step in range(self.steps) if self.time(step) >= self.small_until - ROUNDING)
        return next(late, self.steps - 1)

    @property
    def evaluations(self) -> int:
        return self.steps + 1

    @property
    def dense_patch_evaluations(self) -> int:
        return self.grid.patches * self.branches * self.steps

    def start(self, noise: Tensor) -> SmallFirstState:
        # A mean of four values, scaled to the deviation of one: the small picture begins with the same noise.
        pooled = 2 * F.avg_pool2d(self.grid.unpatchify(noise)[None], 2)[0]
        small = self.small.start(self.small.grid.patchify(pooled))
        return replace(SmallFirstState.initial(noise), small=small)

    def start_from(self, noise: Tensor, clean: Tensor, times: Tensor, kept: Tensor | None = None) -> AdaptiveState:
        state = super().start_from(noise, clean, times, kept)
        assert isinstance(state, SmallFirstState)
        return replace(state, small=None)

    def plan(self, state: AdaptiveState) -> Plan | None:
        small = _small(state)
        plan = super().plan(state) if small is None else self.small.plan(small)
        return plan if small is None or plan is None else replace(plan, grid=self.small.grid)

    def advance(self, state: AdaptiveState, prediction: Prediction) -> AdaptiveState:
        small = _small(state)
        if small is None:
            return super().advance(state, prediction)
        state = replace(state, evaluations=state.evaluations + 1)
        return self._follow(state, self.small.advance(small, prediction))

    def answer(self, state: AdaptiveState, answer: Tensor) -> AdaptiveState:
        small = _small(state)
        return super().answer(state, answer) if small is None else self._follow(state, self.small.answer(small, answer))

    def _follow(self, state: AdaptiveState, small: AdaptiveState) -> AdaptiveState:
        """Show in each patch what the small picture's patch in its place has come to; at its end, have it enlarged."""
        assert isinstance(state, SmallFirstState)
        over = small.step > self.last_small
        return replace(
            state,
            small=small,
            times=self.time(self.last_small) * self._spread(small.times),
            difficulty=self._spread(small.difficulty),
            question=None if over else small.question,
            enlarge=small.estimate if over else None,
        )

    def enlarged(self, state: AdaptiveState, clean: Tensor) -> AdaptiveState:
        assert isinstance(state, SmallFirstState)
        if state.lands:
            done = torch.ones_like(state.times)
            return replace(state, x=clean, estimate=clean, times=done, small=None, enlarge=None, step=self.steps)
        begin = self.time(self.last_small)
        return replace(
            SmallFirstState.initial(state.x),
            x=torch.lerp(state.x, clean, begin),
            times=torch.full_like(state.times, begin),
            estimate=clean,
            expected=clean,
            difficulty=state.difficulty,
            begin=begin,
            step=self.last_small,
            evaluations=state.evaluations,
        )

    def _finish_patches(self, state: AdaptiveState) -> AdaptiveState:
        if isinstance(state, SmallFirstState) and state.expected is not None:
            state = replace(state, expected=state.estimate)
        return super()._finish_patches(state)

    def leap_errors(self, state: AdaptiveState, time: float) -> tuple[Tensor, Tensor]:
        """As in `Adaptive`. Where a path is too short to show its bend: how much its last evaluation changed its end.

        At first this is what the evaluation changed in the enlarged picture, so plain patches finish on their first.
        """
        bend, expected = super().leap_errors(state, time)
        if not isinstance(state, SmallFirstState) or state.expected is None:
            return bend, expected
        changed = (state.estimate - state.expected).square().mean(dim=1).sqrt()
        return torch.where(bend.isinf(), changed + self._future_guidance_error(state, time), bend), expected

    def seen(self, state: AdaptiveState) -> tuple[Tensor, Grid]:
        small = _small(state)
        return super().seen(state) if small is None else (small.estimate, self.small.grid)

    def land(self, state: AdaptiveState) -> AdaptiveState:
        small = _small(state)
        if small is None or not state.evaluations:
            return super().land(state)
        assert isinstance(state, SmallFirstState)
        return replace(state, enlarge=small.estimate, lands=True, question=None)

    def landing_error(self, state: AdaptiveState) -> Tensor:
        small = _small(state)
        return super().landing_error(state) if small is None else self._spread(self.small.landing_error(small))

    def costs_ahead(self, state: AdaptiveState, unfinished: int) -> list[int]:
        small = _small(state)
        if small is None:
            return super().costs_ahead(state, unfinished)
        before = self.small.costs_ahead(small, unfinished // 4)[: self.last_small + 1 - small.step]
        assert isinstance(state, SmallFirstState)
        later = replace(state, small=None, step=self.last_small, begin=self.time(self.last_small))
        return before + super().costs_ahead(later, unfinished)

    def until_full(self, state: State) -> int:
        """Number of evaluations to come until the first one at full size is over; 0: it is."""
        if not isinstance(state, SmallFirstState) or (state.small is None and state.expected is None):
            return 0
        if state.small is not None:
            return self.last_small + 1 - state.small.step + 1
        return 1 if state.conditional is None else 0

    def small_cost(self, patches: int) -> int:
        """Patch evaluations of the steps at half the size, at most, for a picture of so many patches."""
        guided = [self._guided(self.time(step), self.time(step + 1)) for step in range(self.last_small + 1)]
        return sum(patches // 4 * (1 + each) for each in guided)

    def shorten(
        self, state: AdaptiveState, steps: int, tolerance: float | None = None
    ) -> tuple[Self, AdaptiveState] | None:
        """As in `Adaptive`. While the picture is small: before the first evaluation, and in `FEWEST_STEPS` at least."""
        if _small(state) is None:
            return super().shorten(state, steps, tolerance)
        if state.evaluations or steps < FEWEST_STEPS:
            return None
        return replace(self, steps=steps, tolerance=self.tolerance if tolerance is None else tolerance), state

    def _spread(self, values: Tensor) -> Tensor:
        """`(P/4,)` → `(P,)`: repeat the value of each patch for the four in its place."""
        rows = values.unflatten(0, (self.small.grid.rows, self.small.grid.columns))
        return rows.repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()


def check_small_until(time: float) -> None:
    """Check the option.

    Raises:
        ParameterError: it is out of range.
    """
    require(0 <= time < 1, "small_until", "must be at least 0 and below 1")


def is_small(state: State) -> bool:
    """Tell whether a picture is still drawn at half the size."""
    return isinstance(state, SmallFirstState) and state.small is not None


def _small(state: AdaptiveState) -> AdaptiveState | None:
    return state.small if isinstance(state, SmallFirstState) else None
