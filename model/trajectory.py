"""A picture from noise to finish. The worker and the offline loop share this code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from patchforge.model.denoiser import Condition, Denoiser, Evaluation, Memory
from patchforge.model.errors import ParameterError
from patchforge.model.samplers import Sampler, State
from patchforge.model.types import Grid, Plan, Prediction


@dataclass(frozen=True)
class Change:
    """One departure from the path that a sampler takes by itself. The same changes repeat a picture bit for bit."""

    evaluation: int
    """Number of evaluations before it."""
    steps: int
    """Steps that the rest of the path takes; 0: the picture lands."""
    guided: bool = True
    """False: without guidance from here on."""
    tolerance: float | None = None
    """The tolerance from here on; None: as before."""


@dataclass
class Trajectory:
    """One picture in progress: its sampler, condition, state, cache slots and cost."""

    sampler: Sampler[State]
    condition: Condition
    state: State
    memory: Memory = field(default_factory=Memory)
    patch_evaluations: int = 0
    """Patch evaluations so far, in all guidance branches."""
    changes: list[Change] = field(default_factory=list)
    """Departures from the sampler's own path, in order."""
    asked: Sampler[State] | None = None
    """The sampler before the first change; None: there was none."""
    landing_error: Tensor | None = None
    """`(P,)`: the predicted error of the landing, root mean square per patch; None: it did not land."""
    enlarge: Callable[[Tensor], Tensor] | None = None
    """Enlarges a picture of half the size, `(P/4, D)` → `(P, D)`, for samplers that draw one first."""

    @property
    def predicted_error(self) -> Tensor:
        """`(P,)`: the predicted error of leaping to t = 1 early, root mean square per patch, as in `landing_error`."""
        early = self.sampler.finish_error(self.state)
        return early if self.landing_error is None else early + self.landing_error

    @property
    def dense_patch_evaluations(self) -> int:
        """Patch evaluations of a run of the sampler that was asked for, with every patch and branch each time."""
        return (self.asked or self.sampler).dense_patch_evaluations

    @property
    def evaluations(self) -> int:
        """Network evaluations of the whole run, as far as it is known: those made, and at most those to come."""
        if self.asked is None:
            return self.sampler.evaluations
        return self.state.evaluations + len(self.sampler.costs_ahead(self.state, 1))

    def change(self, change: Change) -> None:
        """Depart from the sampler's path. Call `plan_next` afterwards.

        Raises:
            ParameterError: the sampler has no other path, or landing is not possible yet.
        """
        if change.steps == 0 and self.state.evaluations == 0:
            raise ParameterError("path", "a picture cannot land before its first evaluation")
        asked = self.asked or self.sampler
        if change.steps == 0:
            self.landing_error = self.sampler.landing_error(self.state)
            self.state = self.sampler.land(self.state)
        else:
            sampler = self.sampler if change.guided else replace(self.sampler, guidance=1.0)
            if (shorter := sampler.shorten(self.state, change.steps, change.tolerance)) is None:
                name = type(sampler).__name__
                raise ParameterError("path", f"{name} cannot take the rest of its path in {change.steps} steps")
            self.sampler, self.state = shorter
        self.asked = asked
        self.changes.append(change)

    @classmethod
    def begin(cls, sampler: Sampler[State], condition: Condition, noise: Tensor) -> Trajectory:
        """Start at t = 0 from noise `(P, D)`."""
        return cls(sampler, condition, sampler.start(noise))

    def plan(self) -> Plan | None:
        """What the sampler wants evaluated next; None: the picture is finished."""
        return self.sampler.plan(self.state)

    def evaluation(self, plan: Plan) -> Evaluation:
        """Join a plan with this picture's condition and cache slots."""
        return Evaluation(plan, self.condition, self.memory, plan.grid or self.sampler.grid)

    @property
    def seen(self) -> tuple[Tensor, Grid]:
        """The latest estimate of the clean picture, and its grid, which may be smaller than the sampler's."""
        return self.sampler.seen(self.state)

    def advance(self, prediction: Prediction, cost: int) -> None:
        """Take the prediction for the last plan, which cost `cost` patch evaluations. Call `plan_next` afterwards."""
        self.state = self.sampler.advance(self.state, prediction)
        self.patch_evaluations += cost

    def grow(self) -> None:
        """Give the sampler its small picture at full size. Keys and values of the small one are dropped."""
        if self.enlarge is None or self.state.enlarge is None:
            raise ValueError("this trajectory cannot enlarge a picture")
        self.state = self.sampler.enlarged(self.state, self.enlarge(self.state.enlarge))
        self.memory = Memory()


def plan_next(trajectories: Sequence[Trajectory]) -> list[Plan | None]:
    """Answer the questions of all samplers, then return each picture's next plan (None: finished).

    A question asks for values that lie on the device. One transfer answers all pictures' questions; a sampler may ask
    again if it needs no evaluation in a step. Small pictures that are ready are enlarged.
    """
    while asked := [(each, ask) for each in trajectories if (ask := each.state.question) is not None]:
        flat = torch.cat([question.flatten() for _, question in asked])
        answers = flat.cpu().split([question.numel() for _, question in asked])
        for (each, question), answer in zip(asked, answers, strict=True):
            each.state = each.sampler.answer(each.state, answer.view(question.shape))
    for each in trajectories:
        if each.state.enlarge is not None:
            each.grow()
    return [each.plan() for each in trajectories]


def run(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    after_step: Callable[[list[Trajectory]], None] | None = None,
    change: Callable[[Sequence[Trajectory]], bool] | None = None,
) -> None:
    """Advance all trajectories to their end. Each round packs all of them into one evaluation, whatever their samplers.

    `after_step` gets the trajectories that were just evaluated. `change` may change all trajectories before every
    evaluation, and tells whether it did; it is asked until it did not.
    """

    def plan_all() -> list[Plan | None]:
        plans = plan_next(trajectories)
        while change and change(trajectories):
            plans = plan_next(trajectories)
        return plans

    plans = plan_all()
    while planned := [(each, plan) for each, plan in zip(trajectories, plans, strict=True) if plan is not None]:
        predictions = denoiser.evaluate([each.evaluation(plan) for each, plan in planned])
        for (each, plan), prediction in zip(planned, predictions, strict=True):
            each.advance(prediction, denoiser.patches(plan))
        plans = plan_all()
        if after_step:
            after_step([each for each, _ in planned])
