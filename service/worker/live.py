"""A job in flight: its pictures, what they cost so far, and the report at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from model.denoiser import Memory
from model.generate import Trajectory
from model.types import Plan, Prediction
from service.events import PatchesFinished
from service.schemas import ImageReport, Job, Priority, SavingsReport
from service.worker.source_images import SourceImage

WEIGHTS = {Priority.HIGH: 4.0, Priority.NORMAL: 1.0, Priority.LOW: 0.25}
"""A job's share of the worker beside others: see scheduler.py."""


@dataclass
class LivePicture:
    """One picture of a job, with what its report needs."""

    index: int
    seed: int
    trajectory: Trajectory
    plan: Plan | None
    """What to evaluate next; None when the picture is finished."""
    times: torch.Tensor
    """``(P,)`` on the CPU: where each patch stands."""
    difficulty: torch.Tensor
    """``(P,)`` on the CPU: its latest predicted variance."""
    finished_at: torch.Tensor
    """``(P,)`` long, on the CPU: evaluation after which each patch stood at t = 1; 0 while it does not."""
    finite: torch.Tensor
    """Bool scalar: whether the last prediction was; not yet looked at, for that would wait for the device."""
    unfinished: int
    """Patches of which ``finished_at`` is 0."""
    previewed: float | None = None
    """Monotonic time of the last preview; None before the first."""

    @classmethod
    def begin(cls, index: int, seed: int, trajectory: Trajectory) -> LivePicture:
        """One that has not been evaluated yet."""
        times, difficulty = torch.stack([trajectory.state.times, trajectory.state.difficulty]).cpu()
        finished_at, finite = torch.zeros(times.shape, dtype=torch.long), torch.tensor(True)
        return cls(index, seed, trajectory, trajectory.plan(), times, difficulty, finished_at, finite, len(times))

    @property
    def done(self) -> bool:
        return self.plan is None

    @property
    def remaining(self) -> int:
        """Patch evaluations still to come, at most."""
        if self.done:
            return 0
        sampler, made = self.trajectory.sampler, self.trajectory.state.evaluations
        return self.unfinished * sampler.branches * max(1, sampler.evaluations - made)

    @property
    def keeps(self) -> bool:
        """Whether the plan keeps keys and values, or needs those kept before."""
        return self.plan is not None and (self.plan.keep or self.plan.patches is not None)

    def advance(self, prediction: Prediction, cost: int) -> None:
        """Take what the plan asked for, which cost ``cost`` patch evaluations."""
        self.finite = torch.isfinite(prediction.velocity).all() & torch.isfinite(prediction.log_variance).all()
        self.trajectory.advance(prediction, cost)

    def go_on(self, plan: Plan | None) -> None:
        """Want ``plan`` next, if any."""
        self.plan = plan
        if self.done:
            self.trajectory.memory = Memory()  # nothing will read it: its bytes are free for others

    def note(self, times: torch.Tensor, difficulty: torch.Tensor) -> PatchesFinished | None:
        """Take how patches stand now, ``(P,)`` each on the CPU; which of them reached t = 1 with this evaluation."""
        self.difficulty = difficulty
        state, sampler = self.trajectory.state, self.trajectory.sampler
        arrived = ((times >= 1) & (self.finished_at == 0)).nonzero()[:, 0]
        before, self.times = self.times, times
        if not len(arrived):
            return None
        self.finished_at[arrived] = state.evaluations
        self.unfinished -= len(arrived)
        return PatchesFinished(
            index=self.index,
            evaluation=state.evaluations,
            evaluations=sampler.evaluations,
            patches=arrived.tolist(),
            times=[round(value, 4) for value in before[arrived].tolist()],
            finished_share=1 - self.unfinished / len(times),
        )

    def report(self) -> ImageReport:
        """What this picture cost."""
        return ImageReport(
            seed=self.seed,
            patch_evaluations=self.trajectory.patch_evaluations,
            dense_patch_evaluations=self.trajectory.sampler.dense_patch_evaluations,
            difficulty=[float(f"{value:.4g}") for value in self.difficulty.tolist()],
            finished_at=self.finished_at.tolist(),
        )


@dataclass
class LiveJob:
    """A job being worked on; times are of this process's monotonic clock."""

    job: Job
    model: str
    pictures: list[LivePicture]
    prompt_truncated: bool
    prompt_tokens: int = 0
    source: SourceImage | None = None
    """What its pictures start from, if not from noise alone."""
    came_at: int = 0
    """Patches the engine had evaluated when it was admitted."""
    begun: float = field(default_factory=time.monotonic)
    first_preview: float | None = None

    @property
    def queue_seconds(self) -> float:
        """From acceptance to the claim, both by the queue server's clock."""
        return max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at)

    @property
    def done(self) -> bool:
        return all(picture.done for picture in self.pictures)

    @property
    def weight(self) -> float:
        """What the scheduler gives each unfinished picture: their job's, divided among them."""
        return WEIGHTS[self.job.request.priority] / sum(not picture.done for picture in self.pictures)

    @property
    def remaining(self) -> float:
        """Work to come, in patch evaluations divided by the job's weight."""
        return sum(picture.remaining for picture in self.pictures) / WEIGHTS[self.job.request.priority]

    def waited(self, evaluated: int) -> float:
        """Patches evaluated since this job came, times its weight; ``evaluated``: what the engine has in all."""
        return (evaluated - self.came_at) * WEIGHTS[self.job.request.priority]

    @property
    def deadline(self) -> float | None:
        """Seconds until the job's deadline; None if it has none, or missed it."""
        if self.job.request.deadline_seconds is None:
            return None
        left = self.job.request.deadline_seconds - self.queue_seconds - (time.monotonic() - self.begun)
        return left if left > 0 else None

    def note_preview(self) -> None:
        """Remember when the client first had something to see."""
        if self.first_preview is None:
            self.first_preview = time.monotonic()

    def report(self) -> SavingsReport:
        """Work done and saved by the whole request: ``1 − done / dense``, guidance branches included."""
        images = [picture.report() for picture in self.pictures]
        grid = self.pictures[0].trajectory.sampler.grid
        done = sum(image.patch_evaluations for image in images)
        dense = sum(image.dense_patch_evaluations for image in images)
        preview = None if self.first_preview is None else self.queue_seconds + self.first_preview - self.begun
        return SavingsReport(
            patches=grid.patches,
            grid_rows=grid.rows,
            grid_columns=grid.columns,
            patch_evaluations=done,
            dense_patch_evaluations=dense,
            savings_ratio=1 - done / dense,
            queue_seconds=self.queue_seconds,
            duration_seconds=self.queue_seconds + time.monotonic() - self.begun,
            time_to_first_preview_seconds=preview,
            prompt_truncated=self.prompt_truncated,
            prompt_tokens=self.prompt_tokens,
            images=images,
        )
