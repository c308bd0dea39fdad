"""The worker: takes jobs from the queue, runs them in the engine, and handles outages and draining."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry
from ulid import ULID

from patchforge.model.flops import patch_flops
from patchforge.model.pipeline import Pipeline
from patchforge.service import tracing
from patchforge.service.errors import InvalidRequest, NotFound
from patchforge.service.messages.endings import terminal_event, unsupported
from patchforge.service.messages.events import Cancelled, Completed, Failed, Started
from patchforge.service.messages.protocol import digest_need
from patchforge.service.messages.schemas import Job, JobError, JobStatus, ModelCard, SavingsReport
from patchforge.service.messages.source import Source
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.results.metrics import watch_store
from patchforge.service.settings import Settings
from patchforge.service.threads import in_thread
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.device_metrics import register_host
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.metrics import WorkerMetrics
from patchforge.service.worker.outages import Outages
from patchforge.service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from patchforge.service.worker.pace import Backlog
from patchforge.service.worker.pacer import Pacer
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from patchforge.service.worker.spans import JobSpans
from patchforge.service.worker.transfers import Transfers, outlast_store
from patchforge.service.worker.trouble import job_error

log = structlog.get_logger()
T = TypeVar("T")

ANNOUNCE_SECONDS = 2.0
CLAIM_CHECK_SECONDS = 0.1
IDLE_BLOCK_SECONDS = 1.0


class Worker:
    """Runs several jobs at once: startup, run until told to stop, drain, shutdown."""

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        pipelines: dict[str, Pipeline],
        patch_budgets: Mapping[str, int],
        parent: int | None = None,
    ) -> None:
        """`patch_budgets`: most patches per evaluation of each model. Drains when the process `parent` is gone."""
        self.settings = settings
        self.queue = queue
        self.id = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        previews = PreviewPace(settings.preview_interval_seconds, settings.preview_share)
        target = settings.target_latency if settings.degrade else None
        self.pacer = Pacer(pipelines, patch_budgets, settings.min_quality, target)
        scheduler = Scheduler(patch_budgets, self.pacer.limits)
        self.engine = Engine(pipelines, scheduler, previews, settings.cache_bytes, self.pacer)
        self.registry = CollectorRegistry()
        flops = {name: patch_flops(pipeline.manifest) for name, pipeline in pipelines.items()}
        self.metrics = WorkerMetrics(self.registry, patch_budgets, flops)
        watch_store(queue.objects, self.registry)
        register_host(self.registry, {pipeline.device for pipeline in pipelines.values()})
        self.spans = JobSpans()
        self.claims: dict[str, Claim] = {}
        self.draining = asyncio.Event()
        self.outages = Outages()
        self.transfers = Transfers()
        self._fetched: list[tuple[str, Source | NotFound]] = []
        """Jobs to admit, with the pictures that they edit."""
        self._parent = parent
        self._news = asyncio.Event()
        self._verdicts: dict[str, tuple[Claim, Heartbeat]] = {}
        self._making_room = False
        self._look_again = 0.0
        queue.on_ended = self._record_ended_in_queue
        queue.capabilities |= {digest_need(pipeline.digest) for pipeline in pipelines.values()}

    @property
    def cards(self) -> list[ModelCard]:
        """The models that this worker serves."""
        now = time.monotonic()
        cards = [
            model_card(each.manifest, weights_sha256=each.weights_sha256, digest=each.digest)
            for each in self.engine.pipelines.values()
        ]
        return [
            card.model_copy(
                update={
                    "usual_seconds": self.pacer.usual_seconds(card.name),
                    "least_seconds": self.pacer.least_seconds(card.name, now),
                }
            )
            for card in cards
        ]

    async def run(self) -> None:
        """Work until `draining` is set. Then finish the running jobs within the grace period, or give them back."""
        await self._unless_drained(self.outages.outlast(self.queue.check_server), grace=0)
        if not self.draining.is_set():
            async with self._background(self._announce_models(), self._keep_claims()) as self.transfers.group:
                log.info("worker ready", worker=self.id, models=list(self.engine.pipelines))
                await self._unless_drained(self._main_loop(), grace=self.settings.drain_seconds)
                await asyncio.gather(*map(self._give_back_job, self.claims.values()))
            await self.outages.attempt(self.queue.retire, self.id)
        log.info("worker stopped", worker=self.id)

    async def _main_loop(self) -> None:
        while not self.draining.is_set():
            await self._tick()
        log.info("draining", jobs=len(self.claims))
        while self.engine.jobs:
            await self._step_engine()
        while await self.transfers.progress(CLAIM_CHECK_SECONDS):
            await self._apply_verdicts()

    async def _tick(self) -> None:
        if self.outages.reason is None:
            await self.outages.attempt(self._take_jobs)
            await self._admit_fetched()
            await self.outages.attempt(self._look_at_backlog)
        elif not self.claims:
            await self._unless_drained(self.outages.outlast(self.queue.ping), grace=0)
        await self._step_engine()  # continues during an outage; heartbeats notice when it is over
        if not self.engine.jobs:
            await self.transfers.progress(CLAIM_CHECK_SECONDS)

    async def _step_engine(self) -> None:
        """Make one engine step and deliver its results."""
        await self._apply_verdicts()
        if not self.engine.jobs:
            return
        began, began_ns = time.monotonic(), time.time_ns()
        outcomes = await in_thread(self.engine.step)
        if self.engine.last_shares:  # otherwise nothing was evaluated: all patches were known
            patches, model = self.engine.last_evaluation
            self.metrics.evaluated(model, patches, time.monotonic() - began)
        broken = {each.job_id: each.error for each in outcomes if isinstance(each, JobBroken)}
        self.spans.stepped(self.engine.last_shares, began_ns, broken)
        for outcome in outcomes:
            await self._deliver_outcome(outcome)

    async def _take_jobs(self) -> None:
        """Claim jobs while there is room. Wait for jobs only if there is nothing else to do."""
        self._making_room = self._making_room and bool(self.claims)
        while self._has_room():
            claim = await self._reclaim_job() or await self._claim_job()
            if claim is None:
                return
            if claim.job.id in self.claims:
                self.claims[claim.job.id] = claim  # it was already ours, but idle during an outage: continue with it
                continue
            if self._on_last_attempt(claim) and self.claims:
                # It must run alone: if the worker dies then, this job is the cause. So it waits until the running jobs
                # are finished, or goes to a worker that is idle.
                await self.outages.outlast(self.queue.release, claim)
                self._making_room = True
                return
            await self._start_job(claim)

    async def _look_at_backlog(self) -> None:
        """Tell the pacer what waits. Only a full worker asks: any other takes what waits."""
        if len(self.claims) < self.settings.max_running:
            self.pacer.backlogs = {}
        elif time.monotonic() >= self._look_again:
            waiting, ages = await self.queue.waiting(batches=False), await self.queue.oldest_waiting()
            workers = max(1, await self.queue.count_workers())
            self.pacer.backlogs = {
                model: Backlog(jobs / workers, ages.get(model, 0.0)) for model, jobs in waiting.items()
            }
            self._look_again = time.monotonic() + CLAIM_CHECK_SECONDS

    def _has_room(self) -> bool:
        if self._making_room or self.draining.is_set() or any(map(self._on_last_attempt, self.claims.values())):
            return False
        return len(self.claims) < self.settings.max_running

    def _on_last_attempt(self, claim: Claim) -> bool:
        """Whether all earlier attempts ended with their worker. If only one attempt is allowed, there are none."""
        return 1 < self.settings.max_attempts <= claim.attempt

    async def _reclaim_job(self) -> Claim | None:
        if self.outages.seconds_since < self.settings.claim_idle_seconds:
            return None  # during the outage all workers seemed silent; let the live ones send heartbeats first
        claim = await self.queue.reclaim(self.id, list(self.engine.pipelines))
        if claim is not None:
            self.metrics.request_reclaimed(claim.job)
            log.warning("job taken over: its worker stopped responding", job=claim.job.id, attempt=claim.attempt)
        return claim

    async def _claim_job(self) -> Claim | None:
        block = 0 if self.claims else IDLE_BLOCK_SECONDS
        claiming = self.queue.claim(self.id, list(self.engine.pipelines), block_seconds=block)
        return await self._unless_drained(claiming, grace=0)

    async def _start_job(self, claim: Claim) -> None:
        job = claim.job
        self.claims[job.id] = claim
        self.metrics.request_started(job)
        self.spans.begin(claim)
        log.info("job started", job=job.id, attempt=claim.attempt, model=job.request.model, n=job.request.n)
        if job.unreadable is not None:
            await self._fail_job(job.id, unsupported(job.unreadable))
        elif job.request.image and self.queue.objects is not None:
            self.transfers.begin(job.id, self._fetch_source(job.id))
        else:
            await self._admit_job(claim)

    async def _fetch_source(self, job_id: str) -> None:
        """Fetch the picture that a job edits, from a store that may be away. The main loop then admits the job."""
        try:
            source: Source | NotFound = await outlast_store(self.outages.outlast, self.queue.source, job_id)
        except NotFound as error:
            source = error
        self._fetched.append((job_id, source))

    async def _admit_fetched(self) -> None:
        while self._fetched:
            job_id, source = self._fetched.pop(0)
            if (claim := self.claims.get(job_id)) is not None:
                await self._admit_job(claim, source)

    async def _admit_job(self, claim: Claim, fetched: Source | NotFound | None = None) -> None:
        """Give a job to the engine, with the picture that it edits if that was fetched before."""
        job, source = claim.job, fetched
        try:
            if isinstance(source, NotFound):
                raise source
            if source is None and job.request.image:
                source = await self.outages.outlast(self.queue.source, job.id)
            live = await in_thread(self.engine.admit, job, source)
        except NotFound as error:
            await self._fail_job(job.id, JobError(code="source_lost", message=error.message))
            return
        except InvalidRequest as error:
            await self._fail_job(job.id, JobError(code=error.code, message=f"{error.field}: {error.message}"))
            return
        except Exception as error:  # a faulty job must not stop the worker
            await self._fail_job(job.id, job_error(job.id, error, otherwise="preparation_failed"))
            return
        steps = live.pictures[0].trajectory.sampler.evaluations
        if not await self.outages.outlast(self.queue.publish, claim, Started(attempt=claim.attempt, steps=steps)):
            self._drop_lost_job(job.id)

    async def _deliver_outcome(self, outcome: Outcome) -> None:
        claim = self.claims.get(outcome.job_id)
        if claim is None:
            return
        if isinstance(outcome, PreviewMade | PatchesMade):
            event = outcome.preview if isinstance(outcome, PreviewMade) else outcome.finished
            if self.outages.reason is None:  # clients may miss it: the report at the end has everything
                await self.outages.attempt(self.queue.publish, claim, event)
        elif isinstance(outcome, PictureMade):
            if self.queue.objects is None:
                await self.outages.outlast(self.queue.store_image, claim, outcome.index, outcome.data)
            else:
                self.transfers.begin(outcome.job_id, self._upload(claim, outcome))
        elif isinstance(outcome, JobDone):
            if self.queue.objects is None:
                await self._complete_job(claim, outcome.report)
            else:  # its pictures may still be on their way
                self.engine.drop(outcome.job_id)
                self.transfers.follow(outcome.job_id, lambda: self._complete_uploaded(outcome))
        elif isinstance(outcome, JobBroken):
            await self._fail_job(outcome.job_id, outcome.error)

    async def _upload(self, claim: Claim, made: PictureMade) -> None:
        """Put a picture into the object store, then tell the queue where it is."""
        reference = await outlast_store(self.queue.put_picture, claim, made.index, made.data)
        now = self.claims.get(made.job_id, claim)  # another one if an outage made the first idle
        if not await self.outages.outlast(self.queue.store_image, now, made.index, reference):
            await self.queue.discard_picture(reference)

    async def _complete_uploaded(self, done: JobDone) -> None:
        if (claim := self.claims.get(done.job_id)) is not None:
            await self._complete_job(claim, done.report)

    async def _complete_job(self, claim: Claim, report: SavingsReport) -> None:
        if await self._finish_job(claim, Completed(report=report)):
            self._end_job(claim.job, JobStatus.COMPLETED, report)
            log.info(
                "job completed",
                job=claim.job.id,
                seconds=round(report.duration_seconds, 3),
                savings=round(report.savings_ratio, 3),
            )
        else:
            self._drop_lost_job(claim.job.id)

    async def _fail_job(self, job_id: str, error: JobError) -> None:
        claim = self.claims[job_id]
        if await self._finish_job(claim, Failed(error=error)):
            self._end_job(claim.job, JobStatus.FAILED, error=error)
            log.warning("job failed", job=job_id, code=error.code, reason=error.message)
        else:
            self._drop_lost_job(job_id)

    async def _finish_job(self, claim: Claim, event: Completed | Failed | Cancelled) -> bool:
        """End the job. Returns False if it is not ours any more. Safe to repeat after an outage."""
        if await self.outages.outlast(self.queue.finish, claim, event):
            return True
        try:
            job = await self.outages.outlast(self.queue.get, claim.job.id)
        except NotFound:
            return False
        return job.status.terminal and job.attempt == claim.attempt and terminal_event(job) == event

    async def _apply_verdicts(self) -> None:
        """Drop cancelled and lost jobs before the next step."""
        verdicts, self._verdicts = self._verdicts, {}
        for job_id, (heard_for, verdict) in verdicts.items():
            claim = self.claims.get(job_id)
            if claim is None or claim != heard_for:
                continue  # the verdict was about an earlier claim
            self.engine.drop(job_id)
            if verdict is Heartbeat.LOST or not await self._finish_job(claim, Cancelled()):
                self._drop_lost_job(job_id)
            else:
                self._end_job(claim.job, JobStatus.CANCELLED)
                log.info("job cancelled", job=job_id)

    def _end_job(
        self, job: Job, status: JobStatus, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        self.claims.pop(job.id, None)
        self.transfers.drop(job.id)
        self.engine.drop(job.id)
        self.metrics.request_finished(job, report, status, error.code if error else None)
        self.spans.end(job.id, status.value, report, error)
        self._news.set()

    def _drop_lost_job(self, job_id: str) -> None:
        """Drop a job that is no longer ours; its new owner will end it."""
        claim = self.claims.pop(job_id, None)
        self.transfers.drop(job_id)
        self.engine.drop(job_id)
        if claim is not None:
            self.metrics.request_lost(claim.job)
            self.spans.end(job_id, "lost")
            log.warning("claim lost", job=job_id, attempt=claim.attempt)

    async def _give_back_job(self, claim: Claim) -> None:
        """Return the job to the queue without using up an attempt. If the queue is away, its claim simply expires."""
        self.transfers.drop(claim.job.id)
        if await self.outages.attempt(self.queue.release, claim):
            log.info("job given back", job=claim.job.id, attempt=claim.attempt)
        self.engine.drop(claim.job.id)
        self.metrics.request_released(claim.job)
        self.spans.end(claim.job.id, "given_back")

    def _record_ended_in_queue(self, job: Job) -> None:
        """Record that a call from here ended a job which no worker holds."""
        self.metrics.request_ended_in_queue(job)
        tracing.ended_in_queue(job)
        if job.error is not None:
            log.error("job dead-lettered", job=job.id, attempts=job.attempt, reason=job.error.message)

    async def _unless_drained(self, work: Coroutine[Any, Any, T], grace: float) -> T | None:
        """Do the work, but cancel it `grace` seconds after draining began; then return None."""
        working, draining = asyncio.create_task(work), asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait({working, draining}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({working}, timeout=grace)
        finally:
            draining.cancel()
            working.cancel()
            await asyncio.wait({working})  # a cancelled claim gives back the job that it may just have taken
        return None if working.cancelled() else working.result()

    async def _keep_claims(self) -> None:
        """Send heartbeats for all claims. Note cancelled and lost ones: the main loop drops them before a step."""
        while True:
            for claim in list(self.claims.values()):
                verdict = await self.outages.attempt(self.queue.heartbeat, claim)
                if verdict is not None and verdict is not Heartbeat.OK:
                    self._verdicts[claim.job.id] = claim, verdict
            await asyncio.sleep(min(CLAIM_CHECK_SECONDS, self.settings.claim_idle_seconds / 4))

    async def _announce_models(self) -> None:
        """Tell gateways what this worker serves, and its metrics."""
        while True:
            if self._parent is not None and os.getppid() != self._parent:
                log.warning("the process that started this worker is gone")
                self.draining.set()
            await self.outages.attempt(self.queue.announce, self.id, self.cards)
            await self.outages.attempt(self.queue.announce_metrics, self.id, self.metrics.exposition())
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_SECONDS):
                    await self._news.wait()

    @contextlib.asynccontextmanager
    async def _background(self, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.TaskGroup]:
        """Run loops beside the body. If one breaks, the worker ends: without them, it would lose its jobs."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            yield group
            for task in tasks:
                task.cancel()
