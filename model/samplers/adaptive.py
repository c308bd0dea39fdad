"""Adaptive: each patch is evaluated when its own path bends too much to be extrapolated, and finishes when it can."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.device import upload
from model.samplers.base import Sampler, State, require
from model.samplers.track import Track
from model.types import Plan, Prediction

CALIBRATION = 0.5
"""Measured error of a leap to t = 1, over the geometric mean of what the path's bend and the network's own
uncertainty predict of it; either alone is off by a factor that changes with t. `model.evaluation.leap` measures it,
and docs/samplers.md has what came out."""
MAX_REACH = 0.5
"""Kept keys and values are not extrapolated further than this, in units of what lay between the last two. Further is
worse: beside neighbours that are shown so, patches come out mottled."""


@dataclass(frozen=True)
class AdaptiveState(State):
    """Adds what is known of each patch's path, and what is to be evaluated next."""

    conditional: Track | None = None
    """Velocity of the conditional branch; None before the first evaluation."""
    delta: Track | None = None
    """Conditional less null velocity, which guidance adds s − 1 times; None before the null branch first ran."""
    leap: Tensor | None = None
    """``(P, D)``: mean velocity on which finished patches went to t = 1."""
    due: Tensor | None = None
    """``(a,)`` long: the patches to evaluate next; None: all."""
    null_due: Tensor | None = None
    """``(a_n,)`` long: which of them in the null branch too; None: all."""
    begin: float = 0.0
    """Where patches that are not known stood at the start."""
    known: Tensor | None = None
    """``(P,)`` bool: patches given from the start, at t = 1; None if there are none."""


