"""A job in flight: its pictures, what they cost so far, and the report at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from model.generate import Trajectory
from model.types import Plan, Prediction
from service.schemas import ImageReport, Job, SavingsReport


@dataclass
class LivePicture:
    """One picture of a job, with what its report needs."""

    index: int
    seed: int
    trajectory: Trajectory
    plan: Plan | None
    """What to evaluate next; None when the picture is finished."""
    finished_at: torch.Tensor
    """``(P,)`` long: evaluation after which each patch stood at t = 1; 0 while it does not."""
    previewed: float = 0.0
    """Monotonic time of the last preview."""

    @classmethod
    def begin(cls, index: int, seed: int, trajectory: Trajectory) -> LivePicture:
        """One that has not been evaluated yet."""
        finished_at = torch.zeros(trajectory.sampler.grid.patches, dtype=torch.long)
        return cls(index, seed, trajectory, trajectory.plan(), finished_at)

    @property
    def done(self) -> bool:
        return self.plan is None

    def advance(self, prediction: Prediction, cost: int) -> None:
        """Take what the plan asked for, which cost ``cost`` patch evaluations."""
        self.trajectory.advance(prediction, cost)
        self.plan = self.trajectory.plan()
        self.note_finished_patches()

    def note_finished_patches(self) -> None:
        """Record which patches reached t = 1 with the evaluation just made."""
        arrived = (self.trajectory.state.times.cpu() >= 1) & (self.finished_at == 0)
        self.finished_at[arrived] = self.trajectory.state.evaluations

    def report(self) -> ImageReport:
        """What this picture cost."""
        state, sampler = self.trajectory.state, self.trajectory.sampler
        return ImageReport(
            seed=self.seed,
            patch_evaluations=self.trajectory.patch_evaluations,
            dense_patch_evaluations=sampler.dense_patch_evaluations,
            difficulty=[float(f"{value:.4g}") for value in state.difficulty.tolist()],
            finished_at=self.finished_at.tolist(),
        )


@dataclass
class LiveJob:
    """A job being worked on; times are of this process's monotonic clock."""

    job: Job
    model: str
    pictures: list[LivePicture]
    prompt_truncated: bool
    begun: float = field(default_factory=time.monotonic)
    first_preview: float | None = None

    @property
    def queue_seconds(self) -> float:
        """From acceptance to the claim, both by the queue server's clock."""
        return max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at)

    @property
    def done(self) -> bool:
        return all(picture.done for picture in self.pictures)

    def note_preview(self) -> None:
        """Remember when the client first had something to see."""
        if self.first_preview is None:
            self.first_preview = time.monotonic()

    def report(self) -> SavingsReport:
        """Work done and saved by the whole request: ``1 − done / dense``, guidance branches included."""
        images = [picture.report() for picture in self.pictures]
        done = sum(image.patch_evaluations for image in images)
        dense = sum(image.dense_patch_evaluations for image in images)
        preview = None if self.first_preview is None else self.queue_seconds + self.first_preview - self.begun
        return SavingsReport(
            patches=self.pictures[0].finished_at.numel(),
            patch_evaluations=done,
            dense_patch_evaluations=dense,
            savings_ratio=1 - done / dense,
            queue_seconds=self.queue_seconds,
            duration_seconds=self.queue_seconds + time.monotonic() - self.begun,
            time_to_first_preview_seconds=preview,
            prompt_truncated=self.prompt_truncated,
            images=images,
        )
