"""The engine: one step schedules pictures, evaluates their plans together, and advances them."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import structlog
import torch

from model.errors import ModelError, ParameterError
from model.generate import Trajectory
from model.pipeline import Pipeline
from model.types import Plan, Prediction
from service.errors import InvalidRequest
from service.schemas import Job, JobError, OutputFormat, Preview, SavingsReport
from service.worker.live import LiveJob, LivePicture
from service.worker.pictures import encode_picture
from service.worker.scheduler import Candidate, Scheduler

log = structlog.get_logger()
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class PreviewMade:
    """A preview to publish."""

    job_id: str
    preview: Preview


@dataclass(frozen=True)
class PictureMade:
    """A finished picture to store."""

    job_id: str
    index: int
    data: bytes


@dataclass(frozen=True)
class JobDone:
    """All pictures of a job are made."""

    job_id: str
    report: SavingsReport


@dataclass(frozen=True)
class JobBroken:
    """A job cannot go on; others are not affected."""

    job_id: str
    error: JobError


Outcome = PreviewMade | PictureMade | JobDone | JobBroken


class NotFinite(ModelError):
    """The network predicted NaN or infinity for this picture."""


class Engine:
    """Runs the jobs admitted to it, a step at a time. Not thread-safe: one caller at a time."""

    def __init__(self, pipelines: Mapping[str, Pipeline], patch_budget: int, preview_interval: float) -> None:
        """``patch_budget`` bounds the patches of one evaluation; ``preview_interval`` is in seconds."""
        self.pipelines = pipelines
        self.preview_interval = preview_interval
        self.scheduler = Scheduler(patch_budget)
        self.jobs: dict[str, LiveJob] = {}
        self.last_evaluation = (0, "")
        """Patches packed into the last evaluation, and its model."""

    def admit(self, job: Job) -> LiveJob:
        """Prepare a job's condition and noise and add it to the live set.

        Raises:
            InvalidRequest: the job does not fit the model; ``field`` says where.
        """
        request = job.request
        pipeline = self.pipelines.get(request.model or "")
        if pipeline is None or request.sampler is None or None in (request.steps, request.guidance, request.seed):
            raise InvalidRequest("the job names no model of this worker, or lacks a default", field="model")
        try:
            options = request.sampler.model_dump()
            sampler = pipeline.sampler(options.pop("name"), request.steps or 1, request.guidance or 0.0, **options)
            condition, truncated = pipeline.condition(request.prompt, request.class_label)
        except ParameterError as error:
            raise InvalidRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
        pictures = []
        for index in range(request.n):
            seed = (request.seed or 0) + index
            run = Trajectory.begin(sampler, condition, pipeline.noise(seed))
            pictures.append(LivePicture.begin(index, seed, run))
        live = LiveJob(job, request.model or "", pictures, truncated)
        self.jobs[job.id] = live
        return live

    def drop(self, job_id: str) -> None:
        """Forget a job, whatever it was doing; its memory is freed."""
        self.jobs.pop(job_id, None)

    def step(self) -> list[Outcome]:
        """Schedule, evaluate, advance. A job that fails ends in `JobBroken` and never disturbs the others."""
        planned = self._schedule()
        if not planned:
            return []
        outcomes: list[Outcome] = []
        moved = []
        for (live, picture, plan), prediction in zip(planned, self._evaluate(planned), strict=True):
            if live.job.id not in self.jobs:
                continue  # another of its pictures just broke the job
            try:
                self._advance(live, picture, plan, prediction)
                moved.append((live, picture))
            except Exception as error:  # one job's trouble, of whatever kind, must stay its own
                outcomes.append(self._broken(live, error))
        alive = [(live, picture) for live, picture in moved if live.job.id in self.jobs]
        return outcomes + self._show(alive) + self._close()

    def _schedule(self) -> list[tuple[LiveJob, LivePicture, Plan]]:
        plans: dict[tuple[str, int], tuple[LiveJob, LivePicture, Plan]] = {}
        candidates = []
        for job_id, live in self.jobs.items():
            for picture in live.pictures:
                if picture.plan is not None:
                    plans[job_id, picture.index] = live, picture, picture.plan
                    cost = self.pipelines[live.model].denoiser.patches(picture.plan)
                    candidates.append(Candidate((job_id, picture.index), live.model, cost))
        return [plans[each.key] for each in self.scheduler.choose(candidates)]

    def _evaluate(self, planned: list[tuple[LiveJob, LivePicture, Plan]]) -> list[Prediction | Exception]:
        """Predictions in order."""
        model = planned[0][0].model
        denoiser = self.pipelines[model].denoiser
        self.last_evaluation = sum(denoiser.patches(plan) for _, _, plan in planned), model
        return isolating(denoiser.evaluate, [picture.trajectory.evaluation(plan) for _, picture, plan in planned])

    def _advance(self, live: LiveJob, picture: LivePicture, plan: Plan, prediction: Prediction | Exception) -> None:
        if isinstance(prediction, Exception):
            raise prediction
        if not (torch.isfinite(prediction.velocity).all() & torch.isfinite(prediction.log_variance).all()):
            raise NotFinite("the network predicted values that are not finite")
        picture.advance(prediction, self.pipelines[live.model].denoiser.patches(plan))

    def _broken(self, live: LiveJob, error: Exception) -> JobBroken:
        self.drop(live.job.id)
        return JobBroken(live.job.id, job_error(live.job.id, error))

    def _show(self, moved: Iterable[tuple[LiveJob, LivePicture]]) -> list[Outcome]:
        """Decode, in one batch, finished pictures and the previews that are due."""
        now = time.monotonic()
        due = []
        for live, picture in moved:
            wanted = live.job.request.previews and now - picture.previewed >= self.preview_interval
            if picture.done or wanted:
                due.append((live, picture))
        if not due:
            return []
        pipeline = self.pipelines[due[0][0].model]

        def decode(some: list[tuple[LiveJob, LivePicture]]) -> torch.Tensor:
            states = [(picture.trajectory.state, picture.done) for _, picture in some]
            return pipeline.decode(torch.stack([state.x if done else state.estimate for state, done in states]))

        outcomes: list[Outcome] = []
        for (live, picture), pixels in zip(due, isolating(decode, due), strict=True):
            if live.job.id not in self.jobs:
                continue  # another of its pictures just broke the job
            try:
                outcomes.append(self._shown(live, picture, pixels, now))
            except Exception as error:
                outcomes.append(self._broken(live, error))
        return outcomes

    def _shown(self, live: LiveJob, picture: LivePicture, pixels: torch.Tensor | Exception, now: float) -> Outcome:
        if isinstance(pixels, Exception):
            raise pixels
        request = live.job.request
        if picture.done:
            data = encode_picture(pixels, request.output_format, request.output_compression)
            return PictureMade(live.job.id, picture.index, data)
        picture.previewed = now
        live.note_preview()
        return PreviewMade(live.job.id, _preview(picture, encode_picture(pixels, OutputFormat.PNG)))

    def _close(self) -> list[Outcome]:
        """Reports of the jobs whose pictures are all made."""
        outcomes: list[Outcome] = []
        for live in [live for live in self.jobs.values() if live.done]:
            try:
                outcomes.append(JobDone(live.job.id, live.report()))
                self.drop(live.job.id)
            except Exception as error:
                outcomes.append(self._broken(live, error))
        return outcomes


def isolating(call: Callable[[list[T]], Iterable[R]], items: list[T]) -> list[R | Exception]:
    """What ``call`` makes of each item, in order. If it fails on all at once, each half is tried by itself.

    So only the culprit fails, and what is merely too much for the device's memory is done in smaller portions.
    """
    try:
        return list(call(items))
    except Exception as error:
        if len(items) == 1:
            return [error]
        log.warning("pictures failed together; trying each half", pictures=len(items), error=repr(error))
    half = len(items) // 2  # out here the failed attempt's memory is free again
    return isolating(call, items[:half]) + isolating(call, items[half:])


def job_error(job_id: str, error: Exception, otherwise: str = "evaluation_failed") -> JobError:
    """What the client is told of an exception; ``otherwise`` is the code of one of no known kind."""
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
    code = "out_of_memory" if memory else "not_finite" if isinstance(error, NotFinite) else otherwise
    log.error("job broke", job=job_id, code=code, exc_info=None if memory else error)
    message = "the device ran out of memory" if memory else "the network could not evaluate this request"
    return JobError(code=code, message=f"{message} ({type(error).__name__})")


def _preview(picture: LivePicture, png: bytes) -> Preview:
    run = picture.trajectory
    state, sampler = run.state, run.sampler
    times = [round(value, 4) for value in state.times.tolist()]
    return Preview(
        index=picture.index,
        evaluation=state.evaluations,
        evaluations=sampler.evaluations,
        times=times,
        finished_share=sum(value >= 1 for value in times) / len(times),
        patch_evaluations=run.patch_evaluations,
        dense_patch_evaluations=sampler.grid.patches * sampler.branches * state.evaluations,
        b64_png=b64encode(png).decode(),
    )
