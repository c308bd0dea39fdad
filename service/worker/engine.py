"""The engine: one step schedules pictures, evaluates their plans together, and advances them."""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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
            raise InvalidRequest(str(error), field=error.field) from error
        pictures = []
        for index in range(request.n):
            seed = (request.seed or 0) + index
            run = Trajectory.begin(sampler, condition, pipeline.noise(seed))
            pictures.append(LivePicture(index, seed, run, torch.zeros(pipeline.grid.patches, dtype=torch.long)))
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
        try:
            outcomes += self._show(alive)
        except Exception as error:  # say, no memory left to decode
            outcomes += [self._broken(live, error) for live in {live.job.id: live for live, _ in alive}.values()]
        return outcomes + self._close()

    def _schedule(self) -> list[tuple[LiveJob, LivePicture, Plan]]:
        plans: dict[tuple[str, int], tuple[LiveJob, LivePicture, Plan]] = {}
        candidates = []
        for job_id, live in self.jobs.items():
            for picture in live.pictures:
                plan = None if picture.done else picture.trajectory.plan()
                if plan is not None:
                    plans[job_id, picture.index] = live, picture, plan
                    cost = self.pipelines[live.model].denoiser.patches(plan)
                    candidates.append(Candidate((job_id, picture.index), live.model, cost))
        return [plans[each.key] for each in self.scheduler.choose(candidates)]

    def _evaluate(self, planned: list[tuple[LiveJob, LivePicture, Plan]]) -> list[Prediction | Exception]:
        """Predictions in order. If the pack fails, each is tried alone, so that only the culprit fails."""
        model = planned[0][0].model
        denoiser = self.pipelines[model].denoiser
        self.last_evaluation = sum(denoiser.patches(plan) for _, _, plan in planned), model
        evaluations = [picture.trajectory.evaluation(plan) for _, picture, plan in planned]
        try:
            return list(denoiser.evaluate(evaluations))
        except Exception as error:
            if len(planned) == 1:
                return [error]
            log.warning("a packed evaluation failed; trying its members alone", error=repr(error))
        return [outcome for each in planned for outcome in self._evaluate([each])]

    def _advance(self, live: LiveJob, picture: LivePicture, plan: Plan, prediction: Prediction | Exception) -> None:
        if isinstance(prediction, Exception):
            raise prediction
        if not torch.isfinite(prediction.velocity).all():
            raise NotFinite("the network predicted values that are not finite")
        picture.trajectory.advance(prediction, self.pipelines[live.model].denoiser.patches(plan))
        picture.note_finished_patches()

    def _broken(self, live: LiveJob, error: Exception) -> JobBroken:
        self.drop(live.job.id)
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        code = "out_of_memory" if memory else "not_finite" if isinstance(error, NotFinite) else "evaluation_failed"
        log.error("job failed", job=live.job.id, code=code, exc_info=None if memory else error)
        message = "the device ran out of memory" if memory else "the network could not evaluate this request"
        return JobBroken(live.job.id, JobError(code=code, message=f"{message} ({type(error).__name__})"))

    def _show(self, moved: Iterable[tuple[LiveJob, LivePicture]]) -> list[Outcome]:
        """Decode, in one batch, finished pictures and the previews that are due."""
        now = time.monotonic()
        due = []
        for live, picture in moved:
            picture.done = picture.trajectory.plan() is None
            wanted = live.job.request.previews and now - picture.previewed >= self.preview_interval
            if picture.done or wanted:
                due.append((live, picture))
        if not due:
            return []
        clean = [p.trajectory.state.x if p.done else p.trajectory.state.estimate for _, p in due]
        decoded = self.pipelines[due[0][0].model].decode(torch.stack(clean))
        outcomes: list[Outcome] = []
        for (live, picture), pixels in zip(due, decoded, strict=True):
            request = live.job.request
            if picture.done:
                data = encode_picture(pixels, request.output_format, request.output_compression)
                outcomes.append(PictureMade(live.job.id, picture.index, data))
            else:
                picture.previewed = now
                live.note_preview()
                outcomes.append(PreviewMade(live.job.id, _preview(picture, encode_picture(pixels, OutputFormat.PNG))))
        return outcomes

    def _close(self) -> list[Outcome]:
        """Reports of the jobs whose pictures are all made."""
        done = [live for live in self.jobs.values() if live.done]
        for live in done:
            self.drop(live.job.id)
        return [JobDone(live.job.id, live.report()) for live in done]


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
