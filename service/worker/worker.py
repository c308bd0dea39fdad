"""The worker: queue on one side, engine on the other, outages and draining between."""

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

from model.flops import patch_flops
from model.pipeline import Pipeline
from service import tracing
from service.errors import InvalidRequest, NotFound
from service.events import Cancelled, Completed, Failed, Started
from service.metrics import WorkerMetrics
from service.queue import Claim, Heartbeat, JobQueue
from service.queue_records import terminal_event
from service.schemas import Job, JobError, JobStatus, ModelCard, SavingsReport
from service.settings import Settings
from service.threads import in_thread
from service.worker.cards import model_card
from service.worker.device_metrics import register_host
from service.worker.engine import Engine
from service.worker.outages import Outages
from service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from service.worker.previews import PreviewPace
from service.worker.scheduler import Scheduler
from service.worker.spans import JobSpans
from service.worker.trouble import job_error

log = structlog.get_logger()
T = TypeVar("T")

ANNOUNCE_SECONDS = 2.0
CLAIM_CHECK_SECONDS = 0.1
IDLE_BLOCK_SECONDS = 1.0


class Worker:
    """Keeps several jobs in flight: startup, run until told to stop, drain, shutdown."""

    def __init__(
        self,
        settings: Settings,
        queue: JobQueue,
        pipelines: dict[str, Pipeline],
        patch_budgets: Mapping[str, int],
        parent: int | None = None,
    ) -> None:
        """``patch_budgets`` bound each model's evaluations; ``parent`` is the process to outlive by a drain at most."""
        self.settings = settings
        self.queue = queue
        self.id = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        previews = PreviewPace(settings.preview_interval_seconds, settings.preview_share)
        self.engine = Engine(pipelines, Scheduler(patch_budgets), previews, settings.cache_bytes)
        self.registry = CollectorRegistry()
        flops = {name: patch_flops(pipeline.manifest) for name, pipeline in pipelines.items()}
        self.metrics = WorkerMetrics(self.registry, patch_budgets, flops)
        register_host(self.registry, {pipeline.device for pipeline in pipelines.values()})
        self.spans = JobSpans()
        self.claims: dict[str, Claim] = {}
        self.draining = asyncio.Event()
        self.outages = Outages()
        self._parent = parent
        self._news = asyncio.Event()
        self._verdicts: dict[str, tuple[Claim, Heartbeat]] = {}
        self._making_room = False
        queue.on_ended = self._ended_in_queue

    @property
    def cards(self) -> list[ModelCard]:
        """What this worker serves."""
        return [model_card(pipeline.manifest) for pipeline in self.engine.pipelines.values()]

    async def run(self) -> None:
        """Work until `draining` is set; then finish what is in flight within the grace period, or give it back."""
        await self._unless_drained(self.outages.outlast(self.queue.check_server), grace=0)
        if not self.draining.is_set():
            async with self._background(self._announce(), self._keep_claims()):
                log.info("worker ready", worker=self.id, models=list(self.engine.pipelines))
                await self._unless_drained(self._main_loop(), grace=self.settings.drain_seconds)
                await asyncio.gather(*map(self._give_back, self.claims.values()))
            await self.outages.attempt(self.queue.retire, self.id)
        log.info("worker stopped", worker=self.id)

    async def _main_loop(self) -> None:
        while not self.draining.is_set():
            await self._tick()
        log.info("draining", jobs=len(self.claims))
        while self.engine.jobs:
            await self._work()

    async def _tick(self) -> None:
        if self.outages.reason is None:
            await self.outages.attempt(self._take_jobs)
        elif not self.claims:
            await self._unless_drained(self.outages.outlast(self.queue.ping), grace=0)
        await self._work()  # goes on in an outage; heartbeats notice its end

    async def _work(self) -> None:
        """One engine step, and what comes of it."""
        await self._heed_verdicts()
        if not self.engine.jobs:
            return
        began, began_ns = time.monotonic(), time.time_ns()
        outcomes = await in_thread(self.engine.step)
        if self.engine.last_shares:  # else nothing was evaluated: pictures were known as a whole
            patches, model = self.engine.last_evaluation
            self.metrics.evaluated(model, patches, time.monotonic() - began)
        broken = {each.job_id: each.error for each in outcomes if isinstance(each, JobBroken)}
        self.spans.stepped(self.engine.last_shares, began_ns, broken)
        for outcome in outcomes:
            await self._deliver(outcome)

    async def _take_jobs(self) -> None:
        """Claim while there is room; wait for work only when there is nothing else to do."""
        self._making_room = self._making_room and bool(self.claims)
        while self._has_room():
            claim = await self._reclaim() or await self._claim()
            if claim is None:
                return
            if claim.job.id in self.claims:
                self.claims[claim.job.id] = claim  # our own, which fell idle while nothing could be heard: it goes on
                continue
            if self._on_last_attempt(claim) and self.claims:
                # It has to run alone, so that whatever ends the worker then is its own doing: here, once what runs
                # has finished, or in a worker that happens to be idle.
                await self.outages.outlast(self.queue.release, claim)
                self._making_room = True
                return
            await self._begin(claim)

    def _has_room(self) -> bool:
        if self._making_room or self.draining.is_set() or any(map(self._on_last_attempt, self.claims.values())):
            return False
        return len(self.claims) < self.settings.max_running

    def _on_last_attempt(self, claim: Claim) -> bool:
        """Its earlier ones all ended with their worker. (With one attempt there are no earlier ones.)"""
        return 1 < self.settings.max_attempts <= claim.attempt

    async def _reclaim(self) -> Claim | None:
        if self.outages.seconds_since < self.settings.claim_idle_seconds:
            return None  # every worker seems to have been silent; those that live get time to be heard
        claim = await self.queue.reclaim(self.id, list(self.engine.pipelines))
        if claim is not None:
            self.metrics.request_reclaimed(claim.job)
            log.warning("job taken over from a silent worker", job=claim.job.id, attempt=claim.attempt)
        return claim

    async def _claim(self) -> Claim | None:
        block = 0 if self.claims else IDLE_BLOCK_SECONDS
        claiming = self.queue.claim(self.id, list(self.engine.pipelines), block_seconds=block)
        return await self._unless_drained(claiming, grace=0)

    async def _begin(self, claim: Claim) -> None:
        job = claim.job
        self.claims[job.id] = claim
        self.metrics.request_started(job)
        self.spans.begin(claim)
        log.info("job started", job=job.id, attempt=claim.attempt, model=job.request.model, n=job.request.n)
        try:
            source = await self.outages.outlast(self.queue.source, job.id) if job.request.image else None
            live = await in_thread(self.engine.admit, job, source)
        except NotFound as error:
            await self._fail(job.id, JobError(code="source_lost", message=error.message))
            return
        except InvalidRequest as error:
            await self._fail(job.id, JobError(code=error.code, message=f"{error.field}: {error.message}"))
            return
        except Exception as error:  # whatever is wrong with this job must not stop the worker
            await self._fail(job.id, job_error(job.id, error, otherwise="preparation_failed"))
            return
        steps = live.pictures[0].trajectory.sampler.evaluations
        if not await self.outages.outlast(self.queue.publish, claim, Started(attempt=claim.attempt, steps=steps)):
            self._lose(job.id)

    async def _deliver(self, outcome: Outcome) -> None:
        claim = self.claims.get(outcome.job_id)
        if claim is None:
            return
        if isinstance(outcome, PreviewMade | PatchesMade):
            event = outcome.preview if isinstance(outcome, PreviewMade) else outcome.finished
            if self.outages.reason is None:  # it may be missed: the report says it all
                await self.outages.attempt(self.queue.publish, claim, event)
        elif isinstance(outcome, PictureMade):
            await self.outages.outlast(self.queue.store_image, claim, outcome.index, outcome.data)
        elif isinstance(outcome, JobDone):
            await self._complete(claim, outcome.report)
        elif isinstance(outcome, JobBroken):
            await self._fail(outcome.job_id, outcome.error)

    async def _complete(self, claim: Claim, report: SavingsReport) -> None:
        if await self._finish(claim, Completed(report=report)):
            self._end(claim.job, JobStatus.COMPLETED, report)
            log.info(
                "job completed",
                job=claim.job.id,
                seconds=round(report.duration_seconds, 3),
                savings=round(report.savings_ratio, 3),
            )
        else:
            self._lose(claim.job.id)

    async def _fail(self, job_id: str, error: JobError) -> None:
        claim = self.claims[job_id]
        if await self._finish(claim, Failed(error=error)):
            self._end(claim.job, JobStatus.FAILED, error=error)
            log.warning("job failed", job=job_id, code=error.code, reason=error.message)
        else:
            self._lose(job_id)

    async def _finish(self, claim: Claim, event: Completed | Failed | Cancelled) -> bool:
        """End the job so; False if it is not ours to end. A call repeated after an outage may have done it before."""
        if await self.outages.outlast(self.queue.finish, claim, event):
            return True
        try:
            job = await self.outages.outlast(self.queue.get, claim.job.id)
        except NotFound:
            return False
        return job.status.terminal and job.attempt == claim.attempt and terminal_event(job) == event

    async def _heed_verdicts(self) -> None:
        """Drop, before the next step, what was cancelled or taken over."""
        verdicts, self._verdicts = self._verdicts, {}
        for job_id, (heard_for, verdict) in verdicts.items():
            claim = self.claims.get(job_id)
            if claim is None or claim != heard_for:
                continue  # the verdict is on an earlier claim
            self.engine.drop(job_id)
            if verdict is Heartbeat.LOST or not await self._finish(claim, Cancelled()):
                self._lose(job_id)
            else:
                self._end(claim.job, JobStatus.CANCELLED)
                log.info("job cancelled", job=job_id)

    def _end(
        self, job: Job, status: JobStatus, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        self.claims.pop(job.id, None)
        self.engine.drop(job.id)
        self.metrics.request_finished(job, report, status, error.code if error else None)
        self.spans.end(job.id, status.value, report, error)
        self._news.set()

    def _lose(self, job_id: str) -> None:
        """The job is no longer ours: its new owner will end it."""
        claim = self.claims.pop(job_id, None)
        self.engine.drop(job_id)
        if claim is not None:
            self.metrics.request_lost(claim.job)
            self.spans.end(job_id, "lost")
            log.warning("claim lost", job=job_id, attempt=claim.attempt)

    async def _give_back(self, claim: Claim) -> None:
        """Another worker may run the job, with no attempt charged. If that cannot be told, it finds out in time."""
        if await self.outages.attempt(self.queue.release, claim):
            log.info("job given back", job=claim.job.id, attempt=claim.attempt)
        self.engine.drop(claim.job.id)
        self.metrics.request_released(claim.job)
        self.spans.end(claim.job.id, "given_back")

    def _ended_in_queue(self, job: Job) -> None:
        """A call from here ended a job that no worker holds."""
        self.metrics.request_ended_in_queue(job)
        tracing.ended_in_queue(job)
        if job.error is not None:
            log.error("job dead-lettered", job=job.id, attempts=job.attempt, reason=job.error.message)

    async def _unless_drained(self, work: Coroutine[Any, Any, T], grace: float) -> T | None:
        """Do the work, but cancel it ``grace`` seconds after a drain began; None if that was before its end."""
        working, draining = asyncio.create_task(work), asyncio.create_task(self.draining.wait())
        try:
            await asyncio.wait({working, draining}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({working}, timeout=grace)
        finally:
            draining.cancel()
            working.cancel()
            await asyncio.wait({working})  # a claim that is cut short gives back what it may just have taken
        return None if working.cancelled() else working.result()

    async def _keep_claims(self) -> None:
        """Beat for every claim; note those cancelled or lost, for the main loop to heed before its next step."""
        while True:
            for claim in list(self.claims.values()):
                verdict = await self.outages.attempt(self.queue.heartbeat, claim)
                if verdict is not None and verdict is not Heartbeat.OK:
                    self._verdicts[claim.job.id] = claim, verdict
            await asyncio.sleep(min(CLAIM_CHECK_SECONDS, self.settings.claim_idle_seconds / 4))

    async def _announce(self) -> None:
        """Tell gateways what is served here, and how it goes."""
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
    async def _background(self, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Run these beside the body. One that breaks ends the worker, for without them its jobs would be lost to it."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            yield
            for task in tasks:
                task.cancel()
