"""A running job: its pictures, their cost so far, and the report at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import torch

from patchforge.model.budget import check_path, expected_cost, fit, lower, replay
from patchforge.model.denoiser import Memory
from patchforge.model.samplers.small_first import is_small
from patchforge.model.trajectory import Change, Trajectory
from patchforge.model.types import Grid, Plan, Prediction
from patchforge.service.messages.events import PatchesFinished
from patchforge.service.messages.partials import PartialImages
from patchforge.service.messages.schemas import ImageReport, Job, PathChange, Priority, SavingsReport
from patchforge.service.worker.pace import HEADROOM, Allowance
from patchforge.service.worker.source_images import SourceImage

Clock = Callable[[], float]
WEIGHTS = {Priority.HIGH: 4.0, Priority.NORMAL: 1.0, Priority.LOW: 0.25}
"""A job's share of the worker: see scheduler.py."""


@dataclass
class LivePicture:
    """One picture of a job, with the data for its report."""

    index: int
    seed: int
    trajectory: Trajectory
    plan: Plan | None
    """What to evaluate next; None if the picture is finished."""
    times: torch.Tensor
    """`(P,)` on the CPU: the timestep of each patch."""
    difficulty: torch.Tensor
    """`(P,)` on the CPU: the latest predicted variance of each patch."""
    finished_at: torch.Tensor
    """`(P,)` long, on the CPU: the evaluation after which each patch reached t = 1; 0 before that."""
    finite: torch.Tensor
    """Bool scalar on the device: whether the last prediction was finite. Reading it waits for the device."""
    unfinished: int
    """Number of patches whose `finished_at` is 0."""
    budget: int | None = None
    """Patch evaluations that the picture may take in all; None: any number."""
    path: Sequence[Change] = ()
    """Changes of an earlier run, to make again."""
    tells_grid: bool = False
    """Whether events say which grid it has, because it is not the model's own."""
    asked: float = 0.0
    """Patch evaluations that the path asked for was expected to take."""
    previewed: float | None = None
    """Monotonic time of the last preview; None before the first one."""

    @classmethod
    def begin(
        cls,
        index: int,
        seed: int,
        trajectory: Trajectory,
        budget: int | None = None,
        path: Sequence[Change] = (),
        tells_grid: bool = False,
    ) -> LivePicture:
        """Create a picture that has not been evaluated yet.

        Raises:
            ParameterError: the budget is not enough for one evaluation, or the sampler cannot take this path.
        """
        times, difficulty = torch.stack([trajectory.state.times, trajectory.state.difficulty]).cpu()
        finished_at, finite = torch.zeros(times.shape, dtype=torch.long), torch.tensor(True)
        patches = len(times)
        picture = cls(
            index, seed, trajectory, None, times, difficulty, finished_at, finite, patches, budget, path, tells_grid
        )
        check_path(trajectory, path)
        if not bool((times >= 1).all()):
            picture.change_path()
            picture.asked = picture.within_budget(expected_cost(trajectory, len(times)))
        picture.plan = trajectory.plan()
        return picture

    def change_path(self) -> bool:
        """Keep to the budget, or to the earlier run's path; tell whether the picture needs a new plan."""
        if self.path:
            return replay(self.trajectory, self.path)
        if self.budget is None or not self.unfinished:
            return False
        return fit(self.trajectory, self.budget - self.trajectory.patch_evaluations, self.unfinished)

    def keep_time(self, floor: float, allowed: Allowance) -> bool:
        """Keep to what time and load allow, but to the share `floor` of the usual work at least.

        Tells whether the picture needs a new plan.
        """
        if self.path or not self.unfinished:
            return False
        most = max(allowed.patches, floor * self.asked - self.trajectory.patch_evaluations)
        if lower(self.trajectory, most, self.unfinished):
            return True
        return allowed.lands and fit(self.trajectory, allowed.patches, self.unfinished)

    def within_budget(self, patches: float) -> float:
        """Patch evaluations that are to come, if without a budget it would be so many."""
        return patches if self.budget is None else min(patches, self.budget - self.trajectory.patch_evaluations)

    @property
    def done(self) -> bool:
        return self.plan is None

    @property
    def remaining(self) -> int:
        """Upper bound of the patch evaluations still to come."""
        if self.done:
            return 0
        sampler, made = self.trajectory.sampler, self.trajectory.state.evaluations
        if is_small(self.trajectory.state):
            return sum(sampler.costs_ahead(self.trajectory.state, self.unfinished))
        return self.unfinished * sampler.branches * max(1, sampler.evaluations - made)

    @property
    def keeps(self) -> bool:
        """Whether the plan keeps keys and values, or needs some that were kept before."""
        return self.plan is not None and (self.plan.keep or self.plan.patches is not None)

    def advance(self, prediction: Prediction, cost: int) -> None:
        """Advance by the prediction for the plan, which cost `cost` patch evaluations."""
        self.finite = torch.isfinite(prediction.velocity).all() & torch.isfinite(prediction.log_variance).all()
        self.trajectory.advance(prediction, cost)

    def set_plan(self, plan: Plan | None) -> None:
        """Set what to evaluate next; None if the picture is finished."""
        self.plan = plan
        if self.done:
            self.trajectory.memory = Memory()  # frees the keys and values: nothing reads them any more

    @property
    def told_grid(self) -> list[int] | None:
        """Patch rows and columns, for events; None if they are the model's own."""
        grid = self.trajectory.sampler.grid
        return [grid.rows, grid.columns] if self.tells_grid else None

    @property
    def shown(self) -> tuple[torch.Tensor, Grid]:
        """The finished picture, or the latest estimate of it, as patches and their grid."""
        run = self.trajectory
        return (run.state.x, run.sampler.grid) if self.done else run.seen

    def status(self) -> torch.Tensor:
        """`(1 + 2·P,)` on the device: was the last prediction finite; then the patches' times and difficulty."""
        state = self.trajectory.state
        return torch.cat([self.finite.to(state.times.dtype)[None], state.times, state.difficulty])

    def record_status(self, times: torch.Tensor, difficulty: torch.Tensor) -> PatchesFinished | None:
        """Record the patches' times and difficulty, `(P,)` each, on the CPU. Return those that just reached t = 1."""
        self.difficulty = difficulty
        state = self.trajectory.state
        arrived = ((times >= 1) & (self.finished_at == 0)).nonzero()[:, 0]
        before, self.times = self.times, times
        if not len(arrived):
            return None
        self.finished_at[arrived] = state.evaluations
        self.unfinished -= len(arrived)
        return PatchesFinished(
            index=self.index,
            evaluation=state.evaluations,
            evaluations=self.trajectory.evaluations,
            patches=arrived.tolist(),
            times=[round(value, 4) for value in before[arrived].tolist()],
            finished_share=1 - self.unfinished / len(times),
            grid=self.told_grid,
        )

    def report(self) -> ImageReport:
        """Report what this picture cost."""
        landing = self.trajectory.landing_error
        return ImageReport(
            seed=self.seed,
            patch_evaluations=self.trajectory.patch_evaluations,
            dense_patch_evaluations=self.trajectory.dense_patch_evaluations,
            difficulty=[float(f"{value:.4g}") for value in self.difficulty.tolist()],
            finished_at=self.finished_at.tolist(),
            path=[PathChange(**asdict(change)) for change in self.trajectory.changes],
            predicted_error=_root_mean_square(self.trajectory.predicted_error) if self.trajectory.changes else None,
            asked_patch_evaluations=round(self.asked) if self.trajectory.changes else None,
            landing_error=None if landing is None else _root_mean_square(landing),
        )


