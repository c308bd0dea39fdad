"""The engine: one step schedules pictures, evaluates their plans together, and advances them."""

from __future__ import annotations

import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from model.errors import ParameterError
from model.generate import Trajectory, settle
from model.pipeline import Pipeline
from model.types import Plan, Prediction
from service.errors import InvalidRequest
from service.events import Preview
from service.queue_records import Source
from service.schemas import Job
from service.worker.caches import CacheBudget
from service.worker.live import LiveJob, LivePicture
from service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from service.worker.pictures import encode_picture, encode_preview
from service.worker.previews import PreviewPace
from service.worker.scheduler import Candidate
from service.worker.source_images import prepare
from service.worker.trouble import NotFinite, isolating, job_error


class Chooser(Protocol):
    """Decides whose turn it is."""

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Candidates of one model; at least one if there are any."""


class Chosen(NamedTuple):
    """A picture with the plan it was chosen for."""

    live: LiveJob
    picture: LivePicture
    plan: Plan


class Engine:
    """Runs the jobs admitted to it, a step at a time. Not thread-safe: one caller at a time."""

    def __init__(
        self, pipelines: Mapping[str, Pipeline], scheduler: Chooser, previews: PreviewPace, cache_bytes: int
    ) -> None:
        """``cache_bytes`` bounds the keys and values kept between steps."""
        self.pipelines = pipelines
        self.scheduler = scheduler
        self.previews = previews
        self.caches = CacheBudget(cache_bytes)
        self.jobs: dict[str, LiveJob] = {}
        self.last_evaluation = (0, "")
        """Patches packed into the last evaluation, and its model."""
        self.evaluated = 0
        """Patches in all evaluations so far."""
        self._given: list[LiveJob] = []
        """Jobs whose pictures are known as a whole, still to be shown: nothing of them will ever be planned."""
        self.last_shares: Counter[str] = Counter()
        """Patches each job had in the last step."""

    def admit(self, job: Job, source: Source | None = None) -> LiveJob:
        """Prepare a job's condition, noise and what it starts from, and add it to the live set.

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
            image = None if source is None else prepare(pipeline, source, request.strength)
            pictures = []
            for index in range(request.n):
                seed = (request.seed or 0) + index
                noise = pipeline.noise(seed)
                start = sampler.start(noise) if image is None else sampler.start_from(noise, image.clean, image.times)
                pictures.append(LivePicture.begin(index, seed, Trajectory(sampler, condition, start)))
        except ParameterError as error:
            raise InvalidRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
        tokens = pipeline.prompt_tokens(request.prompt)
        live = LiveJob(job, request.model or "", pictures, truncated, tokens, image, came_at=self.evaluated)
        self.jobs[job.id] = live
        if live.done:
            self._given.append(live)
        return live

    def drop(self, job_id: str) -> None:
        """Forget a job, whatever it was doing; its memory is freed."""
        live = self.jobs.pop(job_id, None)
        for picture in live.pictures if live else ():
            self.caches.release((job_id, picture.index))

    def step(self) -> list[Outcome]:
        """Schedule, evaluate, advance. A job that fails ends in `JobBroken` and never disturbs the others."""
        began = time.monotonic()
        self.last_shares.clear()
        outcomes = self._show_given()
        planned = self._schedule()
        if not planned:
            return outcomes + self._close()
        moved = []
        for chosen, prediction in zip(planned, self._evaluate(planned), strict=True):
            live = chosen.live
            if live.job.id not in self.jobs:
                continue  # another of its pictures just broke the job
            try:
                self._advance(chosen, prediction)
                moved.append(chosen)
            except Exception as error:  # one job's trouble, of whatever kind, must stay its own
                outcomes.append(self._broken(live, error))
        outcomes += self._settle(self._alive(moved))
        outcomes += self._look(self._alive(moved))
        self.previews.worked(time.monotonic() - began)
        return outcomes + self._show(self._alive(moved)) + self._close()

    def _alive(self, chosen: list[Chosen]) -> list[Chosen]:
        return [each for each in chosen if each.live.job.id in self.jobs]

    def _schedule(self) -> list[Chosen]:
        wanting: dict[tuple[str, int], Chosen] = {}
        candidates = []
        room = True
        for job_id, live in self.jobs.items():
            remaining, waited, deadline = live.remaining, live.waited(self.evaluated), live.deadline
            for picture in live.pictures:
                if picture.plan is None:
                    continue
                if not self._may_keep(live, picture, room):
                    room = False  # is kept for this one: smaller ones that came later would take it for ever
                    continue
                key = job_id, picture.index
                wanting[key] = Chosen(live, picture, picture.plan)
                cost = self.pipelines[live.model].denoiser.patches(picture.plan)
                alone = live.job.request.deterministic
                candidates.append(Candidate(key, live.model, cost, live.weight, remaining, waited, deadline, alone))
        return [wanting[each.key] for each in self.scheduler.choose(candidates)]

    def _may_keep(self, live: LiveJob, picture: LivePicture, room: bool) -> bool:
        """Whether there is room for the keys and values the plan is about; if not, the picture waits for others.

        Without ``room`` only what was granted before is.
        """
        key = live.job.id, picture.index
        if not picture.keeps or self.caches.holds(key):
            return True
        pool = self.pipelines[live.model].denoiser.pool
        return room and self.caches.grant(key, pool.slot_bytes * picture.trajectory.sampler.branches)

    def _evaluate(self, planned: list[Chosen]) -> list[Prediction | Exception]:
        """Predictions in order."""
        model = planned[0].live.model
        denoiser = self.pipelines[model].denoiser
        for each in planned:
            self.last_shares[each.live.job.id] += denoiser.patches(each.plan)
        self.last_evaluation = self.last_shares.total(), model
        self.evaluated += self.last_shares.total()
        return isolating(denoiser.evaluate, [each.picture.trajectory.evaluation(each.plan) for each in planned])

    def _advance(self, chosen: Chosen, prediction: Prediction | Exception) -> None:
        if isinstance(prediction, Exception):
            raise prediction
        live, picture, plan = chosen
        try:
            picture.advance(prediction, self.pipelines[live.model].denoiser.patches(plan))
        except Exception as error:
            raise error if picture.finite else NotFinite(repr(error)) from error

    def _settle(self, moved: list[Chosen]) -> list[Outcome]:
        """Have the samplers plan ahead, which may take answers from the device, fetched for all of them together."""
        outcomes: list[Outcome] = []
        plans = isolating(settle, [each.picture.trajectory for each in moved])
        for (live, picture, _), plan in zip(moved, plans, strict=True):
            if live.job.id not in self.jobs:
                continue
            if isinstance(plan, Exception):
                outcomes.append(self._broken(live, plan if picture.finite else NotFinite(repr(plan))))
                continue
            picture.go_on(plan)
            if picture.done:
                self.caches.release((live.job.id, picture.index))
        return outcomes

    def _look(self, moved: list[Chosen]) -> list[Outcome]:
        """Fetch from the device, in one transfer for all pictures, whether all is well and how patches stand."""
        if not moved:
            return []
        states = [each.picture.trajectory.state for each in moved]
        stands = torch.stack([torch.stack([state.times, state.difficulty]) for state in states])
        finite = torch.stack([each.picture.finite for each in moved]).to(stands.dtype)
        fetched = torch.cat([finite[:, None], stands.flatten(1)], dim=1).cpu()
        outcomes: list[Outcome] = []
        for (live, picture, _), row in zip(moved, fetched, strict=True):
            if live.job.id not in self.jobs:
                continue
            if not row[0]:
                outcomes.append(self._broken(live, NotFinite("the network predicted values that are not finite")))
            elif finished := picture.note(*row[1:].view(2, -1)):
                outcomes.append(PatchesMade(live.job.id, finished))
        return outcomes

    def _broken(self, live: LiveJob, error: Exception) -> JobBroken:
        self.drop(live.job.id)
        return JobBroken(live.job.id, job_error(live.job.id, error))

    def _show(self, moved: list[Chosen]) -> list[Outcome]:
        """Decode, in one batch, finished pictures and the previews that are due."""
        now = time.monotonic()
        wanted = [each for each in moved if each.live.job.request.previews and not each.picture.done]
        shown = self.previews.due([each.picture.previewed for each in wanted], now)
        due = [each for each in moved if each.picture.done] + [wanted[index] for index in shown]
        if not due:
            return []
        outcomes = self._decoded([(each.live, each.picture) for each in due], now)
        self.previews.showed(len(shown), (time.monotonic() - now) * len(shown) / len(due))
        return outcomes

    def _show_given(self) -> list[Outcome]:
        given, self._given = self._given, []
        outcomes: list[Outcome] = []
        for live in given:
            if live.job.id in self.jobs:
                outcomes += self._decoded([(live, picture) for picture in live.pictures], time.monotonic())
        return outcomes

    def _decoded(self, due: list[tuple[LiveJob, LivePicture]], now: float) -> list[Outcome]:
        """Pictures of one model, as they stand: finished ones, and previews of the others."""
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
            data = encode_picture(pixels, request, live.source)
            return PictureMade(live.job.id, picture.index, data)
        picture.previewed = now
        live.note_preview()
        return PreviewMade(live.job.id, _preview(picture, encode_preview(pixels)))

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


def _preview(picture: LivePicture, png: bytes) -> Preview:
    run = picture.trajectory
    state, sampler = run.state, run.sampler
    times = [round(value, 4) for value in picture.times.tolist()]
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