@dataclass(frozen=True)
class Adaptive(Sampler[AdaptiveState]):
    """Multistep, early finish and selective guidance, all by one rule: is the error of extrapolating small enough?

    Every patch keeps its last velocities, per guidance branch, and moves on the line through two of them (order 2 with
    unequal steps, Adams-Bashforth 2) or on the latest (order 1, Euler). One more tells how much its path bends, which
    predicts the error of going on without a new evaluation. Where that is small over one step, the patch is skipped;
    where it is small all the way to t = 1, together with the error ``(1 − t)·σ`` that the network itself expects, the
    patch finishes: it leaps there and is never evaluated again. Whatever is not evaluated shows the others keys and
    values that are extrapolated as its velocity is, at the time that all have reached. So finished patches do not lead:
    models have hardly seen clean patches among noisy ones, and in our trials such context cost more than finishing
    saved.

    Grid point k lies at ``(k / steps)^exponent``. With both tolerances at 0 this is `Multistep`, or `Euler`.
    """

    exponent: float = 1.0
    order: int = 2
    """Of extrapolation, 1 or 2. In a handful of steps the lower order makes the better pictures, in many the higher."""
    tolerance: float = 0.1
    """A patch finishes when the predicted error of going straight to t = 1 is below it, in units of the latents'
    standard deviation."""
    skip_tolerance: float = 0.01
    """A patch, or its null branch, is not evaluated in a step whose predicted error is below it; same units."""
    guidance_from: float = 0.0
    guidance_until: float = 1.0
    """Guidance acts in the steps whose middle lies from the one up to the other; in others, only the conditional branch
    runs."""
    refresh: int = 0
    """Every so many steps every patch is evaluated, so that finished and known ones show the others fresh keys and
    values; 0: only in the first step."""
    exact: bool = False
    """Evaluate every patch and branch in every step, finished ones too: for comparison."""

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

    def start_from(self, noise: Tensor, clean: Tensor, times: Tensor) -> AdaptiveState:
        known = times >= 1
        begin = round(float(times.min()), 6)  # as it was meant before float32: else 0.7 lies just before 0.7's step
        placed = torch.where(known, 1.0, begin)
        return replace(
            self.start(noise),
            x=torch.lerp(noise, clean, placed[:, None]),
            times=placed,
            estimate=clean,
            begin=begin,
            step=max(step for step in range(self.steps + 1) if self.time(step) <= begin),
            known=known if bool(known.any()) else None,
        )

    def plan(self, state: AdaptiveState) -> Plan | None:
        if state.step == self.steps:
            return None
        time = self._at(state, state.step)
        guided = self._guides(time, self.time(state.step + 1))
        times: tuple[float, ...] = (time,)
        index = None
        if state.known is not None and state.due is None:
            times, index = (time, 1.0), state.known.long()
            # Both branches' keys and values of known patches, once and for all, even if guidance acts only later.
            guided = self.guidance != 1 and max(time, self.guidance_from) < self.guidance_until
        wants_null = guided and (state.null_due is None or state.null_due.numel() > 0)
        return Plan(
            latent=state.x if state.due is not None else self._on_the_way(state, time),
            times=times,
            time_index=index,
            patches=state.due,
            guidance=self.guidance if wants_null else 1.0,
            null_index=state.null_due if wants_null else None,
            keep=not self.exact,
            drift=None if state.due is None else self._drift(state, time),
        )

    def advance(self, state: AdaptiveState, prediction: Prediction) -> AdaptiveState:
        return self._look(self._move(self._finish(self._record(state, prediction))))

    def answer(self, state: AdaptiveState, answer: Tensor) -> AdaptiveState:
        left, due, null = answer
        state = replace(state, question=None)
        if not left.any():
            return replace(state, step=self.steps)
        unknown = state.conditional is None or (state.delta is None and self._guides_next(state))
        renewed = self.refresh > 0 and state.step % self.refresh == 0
        if renewed or unknown:
            return replace(state, due=None, null_due=None)
        patches = due.nonzero()[:, 0]
        if not len(patches):
            return self._look(self._move(state))
        nulls = null[patches].nonzero()[:, 0]
        return replace(state, due=upload(patches, state.x.device), null_due=upload(nulls, state.x.device))

    def _at(self, state: AdaptiveState, step: int) -> float:
        return max(state.begin, self.time(step))

    def _record(self, state: AdaptiveState, prediction: Prediction) -> AdaptiveState:
        """Take what the plan's patches were found to be doing."""
        time = self._at(state, state.step)
        patches = torch.arange(self.grid.patches, device=state.x.device) if state.due is None else state.due
        conditional = state.conditional or Track.begin(state.x)
        delta = state.delta
        if prediction.null is not None:
            index = slice(None) if state.null_due is None else state.null_due
            difference = prediction.conditional[index] - prediction.null
            delta = (delta or Track.begin(state.x)).record(patches[index], difference, time)
        return replace(
            state,
            conditional=conditional.record(patches, prediction.conditional, time),
            delta=delta,
            difficulty=state.difficulty.index_copy(0, patches, prediction.variance),
            evaluations=state.evaluations + 1,
        )

    def _finish(self, state: AdaptiveState) -> AdaptiveState:
        """Let the patches leap to t = 1 that were just evaluated and for which this is good enough."""
        time = self._at(state, state.step)
        going = state.times < 1
        displacement = self._leap(state, time)
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
        )

    def _leap(self, state: AdaptiveState, time: float) -> Tensor:
        """``(P, D)``: how far it is from ``time`` to t = 1. Guidance acts in the step ahead only: what it would add
        after the next evaluation has little to do with what it adds now, and in part takes that back."""
        if state.conditional is None:
            return torch.zeros_like(state.x)
        ahead = (1 - time) * state.conditional.extrapolate((time + 1) / 2, self.order)
        return ahead + self._push(state, time, self.time(state.step + 1))

    def leap_errors(self, state: AdaptiveState, time: float) -> tuple[Tensor, Tensor]:
        """``(P,)`` each: the error of leaping from ``time`` to t = 1 that a patch's path, by its bend, and the network,
        by its variance, let expect; root mean squares."""
        bend = torch.full_like(state.times, torch.inf)
        if state.conditional is not None:
            bend = state.conditional.error(time, 1.0, self.order) + self._unguided_error(state, time)
        return bend, (1 - time) * state.difficulty.sqrt()

    def _unguided_error(self, state: AdaptiveState, time: float) -> Tensor:
        """``(P,)``: of all that guidance has yet to add after ``time``, how much a leap may get wrong; as much as it
        adds now, where too few evaluations tell more."""
        low, high = max(time, self.guidance_from), self.guidance_until
        if self.guidance == 1 or low >= high:
            return torch.zeros_like(state.times)
        if state.delta is None:
            return torch.full_like(state.times, torch.inf)
        error = state.delta.error(low, high, self.order)
        return abs(self.guidance - 1) * torch.where(error.isinf(), state.delta.size(low, high), error)

    def _move(self, state: AdaptiveState) -> AdaptiveState:
        """One step on what is known, for every patch that has not finished."""
        start, end = self._at(state, state.step), self.time(state.step + 1)
        going = state.times < 1
        moved = state.x + self._displacement(state, start, end)
        return replace(
            state,
            x=torch.where(going[:, None], moved, state.x),
            times=torch.where(going, end, state.times),
            step=state.step + 1,
        )

    def _look(self, state: AdaptiveState) -> AdaptiveState:
        """Ask what has to be evaluated before the next step: which patches are left, which of them are due, and which
        of those in the null branch too."""
        if state.step == self.steps:
            return state
        if self.exact:
            return replace(state, due=None, null_due=None)
        start, end = self._at(state, state.step), self.time(state.step + 1)
        going = state.times < 1
        due = null = going
        if state.conditional is not None:
            due = null = going & (state.conditional.error(start, end, self.order) >= self.skip_tolerance)
        if state.delta is not None and self._guides(start, end):
            # Where a delta is due, its velocity is too: the two are known of the same moment only.
            null = going & (self._push_error(state, start, end) >= self.skip_tolerance)
            due = due | null
        return replace(state, question=torch.stack([going, due, null]))

    def _guides_next(self, state: AdaptiveState) -> bool:
        """Does guidance act in the step ahead?"""
        return self._guides(self._at(state, state.step), self.time(state.step + 1))

    def _guides(self, start: float, end: float) -> bool:
        """Does guidance act in this step?"""
        return self.guidance != 1 and self.guidance_from <= (start + end) / 2 < self.guidance_until

    def _displacement(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """``(P, D)``: how far the known velocities carry each patch in the step from ``start`` to ``end``.

        Guidance's ``v_u + s·(v_c − v_u)`` is taken as ``v_c + (s − 1)·(v_c − v_u)``, each on a line of its own.
        """
        if state.conditional is None:
            return torch.zeros_like(state.x)
        moved = (end - start) * state.conditional.extrapolate((start + end) / 2, self.order)
        return moved + self._push(state, start, end)

    def _push(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """``(P, D)``: what guidance adds in the step from ``start`` to ``end``."""
        if state.delta is None or not self._guides(start, end):
            return torch.zeros_like(state.x)
        return (self.guidance - 1) * (end - start) * state.delta.extrapolate((start + end) / 2, self.order)

    def _push_error(self, state: AdaptiveState, start: float, end: float) -> Tensor:
        """``(P,)``: predicted error of `_push`, root mean square over a patch's values."""
        if state.delta is None or not self._guides(start, end):
            return torch.zeros_like(state.times)
        return abs(self.guidance - 1) * state.delta.error(start, end, self.order)

    def _on_the_way(self, state: AdaptiveState, time: float) -> Tensor:
        """``(P, D)``: the state, but finished patches where they would be at ``time``; known ones stay clean."""
        if state.leap is None:
            return state.x
        finished = state.times >= 1
        if state.known is not None:
            finished = finished & ~state.known
        return torch.where(finished[:, None], state.x - (1 - time) * state.leap, state.x)

    def _drift(self, state: AdaptiveState, time: float) -> Tensor | None:
        """``(2, P)``: see `Plan.drift`."""
        if state.conditional is None or state.due is None:
            return None
        nulls = state.due if state.null_due is None else state.due[state.null_due]
        rows = []
        for track, shown in ((state.delta, nulls), (state.conditional, state.due)):
            row = torch.zeros_like(state.times) if track is None else track.reach(time).clamp(max=MAX_REACH)
            row = row.index_fill(0, shown, 0.0)
            rows.append(row if state.known is None else row.masked_fill(state.known, 0.0))
        return torch.stack(rows)
