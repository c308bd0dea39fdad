"""Adaptive: a patch is evaluated only when extrapolating its path would be too wrong, and finishes when it can."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from patchforge.model.device import upload
from patchforge.model.samplers.base import Sampler, State, require
from patchforge.model.samplers.track import Track
from patchforge.model.types import Plan, Prediction

CALIBRATION = 0.5
"""Measured error of a leap to t = 1 ÷ geometric mean of two predictions of it: from the path's bend, and from the
network's own uncertainty. Each prediction alone is wrong by a factor that changes with t. `experiments.leap` measures
this; docs/samplers.md shows the results."""
MAX_REACH = 0.5
"""Limit for the extrapolation of cached keys and values, in units of the change between the last two evaluations. With
larger values, patches beside extrapolated neighbours look mottled."""


@dataclass(frozen=True)
class AdaptiveState(State):
    """Adds what is known about each patch's path, and what to evaluate next."""

    conditional: Track | None = None
    """Velocities of the conditional branch. None: before the first evaluation."""
    delta: Track | None = None
    """Differences, conditional − null velocity; guidance adds them s − 1 times. None: the null branch has not run."""
    leap: Tensor | None = None
    """`(P, D)`: mean velocity with which finished patches leapt to t = 1."""
    leap_error: Tensor | None = None
    """`(P,)`: the predicted error of these leaps; 0 for all other patches."""
    due: Tensor | None = None
    """`(a,)` long: the patches to evaluate next. None: all."""
    null_due: Tensor | None = None
    """`(a_n,)` long: which of them to evaluate in the null branch too. None: all."""
    begin: float = 0.0
    """Start time of the patches that are not known."""
    known: Tensor | None = None
    """`(P,)` bool: patches that were given at the start, at t = 1. None: there are none."""
    kept: Tensor | None = None
    """`(P, D)` bool: values that arrive at those of the given picture, whatever the network predicts. None: none do."""
    kept_velocity: Tensor | None = None
    """`(P, D)`: the velocity that takes them there."""


