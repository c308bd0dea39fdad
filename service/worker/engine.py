"""The engine: one step schedules pictures, evaluates their plans together, and advances them."""

from __future__ import annotations

import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

import torch

from patchforge.model.errors import ParameterError
from patchforge.model.pipeline import Pipeline
from patchforge.model.trajectory import Change, plan_next
from patchforge.model.types import Grid, Plan, Prediction
from patchforge.service.errors import InvalidRequest
from patchforge.service.messages.events import Preview
from patchforge.service.messages.fit import Size, nearest_native
from patchforge.service.messages.room import preview_limit
from patchforge.service.messages.schemas import GenerationRequest, Job
from patchforge.service.messages.source import Source
from patchforge.service.worker.caches import CacheBudget
from patchforge.service.worker.live import Clock, LiveJob, LivePicture
from patchforge.service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from patchforge.service.worker.pace import Allowance
from patchforge.service.worker.pacer import Pacer
from patchforge.service.worker.pictures import encode_picture, encode_preview, picture_settings
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Candidate
from patchforge.service.worker.source_images import prepare_source
from patchforge.service.worker.trouble import NotFinite, isolate_failures, job_error


class Chooser(Protocol):
    """Decides which pictures are evaluated next."""

    def choose(self, candidates: Iterable[Candidate]) -> list[Candidate]:
        """Returns candidates of one model; at least one if there are any."""


class Chosen(NamedTuple):
    """A picture, and the plan to evaluate for it."""

    live: LiveJob
    picture: LivePicture
    plan: Plan


