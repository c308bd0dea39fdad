"""The offline loop: the same samplers over the same denoiser as the worker, without a server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.denoiser import Condition, Denoiser, Evaluation, Memory
from model.samplers import Sampler, State
from model.types import Plan, Prediction


@dataclass
class Trajectory:
    """One picture on its way from noise: its sampler, state, memory and what it has cost."""

    sampler: Sampler[State]
    condition: Condition
    state: State
    memory: Memory = field(default_factory=Memory)
    patch_evaluations: int = 0
    """Done so far, guidance branches included."""

    @classmethod
    def begin(cls, sampler: Sampler[State], condition: Condition, noise: Tensor) -> Trajectory:
        """At t = 0, from noise ``(P, D)``."""
        return cls(sampler, condition, sampler.start(noise))

    def plan(self) -> Plan | None:
        """What the sampler wants next; None when the picture is finished."""
        return self.sampler.plan(self.state)

    def evaluation(self, plan: Plan) -> Evaluation:
        """The plan with this picture's condition and memory."""
        return Evaluation(plan, self.condition, self.memory)

    def advance(self, prediction: Prediction, cost: int) -> None:
        """Take the plan's prediction, which cost ``cost`` patch evaluations. Before the next plan comes `settle`."""
        self.state = self.sampler.advance(self.state, prediction)
        self.patch_evaluations += cost


def settle(trajectories: Sequence[Trajectory]) -> list[Plan | None]:
    """What each wants next, once what their samplers ask of the device is answered: in one transfer for all, or one
    for each step that nobody needs an evaluation for."""
    while asked := [(each, ask) for each in trajectories if (ask := each.state.question) is not None]:
        questions = [question for _, question in asked]
        answers = torch.cat(questions).cpu().split([len(question) for question in questions])
        for (each, _), answer in zip(asked, answers, strict=True):
            each.state = each.sampler.answer(each.state, answer)
    return [each.plan() for each in trajectories]


def run(
    denoiser: Denoiser,
    trajectories: Sequence[Trajectory],
    after_step: Callable[[list[Trajectory]], None] | None = None,
) -> None:
    """Advance all trajectories to their end, packed into one evaluation per round, however they differ."""
    plans = settle(trajectories)
    while planned := [(each, plan) for each, plan in zip(trajectories, plans, strict=True) if plan is not None]:
        predictions = denoiser.evaluate([each.evaluation(plan) for each, plan in planned])
        for (each, plan), prediction in zip(planned, predictions, strict=True):
            each.advance(prediction, denoiser.patches(plan))
        plans = settle(trajectories)
        if after_step:
            after_step([each for each, _ in planned])