@dataclass(frozen=True)
class Adaptive(Sampler[AdaptiveState]):
    """Multistep, early finish and selective guidance. One rule decides all: is the extrapolation error small enough?

    Each patch keeps its last velocities, per guidance branch. It moves along the line through the last two (order 2:
    Adams–Bashforth 2 with unequal steps) or along the latest (order 1: Euler). One more velocity shows how much the
    path bends, and the bend predicts the error of going on without a new evaluation.

    - If this error is small over the next step, the patch is skipped in that step.
    - If it is small all the way to t = 1, combined with the error `(1 − t)·σ` that the network itself expects, the
      patch finishes: it leaps to t = 1 and is never evaluated again.

    Patches that are not evaluated show the others extrapolated keys and values, for the time that all patches have
    reached. So finished patches are not shown as clean: models have rarely seen clean patches among noisy ones, and in
    our trials such context cost more than early finish saved.

    Step k starts at time `(k / steps)^exponent`. With both tolerances at 0 this is `Multistep`, or `Euler` for order 1.
    """

    exponent: float = 1.0
    order: int = 2
    """Order of extrapolation, 1 or 2. Order 1 gives better pictures in few steps, order 2 in many."""
    tolerance: float = 0.1
    """A patch finishes when the predicted error of a leap to t = 1 is below this, in units of the latents' standard
    deviation."""
    skip_tolerance: float = 0.01
    """A patch, or its null branch, is skipped in a step whose predicted error is below this; same units."""
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    """Guidance acts in steps whose middle lies in `[guidance_from, guidance_until)`. In other steps only the
    conditional branch runs."""
    refresh: int = 0
    """Evaluate every patch once in this many steps, so that finished and known patches show the others fresh keys and
    values. 0: only in the first step."""
    exact: bool = False
    """Evaluate every patch and branch in every step, also finished patches. For comparisons."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.25 <= self.exponent <= 4, "exponent", "must be between 0.25 and 4")
        require(self.order in (1, 2), "order", "must be 1 or 2")
        require(0 <= self.tolerance <= 10, "tolerance", "must be between 0 and 10")
        require(0 <= self.skip_tolerance <= 10, "skip_tolerance", "must be between 0 and 10")
        require(0 <= self.guidance_from <= 1, "guidance_from", "must be between 0 and 1")
        require(0 <= self.guidance_until <= 1, "guidance_until", "must be between 0 and 1")
        require(self.refresh >= 0, "refresh", "must not be negative")

    @property
    def evaluations(self) -> int:
        return self.steps

    def time(self, step: int) -> float:
        return float((step / self.steps) ** self.exponent)

    def start(self, noise: Tensor) -> AdaptiveState:
        return AdaptiveState.initial(noise)

    def start_from(self, noise: Tensor, clean: Tensor, times: Tensor, kept: Tensor | None = None) -> AdaptiveState:
        known = times >= 1
        begin = round(float(times.min()), 6)  # undo float32 rounding, or 0.7 would lie just before the step at 0.7
        placed = torch.where(known, 1.0, begin)
        return replace(
            self.start(noise),
            x=torch.lerp(noise, clean, placed[:, None]),
            times=placed,
            estimate=clean,
            begin=begin,
            step=max(step for step in range(self.steps + 1) if self.time(step) <= begin),
            known=known if bool(known.any()) else None,
            kept=kept,
            kept_velocity=None if kept is None else clean - noise,
        )

    def plan(self, state: AdaptiveState) -> Plan | None:
        if state.step == self.steps:
            return None
        time = self._start_time(state, state.step)
        guided = self._guided(time, self.time(state.step + 1))
        times: tuple[float, ...] = (time,)
        index = None
        if state.known is not None and state.due is None:
            times, index = (time, 1.0), state.known.long()
            # The first plan caches the known patches in both branches, even if guidance acts only later.
            guided = self.guidance != 1 and max(time, self.guidance_from) < self.guidance_until
        wants_null = guided and (state.null_due is None or state.null_due.numel() > 0)
        return Plan(
            latent=state.x if state.due is not None else self._shown_latent(state, time),
            times=times,
            time_index=index,
            patches=state.due,
            guidance=self.guidance if wants_null else 1.0,
            null_index=state.null_due if wants_null else None,
            keep=not self.exact,
            drift=None if state.due is None else self._cache_drift(state, time),
        )

    def advance(self, state: AdaptiveState, prediction: Prediction) -> AdaptiveState:
        return self._ask_what_is_due(
            self._step_patches(self._finish_patches(self._record_prediction(state, prediction)))
        )

    def answer(self, state: AdaptiveState, answer: Tensor) -> AdaptiveState:
        left, due, null = answer
        state = replace(state, question=None)
        if not left.any():
            return replace(state, step=self.steps)
        unknown = state.conditional is None or (state.delta is None and self._guided_next(state))
        renewed = self.refresh > 0 and state.step % self.refresh == 0
        if renewed or unknown:
            return replace(state, due=None, null_due=None)
        patches = due.nonzero()[:, 0]
        if not len(patches):
            return self._ask_what_is_due(self._step_patches(state))
        nulls = null[patches].nonzero()[:, 0]
        return replace(state, due=upload(patches, state.x.device), null_due=upload(nulls, state.x.device))

    def landing_error(self, state: AdaptiveState) -> Tensor:
        """As in `Sampler`, from the network's variance and, where it is known, from the bend of the path."""
        if state.conditional is None:
            return super().landing_error(state)
        # The estimate is of the last evaluation, which is where the patch stood before it moved on.
        time = float(state.conditional.at.nan_to_num().max())
        bend, expected = self.leap_errors(state, time)
        both = torch.where(bend.isinf(), expected, CALIBRATION * (bend * expected).sqrt())
        return torch.where(state.times < 1, both, 0.0)

    def finish_error(self, state: AdaptiveState) -> Tensor:
        return super().finish_error(state) if state.leap_error is None else state.leap_error

    def costs_ahead(self, state: AdaptiveState, unfinished: int) -> list[int]:
        costs = []
        for step in range(state.step, self.steps):
            guided = self._guided(self._start_time(state, step), self.time(step + 1))
            costs.append(unfinished * (2 if guided else 1))
        return costs

    def shorten(
        self, state: AdaptiveState, steps: int, tolerance: float | None = None
    ) -> tuple[Self, AdaptiveState] | None:
        """Take the rest of the way in `steps` steps: from noise with the same exponent, later of equal length."""
        sampler = self if tolerance is None else replace(self, tolerance=tolerance)
        begin = self._start_time(state, state.step)
        if begin == 0:
            return replace(sampler, steps=steps), state
        if steps == self.steps - state.step:
            return sampler, state
        whole, done = max(_grids(begin, steps))
        sampler = replace(sampler, steps=whole, exponent=1.0)
        moved = replace(state, step=done, begin=begin, question=None)
        if state.evaluations == 0:
            return sampler, moved
        return sampler, sampler._ask_what_is_due(moved)

    def _start_time(self, state: AdaptiveState, step: int) -> float:
        return max(state.begin, self.time(step))

    def _record_prediction(self, state: AdaptiveState, prediction: Prediction) -> AdaptiveState:
        """Record the velocities and variances of the evaluated patches."""
        time = self._start_time(state, state.step)
        patches = torch.arange(self.grid.patches, device=state.x.device) if state.due is None else state.due
        conditional, velocity = state.conditional or Track.begin(state.x), prediction.conditional
        if state.kept is not None and state.kept_velocity is not None:
            velocity = torch.where(state.kept[patches], state.kept_velocity[patches], velocity)
        delta = state.delta
        if prediction.null is not None:
            index = slice(None) if state.null_due is None else state.null_due
            difference = prediction.conditional[index] - prediction.null
            if state.kept is not None:
                difference = difference.masked_fill(state.kept[patches[index]], 0.0)
            delta = (delta or Track.begin(state.x)).record(patches[index], difference, time)
        return replace(
            state,
            conditional=conditional.record(patches, velocity, time),
            delta=delta,
            difficulty=state.difficulty.index_copy(0, patches, prediction.variance),
            evaluations=state.evaluations + 1,
        )

    def _finish_patches(self, state: AdaptiveState) -> AdaptiveState:
        """Move the patches that were just evaluated to t = 1 if the predicted error is small enough."""
        time = self._start_time(state, state.step)
        going = state.times < 1
        displacement = self._leap_displacement(state, time)
        seen = torch.where(going[:, None], state.x + displacement, state.x)
        state = replace(state, estimate=seen)
        if self.tolerance == 0 or state.conditional is None:
            return state
        bend, expected = self.leap_errors(state, time)
        error = CALIBRATION * (bend * expected).sqrt()
        leaping = going & (state.conditional.at == time) & (error < self.tolerance)
        leap = torch.zeros_like(state.x) if state.leap is None else state.leap
        return replace(
            state,
            x=torch.where(leaping[:, None], seen, state.x),
            times=torch.where(leaping, 1.0, state.times),
            leap=torch.where(leaping[:, None], displacement / (1 - time), leap),
            leap_error=torch.where(leaping, error, self.finish_error(state)),
        )

    def _leap_displacement(self, state: AdaptiveState, time: float) -> Tensor:
        """`(P, D)`: the displacement of a leap from `time` to t = 1. It includes guidance for the next step only: what
        guidance adds later has little to do with what it adds now, and partly cancels it."""
        if state.conditional is None:
            return torch.zeros_like(state.x)
        ahead = (1 - time) * state.conditional.extrapolate((time + 1) / 2, self.order)
        return ahead + self._guidance_displacement(state, time, self.time(state.step + 1))

    def leap_errors(self, state: AdaptiveState, time: float) -> tuple[Tensor, Tensor]:
        """Two predictions of the error of a leap from `time` to t = 1, `(P,)` each, as root mean squares: from the bend
        of the path, and from the network's variance."""
        bend = torch.full_like(state.times, torch.inf)
        if state.conditional is not None:
            bend = state.conditional.error(time, 1.0, self.order) + self._future_guidance_error(state, time)
        return bend, (1 - time) * state.difficulty.sqrt()

    def _future_guidance_error(self, state: AdaptiveState, time: float) -> Tensor:
        """`(P,)`: predicted error of a leap in what guidance would still add after `time`. With too few evaluations to
        predict it, this is all that guidance would add at its present strength."""
        low, high = max(time, self.guidance_from), self.guidance_until
        if self.guidance == 1 or low >= high:
            return torch.zeros_like(state.times)
        if state.delta is None:
            return torch.full_like(state.times, torch.inf)
        error = state.delta.error(low, high, self.order)
        return abs(self.guidance - 1) * torch.where(error.isinf(), state.delta.size(low, high), error)

    def _step_patches(self, state: AdaptiveState) -> AdaptiveState:
        """Move every unfinished patch by one step, on its known velocities."""
        start, end = self._start_time(state, state.step), self.time(state.step + 1)
        going = state.times < 1
        moved = state.x + self._step_displacement(state, start, end)
        return replace(
            state,
            x=torch.where(going[:, None], moved, state.x),
            times=torch.where(going, end, state.times),
            step=state.step + 1,
        )

    def _ask_what_is_due(self, state: AdaptiveState) -> AdaptiveState:
        """Ask the device what the next step needs: which patches are unfinished, which of them must be evaluated, and
        which of these in the null branch too."""
        if state.step == self.steps:
            return state
        if self.exact:
            return replace(state, due=None, null_due=None)
        start, end = self._start_time(state, state.step), self.time(state.step + 1)
        going = state.times < 1
        due = null = going
        if state.conditional is not None:
            due = null = going & (state.conditional.error(start, end, self.order) >= self.skip_tolerance)
        if state.delta is not None and self._guided(start, end):
            # A new difference needs a new conditional velocity too: both come from the same evaluation.
            null = going & (self._guidance_error(state, start, end) >= self.skip_tolerance)
            due = due | null
        return replace(state, question=torch.stack([going, due, null]))

    def _guided_next(self, state: AdaptiveState) -> bool:
        """Does guidance act in the next step?"""
        return self._guided(self._start_time(state, state.step), self.time(state.step + 1))

    def _guided(self, start: float, end: float) -> bool:
        """Does guidance act in this step?"""
        return self.guidance != 1 and self.guidance_from <= (start + end) / 2 < self.guidance_until

    def _step_displacement(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """`(P, D)`: the displacement of each patch in the step from `start` to `end`.

        Guidance's `v_u + s·(v_c − v_u)` equals `v_c + (s − 1)·(v_c − v_u)`. Both terms are extrapolated separately.
        """
        if state.conditional is None:
            return torch.zeros_like(state.x)
        moved = (end - start) * state.conditional.extrapolate((start + end) / 2, self.order)
        return moved + self._guidance_displacement(state, start, end)

    def _guidance_displacement(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """`(P, D)`: what guidance adds to the displacement from `start` to `end`."""
        if state.delta is None or not self._guided(start, end):
            return torch.zeros_like(state.x)
        return (self.guidance - 1) * (end - start) * state.delta.extrapolate((start + end) / 2, self.order)

    def _guidance_error(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """`(P,)`: predicted error of `_guidance_displacement`, root mean square over a patch's values."""
        if state.delta is None or not self._guided(start, end):
            return torch.zeros_like(state.times)
        return abs(self.guidance - 1) * state.delta.error(start, end, self.order)

    def _shown_latent(self, state: AdaptiveState, time: float) -> Tensor:
        """The latent to show the network, `(P, D)`: finished patches as they would be at `time`, known ones clean."""
        if state.leap is None:
            return state.x
        finished = state.times >= 1
        if state.known is not None:
            finished = finished & ~state.known
        return torch.where(finished[:, None], state.x - (1 - time) * state.leap, state.x)

    def _cache_drift(self, state: AdaptiveState, time: float) -> Tensor | None:
        """The plan's `drift`, `(2, P)`."""
        if state.conditional is None or state.due is None:
            return None
        nulls = state.due if state.null_due is None else state.due[state.null_due]
        rows = []
        for track, shown in ((state.delta, nulls), (state.conditional, state.due)):
            row = torch.zeros_like(state.times) if track is None else track.reach(time).clamp(max=MAX_REACH)
            row = row.index_fill(0, shown, 0.0)
            rows.append(row if state.known is None else row.masked_fill(state.known, 0.0))
        return torch.stack(rows)


def _grids(begin: float, left: int) -> Iterator[tuple[int, int]]:
    """Grids of equal steps on [0, 1] of which at most `left` end after `begin`: (steps, steps that are done)."""
    for steps in range(1, math.ceil((left + 1) / (1 - begin)) + 1):
        done = math.floor(begin * steps + 1e-6)
        if steps - done <= left:
            yield steps, done