class Engine:
    """Runs the jobs admitted to it, one step at a time. Not thread-safe."""

    def __init__(
        self,
        pipelines: Mapping[str, Pipeline],
        scheduler: Chooser,
        previews: PreviewPace,
        cache_bytes: int,
        pacer: Pacer | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """`cache_bytes` limits the keys and values kept between steps. Without a `pacer`, pictures take their time."""
        self.pipelines = pipelines
        self.scheduler = scheduler
        self.previews = previews
        self.caches = CacheBudget(cache_bytes)
        self.pacer = pacer
        self.clock = clock
        self.jobs: dict[str, LiveJob] = {}
        self.last_evaluation = (0, "")
        """Patches in the last evaluation, and its model."""
        self.evaluated = 0
        """Patches in all evaluations so far."""
        self._given: list[LiveJob] = []
        """Jobs that need no evaluation, because all their patches are known; still to be decoded."""
        self.last_shares: Counter[str] = Counter()
        """Job id → its patches in the last step."""
        self._ended: float | None = None
        """When the last step ended; None if it left nothing to do."""
        self._decoding = 0.0
        """Seconds of this step for finished pictures."""

    def admit(self, job: Job, source: Source | None = None) -> LiveJob:
        """Prepare a job's condition, noise and source picture, and add the job to the running ones.

        Raises:
            InvalidRequest: the job does not fit the model; `field` says why.
        """
        begun = self.clock()
        request = job.request
        pipeline = self.pipelines.get(request.model or "")
        if pipeline is None or request.sampler is None or None in (request.steps, request.guidance, request.seed):
            raise InvalidRequest("this worker does not serve the job's model, or a default is missing", field="model")
        try:
            size = drawn_size(pipeline, request)
            grid = pipeline.grids[size]
            options = request.sampler.model_dump()
            if source is not None:
                options.pop("small_until", None)  # an edited picture is worked on at full size
            name, steps, guidance = options.pop("name"), request.steps or 1, request.guidance or 0.0
            sampler = pipeline.sampler(name, steps, guidance, grid=grid, **options)
            condition, truncated = pipeline.condition(request.prompt, request.class_label, request.negative_prompt)
            image = None if source is None else prepare_source(pipeline, source, request.strength, request.fit, size)
            pictures = []
            for index in range(request.n):
                seed = (request.seed or 0) + index
                noise = pipeline.noise(seed, grid)
                start = None if image is None else image.begin(sampler, noise)
                run = pipeline.begin(sampler, condition, noise, start)
                path = [Change(**change.model_dump()) for change in request.path or ()]
                pictures.append(LivePicture.begin(index, seed, run, request.budget, path, grid != pipeline.grid))
        except ParameterError as error:
            raise InvalidRequest(str(error).removeprefix(f"{error.field}: "), field=error.field) from error
        tokens = pipeline.prompt_tokens(request.prompt)
        cut = pipeline.is_truncated(request.negative_prompt)
        live = LiveJob(
            *(job, request.model or "", pictures, truncated, tokens, image, cut, self.evaluated),
            clock=self.clock,
            begun=begun,
        )
        self.jobs[job.id] = live
        if self.pacer is not None:
            self.pacer.admit(live, self.clock() - begun)
        if live.done:
            self._given.append(live)
        return live

    def drop(self, job_id: str) -> None:
        """Forget a job in any state, and free its memory."""
        live = self.jobs.pop(job_id, None)
        for picture in live.pictures if live else ():
            self.caches.release((job_id, picture.index))

    def step(self) -> list[Outcome]:
        """Schedule, evaluate, advance. A job that fails ends in `JobBroken` and does not affect the others."""
        outcomes = self._step()
        self._ended = self.clock() if self.jobs else None
        return outcomes

    def _step(self) -> list[Outcome]:
        began, since = self.clock(), self._ended
        self._decoding = 0.0
        self.last_shares.clear()
        outcomes = self._decode_given() + self._keep_paths()
        planned = self._schedule()
        if not planned:
            return outcomes + self._report_finished()
        moved = []
        for chosen, prediction in zip(planned, self._evaluate(planned), strict=True):
            live = chosen.live
            if live.job.id not in self.jobs:
                continue  # another picture of this job has just broken it
            try:
                self._advance(chosen, prediction)
                moved.append(chosen)
            except Exception as error:  # one job's failure must not affect the others
                outcomes.append(self._break_job(live, error))
        outcomes += self._plan_ahead(self._skip_dropped(moved))
        outcomes += self._fetch_status(self._skip_dropped(moved))
        self.previews.worked(self.clock() - began)
        outcomes += self._decode_due(self._skip_dropped(moved)) + self._report_finished()
        if self.pacer is not None:
            patches, model = self.last_evaluation
            now = self.clock()
            self.pacer.evaluated(model, patches, now - began - self._decoding, began - (since or began), now)
        return outcomes

    def _skip_dropped(self, chosen: list[Chosen]) -> list[Chosen]:
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
                    room = False  # reserved for this picture: otherwise smaller ones could overtake it for ever
                    continue
                key = job_id, picture.index
                wanting[key] = Chosen(live, picture, picture.plan)
                cost = self.pipelines[live.model].denoiser.patches(picture.plan)
                alone = live.job.request.deterministic
                candidates.append(Candidate(key, live.model, cost, live.weight, remaining, waited, deadline, alone))
        return [wanting[each.key] for each in self.scheduler.choose(candidates)]

    def _may_keep(self, live: LiveJob, picture: LivePicture, room: bool) -> bool:
        """Tell whether there is room for the keys and values that the plan keeps. If not, the picture waits.

        Without `room`, only pictures that were granted room before may go on.
        """
        key = live.job.id, picture.index
        if not picture.keeps or self.caches.holds(key):
            return True
        pool, sampler = self.pipelines[live.model].denoiser.pool, picture.trajectory.sampler
        return room and self.caches.grant(key, sampler.branches * pool.slot_bytes(sampler.grid.patches))

    def _evaluate(self, planned: list[Chosen]) -> list[Prediction | Exception]:
        """Return one prediction or error per plan, in order."""
        model = planned[0].live.model
        denoiser = self.pipelines[model].denoiser
        for each in planned:
            self.last_shares[each.live.job.id] += denoiser.patches(each.plan)
        self.last_evaluation = self.last_shares.total(), model
        self.evaluated += self.last_shares.total()
        return isolate_failures(denoiser.evaluate, [each.picture.trajectory.evaluation(each.plan) for each in planned])

    def _advance(self, chosen: Chosen, prediction: Prediction | Exception) -> None:
        if isinstance(prediction, Exception):
            raise prediction
        live, picture, plan = chosen
        try:
            picture.advance(prediction, self.pipelines[live.model].denoiser.patches(plan))
        except Exception as error:
            raise error if picture.finite else NotFinite(repr(error)) from error

    def _plan_ahead(self, moved: list[Chosen]) -> list[Outcome]:
        """Let the samplers plan ahead. What they need from the device is fetched for all of them together."""
        outcomes: list[Outcome] = []
        plans = isolate_failures(plan_next, [each.picture.trajectory for each in moved])
        for (live, picture, _), plan in zip(moved, plans, strict=True):
            if live.job.id not in self.jobs:
                continue
            if isinstance(plan, Exception):
                outcomes.append(self._break_job(live, plan if picture.finite else NotFinite(repr(plan))))
                continue
            picture.set_plan(plan)
            if picture.done:
                self.caches.release((live.job.id, picture.index))
        return outcomes

    def _fetch_status(self, moved: list[Chosen]) -> list[Outcome]:
        """Fetch in one transfer from the device: are the predictions finite, and where are the patches."""
        if not moved:
            return []
        stands = [each.picture.status() for each in moved]
        fetched = torch.cat(stands).cpu().split([len(each) for each in stands])
        outcomes: list[Outcome] = []
        for (live, picture, _), row in zip(moved, fetched, strict=True):
            if live.job.id not in self.jobs:
                continue
            if not row[0]:
                outcomes.append(self._break_job(live, NotFinite("the network predicted values that are not finite")))
            elif finished := picture.record_status(*row[1:].view(2, -1)):
                outcomes.append(PatchesMade(live.job.id, finished))
        return outcomes

    def _keep_paths(self) -> list[Outcome]:
        """Bring pictures on the paths that their budgets, time and load allow, and decode those that land."""
        allowed = self.pacer.allowances(self.jobs.values()) if self.pacer is not None else {}
        going = [
            Chosen(live, picture, picture.plan)
            for live in self.jobs.values()
            for picture in live.pictures
            if picture.plan is not None
        ]
        outcomes: list[Outcome] = []
        while going := [each for each in self._skip_dropped(going) if not each.picture.done]:
            changed = []
            for each in going:
                if each.live.job.id not in self.jobs:
                    continue  # another picture of this job has just broken it
                try:
                    if self._change_path(each, allowed.get((each.live.job.id, each.picture.index))):
                        changed.append(each)
                except Exception as error:  # one job's failure must not affect the others
                    outcomes.append(self._break_job(each.live, error))
            going = self._skip_dropped(changed)
            outcomes += self._plan_ahead(going)
            outcomes += self._fetch_status(self._skip_dropped(going))
            landed = [each for each in self._skip_dropped(going) if each.picture.done]
            for model in {each.live.model for each in landed}:
                outcomes += self._decode_due([each for each in landed if each.live.model == model])
        return outcomes

    def _change_path(self, chosen: Chosen, allowed: Allowance | None) -> bool:
        """Change a picture's path once, if it must; tell whether it did."""
        live, picture, _ = chosen
        if self.pacer is not None and allowed is not None and picture.keep_time(self.pacer.floor, allowed):
            live.lowered = True
            return True
        return picture.change_path()

    def _break_job(self, live: LiveJob, error: Exception) -> JobBroken:
        self.drop(live.job.id)
        return JobBroken(live.job.id, job_error(live.job.id, error))

    def _decode_due(self, moved: list[Chosen]) -> list[Outcome]:
        """Decode finished pictures and due previews, each in one batch."""
        began = self.clock()
        done = [each for each in moved if each.picture.done]
        shown: list[Chosen] = []  # owed, whatever it costs
        wanted: list[Chosen] = []
        for each in moved:
            if each.live.job.request.previews and not each.picture.done:
                (shown if each.live.owes(each.picture) else wanted).append(each)
        shown += [wanted[index] for index in self.previews.due([each.picture.previewed for each in wanted], began)]
        outcomes: list[Outcome] = []
        if done:
            outcomes += self._decode([(each.live, each.picture) for each in done])
            took = self.clock() - began
            if self.pacer is not None:
                self._decoding += took
                self.pacer.speeds[done[0].live.model].decoded(len(done), took)
        if shown:
            began = self.clock()
            outcomes += self._decode([(each.live, each.picture) for each in shown])
            self.previews.showed(len(shown), self.clock() - began)
        return outcomes

    def _decode_given(self) -> list[Outcome]:
        given, self._given = self._given, []
        outcomes: list[Outcome] = []
        for live in given:
            if live.job.id in self.jobs:
                outcomes += self._decode([(live, picture) for picture in live.pictures])
        return outcomes

    def _decode(self, due: list[tuple[LiveJob, LivePicture]]) -> list[Outcome]:
        """Decode pictures of one model, all finished or none. What is not finished becomes a preview."""
        pipeline, done = self.pipelines[due[0][0].model], due[0][1].done

        def decode(some: list[tuple[LiveJob, LivePicture]]) -> list[torch.Tensor]:
            by_grid: dict[tuple[Grid, Grid], list[int]] = {}
            for place, (_, picture) in enumerate(some):
                grids = picture.shown[1], picture.trajectory.sampler.grid
                by_grid.setdefault(grids, []).append(place)
            made: dict[int, torch.Tensor] = {}
            for (grid, whole), places in by_grid.items():
                latents = torch.stack([some[place][1].shown[0] for place in places])
                drawn = pipeline.decode(latents, grid) if done else pipeline.preview(latents, grid, whole)
                made |= dict(zip(places, drawn, strict=True))
            return [made[place] for place in range(len(some))]

        outcomes: list[Outcome] = []
        for (live, picture), pixels in zip(due, isolate_failures(decode, due), strict=True):
            if live.job.id not in self.jobs:
                continue  # another picture of this job has just broken it
            try:
                outcomes.append(self._encode_outcome(live, picture, pixels))
            except Exception as error:
                outcomes.append(self._break_job(live, error))
        return outcomes

    def _encode_outcome(self, live: LiveJob, picture: LivePicture, pixels: torch.Tensor | Exception) -> Outcome:
        if isinstance(pixels, Exception):
            raise pixels
        request = live.job.request
        if picture.done:
            settings = picture_settings(request, picture.seed, self.pipelines[live.model])
            data = encode_picture(pixels, request, settings, live.source)
            return PictureMade(live.job.id, picture.index, data)
        picture.previewed = self.clock()
        live.record_preview()
        return PreviewMade(live.job.id, _build_preview(picture, encode_preview(pixels, preview_limit(request.n))))

    def _report_finished(self) -> list[Outcome]:
        """Report the jobs whose pictures are all finished."""
        outcomes: list[Outcome] = []
        for live in [live for live in self.jobs.values() if live.done]:
            try:
                outcomes.append(JobDone(live.job.id, live.report(self.pipelines[live.model].digest)))
                self.drop(live.job.id)
            except Exception as error:
                outcomes.append(self._break_job(live, error))
        return outcomes


def drawn_size(pipeline: Pipeline, request: GenerationRequest) -> Size:
    """The native size in which a request is drawn."""
    return nearest_native(list(pipeline.grids), request.asked_size or pipeline.manifest.size)


def _build_preview(picture: LivePicture, png: bytes) -> Preview:
    run = picture.trajectory
    state, sampler = run.state, run.sampler
    times = [round(value, 4) for value in picture.times.tolist()]
    return Preview(
        index=picture.index,
        evaluation=state.evaluations,
        evaluations=run.evaluations,
        times=times,
        finished_share=sum(value >= 1 for value in times) / len(times),
        patch_evaluations=run.patch_evaluations,
        dense_patch_evaluations=min(
            run.dense_patch_evaluations, sampler.grid.patches * sampler.branches * state.evaluations
        ),
        b64_png=b64encode(png).decode(),
        grid=picture.told_grid,
    )