@dataclass
class LiveJob:
    """A running job. Times are from `clock`."""

    job: Job
    model: str
    pictures: list[LivePicture]
    prompt_truncated: bool
    prompt_tokens: int = 0
    source: SourceImage | None = None
    """The picture that it edits, if any."""
    negative_prompt_truncated: bool = False
    came_at: int = 0
    """Patches that the engine had evaluated when the job was admitted."""
    clock: Clock = time.monotonic
    begun: float = 0.0
    alone: float | None = None
    """Seconds that it would take alone; None: not known."""
    lowered: bool = False
    """Whether time or load lowered the quality of a picture."""
    first_preview: float | None = None
    partials: PartialImages = field(init=False)
    """Which previews are owed, however busy this worker is."""

    def __post_init__(self) -> None:
        self.partials = PartialImages(self.job.request.partial_images or 0)

    def owes(self, picture: LivePicture) -> bool:
        """Whether `picture` is to be shown now, whatever previews cost. Ask once after each evaluation."""
        run = picture.trajectory
        return self.partials.take(picture.index, run.state.evaluations, run.evaluations) is not None

    @property
    def queue_seconds(self) -> float:
        """From acceptance to the claim; both times are from the queue server's clock."""
        return max(0.0, (self.job.started_at or self.job.created_at) - self.job.created_at)

    @property
    def elapsed(self) -> float:
        """Seconds since acceptance. Until the latest claim they are from the queue server's clock."""
        taken = self.job.claimed_at or self.job.started_at or self.job.created_at
        return max(0.0, taken - self.job.created_at) + self.clock() - self.begun

    @property
    def finish_in(self) -> float | None:
        """Seconds until its pictures should be finished, by `finish_within_seconds`; negative: it is late."""
        within = self.job.request.finish_within_seconds
        return None if within is None else within - self.elapsed

    def due(self, target: float | None) -> float:
        """Seconds until it is due: by its own time, or after `target` times as long as alone; infinite if neither.

        A job of low priority that load cannot lower, such as those of batches, can wait: for its sake no other picture
        is lowered.
        """
        if (by := self.finish_in) is not None:
            return by
        can_wait = self.job.request.priority is Priority.LOW and not self.job.degradable
        if target is None or self.alone is None or can_wait:
            return math.inf
        return target * self.alone / min(1.0, WEIGHTS[self.job.request.priority]) - self.elapsed

    @property
    def may_be_lowered(self) -> bool:
        """Whether time or load may lower its quality."""
        return self.job.degradable or self.job.request.finish_within_seconds is not None

    @property
    def lowered_by(self) -> Literal["load", "time"] | None:
        """What lowered its quality: its own time, if that was too short even alone, or the load."""
        if not self.lowered:
            return None
        within = self.job.request.finish_within_seconds
        return "time" if within is not None and HEADROOM * within < (self.alone or 0.0) else "load"

    @property
    def done(self) -> bool:
        return all(picture.done for picture in self.pictures)

    @property
    def weight(self) -> float:
        """The scheduler's weight for each unfinished picture: the job's weight, divided by their number."""
        return WEIGHTS[self.job.request.priority] / sum(not picture.done for picture in self.pictures)

    @property
    def remaining(self) -> float:
        """Upper bound of the patch evaluations still to come, divided by the job's weight."""
        return sum(picture.remaining for picture in self.pictures) / WEIGHTS[self.job.request.priority]

    def waited(self, evaluated: int) -> float:
        """Patches evaluated since this job came, times its weight. `evaluated` is the engine's total so far."""
        return (evaluated - self.came_at) * WEIGHTS[self.job.request.priority]

    @property
    def deadline(self) -> float | None:
        """Seconds until the job's next deadline, to start or to finish; None if it has none, or has missed it."""
        start_by = self.job.request.deadline_seconds
        times = [None if start_by is None else start_by - self.elapsed, self.finish_in]
        return min((left for left in times if left is not None and left > 0), default=None)

    def record_preview(self) -> None:
        """Record when the client got its first preview."""
        if self.first_preview is None:
            self.first_preview = self.clock()

    def report(self, digest: str) -> SavingsReport:
        """Report the work of the whole request, guidance branches included. Savings are `1 − done / dense`.

        `digest` is that of the bundle.
        """
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
            duration_seconds=self.queue_seconds + self.clock() - self.begun,
            time_to_first_preview_seconds=preview,
            prompt_truncated=self.prompt_truncated,
            prompt_tokens=self.prompt_tokens,
            negative_prompt_truncated=self.negative_prompt_truncated,
            lowered_by=self.lowered_by,
            finished_in_time=None if (by := self.finish_in) is None else by >= 0,
            model_digest=digest,
            images=images,
        )


def _root_mean_square(error: torch.Tensor) -> float:
    return float(f"{float(error.square().mean().sqrt()):.4g}")
