"""The worker process: queue on one side, engine on the other, signals and draining between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from ulid import ULID

from model.bundle import list_bundles
from model.device import use_threads
from model.pipeline import Pipeline
from service.errors import InvalidRequest, Unavailable
from service.metrics import WorkerMetrics
from service.queue import Claim, Heartbeat, JobQueue
from service.schemas import Cancelled, Completed, Failed, Job, JobError, JobStatus, ModelCard, SavingsReport, Started
from service.settings import Settings
from service.worker.cards import model_card
from service.worker.engine import Engine, JobBroken, JobDone, Outcome, PictureMade, PreviewMade

log = structlog.get_logger()
P = ParamSpec("P")
T = TypeVar("T")

ANNOUNCE_SECONDS = 2.0
CLAIM_CHECK_SECONDS = 0.1
IDLE_BLOCK_SECONDS = 1.0
RETRY_SECONDS = 0.5


class Worker:
    """Keeps several jobs in flight: startup, run until told to stop, drain, shutdown."""

    def __init__(
        self, settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline], parent: int | None = None
    ) -> None:
        """``parent`` is the process to outlive by no more than a drain."""
        self.settings = settings
        self.queue = queue
        self.id = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        self.engine = Engine(pipelines, settings.patch_budget, settings.preview_interval_seconds)
        self.registry = CollectorRegistry()
        self.metrics = WorkerMetrics(self.registry)
        self.claims: dict[str, Claim] = {}
        self.draining = asyncio.Event()
        self._parent = parent
        self._news = asyncio.Event()
        self._verdicts: dict[str, Heartbeat] = {}
        queue.on_ended = self.metrics.request_ended_in_queue

    @property
    def cards(self) -> list[ModelCard]:
        """What this worker serves."""
        return [model_card(pipeline.manifest) for pipeline in self.engine.pipelines.values()]

    async def run(self) -> None:
        """Work until `draining` is set, then finish or give back what is in flight."""
        await self._until_available(self.queue.check_server)
        async with self._background(self._announce(), self._keep_claims()):
            log.info("worker ready", worker=self.id, models=list(self.engine.pipelines))
            while not self.draining.is_set():
                await self._tick()
            await self._drain()
        with contextlib.suppress(Unavailable):
            await self.queue.retire(self.id)
        log.info("worker stopped", worker=self.id)

    async def _tick(self) -> None:
        try:
            await self._take_jobs()
        except Unavailable as error:
            log.warning("queue server away", error=str(error))
            if not self.claims:
                await asyncio.sleep(RETRY_SECONDS)
        await self._work()

    async def _work(self) -> None:
        """One engine step, and what comes of it."""
        await self._heed_verdicts()
        if not self.engine.jobs:
            return
        outcomes = await asyncio.to_thread(self.engine.step)
        patches, model = self.engine.last_evaluation
        self.metrics.evaluated(model, patches)
        for outcome in outcomes:
            await self._deliver(outcome)

    async def _take_jobs(self) -> None:
        """Claim while there is room; wait for work only when there is nothing else to do."""
        models = list(self.engine.pipelines)
        while len(self.claims) < self.settings.max_running and not self.draining.is_set():
            claim = await self.queue.reclaim(self.id, models) or await self._claim(models)
            if claim is None:
                return
            await self._begin(claim)

    async def _claim(self, models: list[str]) -> Claim | None:
        if self.claims:
            return await self.queue.claim(self.id, models, block_seconds=0)
        claiming = asyncio.ensure_future(self.queue.claim(self.id, models, block_seconds=IDLE_BLOCK_SECONDS))
        stopping = asyncio.ensure_future(self.draining.wait())
        await asyncio.wait({claiming, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not claiming.done():
            claiming.cancel()  # the queue gives back what it may just have taken
            await asyncio.wait({claiming})
        return None if claiming.cancelled() else claiming.result()

    async def _begin(self, claim: Claim) -> None:
        job = claim.job
        self.claims[job.id] = claim
        self.metrics.request_started(job)
        log.info("job started", job=job.id, attempt=claim.attempt, model=job.request.model, n=job.request.n)
        try:
            live = await asyncio.to_thread(self.engine.admit, job)
        except InvalidRequest as error:
            await self._fail(job.id, JobError(code=error.code, message=f"{error.field}: {error.message}"))
            return
        except Exception as error:  # whatever is wrong with this job must not stop the worker
            log.exception("job could not be prepared", job=job.id)
            await self._fail(job.id, JobError(code="preparation_failed", message=type(error).__name__))
            return
        steps = live.pictures[0].trajectory.sampler.evaluations
        if not await self._until_available(self.queue.publish, claim, Started(attempt=claim.attempt, steps=steps)):
            self._leave(job.id)

    async def _deliver(self, outcome: Outcome) -> None:
        claim = self.claims.get(outcome.job_id)
        if claim is None:
            return
        if isinstance(outcome, PreviewMade):
            with contextlib.suppress(Unavailable):  # a preview may be missed
                await self.queue.publish(claim, outcome.preview)
        elif isinstance(outcome, PictureMade):
            await self._until_available(self.queue.store_image, claim, outcome.index, outcome.data)
        elif isinstance(outcome, JobDone):
            await self._complete(claim, outcome.report)
        elif isinstance(outcome, JobBroken):
            await self._fail(outcome.job_id, outcome.error)

    async def _complete(self, claim: Claim, report: SavingsReport) -> None:
        if await self._until_available(self.queue.finish, claim, Completed(report=report)):
            self._end(claim.job, JobStatus.COMPLETED, report)
            log.info(
                "job completed",
                job=claim.job.id,
                seconds=round(report.duration_seconds, 3),
                savings=round(report.savings_ratio, 3),
            )
        else:
            self._leave(claim.job.id)

    async def _fail(self, job_id: str, error: JobError) -> None:
        claim = self.claims[job_id]
        if await self._until_available(self.queue.finish, claim, Failed(error=error)):
            self._end(claim.job, JobStatus.FAILED)
            log.warning("job failed", job=job_id, code=error.code, reason=error.message)
        else:
            self._leave(job_id)

    async def _heed_verdicts(self) -> None:
        """Drop, before the next step, what was cancelled or taken over."""
        verdicts, self._verdicts = self._verdicts, {}
        for job_id, verdict in verdicts.items():
            claim = self.claims.get(job_id)
            if claim is None:
                continue
            self.engine.drop(job_id)
            if verdict is Heartbeat.LOST or not await self._until_available(self.queue.finish, claim, Cancelled()):
                self._leave(job_id)
            else:
                self._end(claim.job, JobStatus.CANCELLED)
                log.info("job cancelled", job=job_id)

    def _end(self, job: Job, status: JobStatus, report: SavingsReport | None = None) -> None:
        self.claims.pop(job.id, None)
        self.engine.drop(job.id)
        self.metrics.request_finished(job, report, status)
        self._news.set()

    def _leave(self, job_id: str) -> None:
        """The job is no longer ours; its new owner will end it."""
        claim = self.claims.pop(job_id, None)
        self.engine.drop(job_id)
        if claim is not None:
            self.metrics.request_left(claim.job)
            log.warning("claim lost", job=job_id, attempt=claim.attempt)

    async def _until_available(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """Repeat a call until the queue server answers; all of the queue's calls may be repeated."""
        while True:
            try:
                return await call(*args, **kwargs)
            except Unavailable as error:
                log.warning("queue server away; trying again", error=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _drain(self) -> None:
        """Finish what is in flight within the grace period, then give the rest back, no attempt charged."""
        log.info("draining", jobs=len(self.claims))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.settings.drain_seconds):
                while self.engine.jobs:
                    await self._work()
        for claim in list(self.claims.values()):
            with contextlib.suppress(Unavailable):
                await self.queue.release(claim)
            self._leave(claim.job.id)

    async def _keep_claims(self) -> None:
        """Beat for every claim; note those cancelled or lost, for the main loop to heed before its next step."""
        while True:
            for claim in list(self.claims.values()):
                with contextlib.suppress(Unavailable):
                    verdict = await self.queue.heartbeat(claim)
                    if verdict is not Heartbeat.OK:
                        self._verdicts[claim.job.id] = verdict
            await asyncio.sleep(min(CLAIM_CHECK_SECONDS, self.settings.claim_idle_seconds / 4))

    async def _announce(self) -> None:
        """Tell gateways what is served here, and how it goes."""
        while True:
            if self._parent is not None and os.getppid() != self._parent:
                log.warning("the process that started this worker is gone")
                self.draining.set()
            with contextlib.suppress(Unavailable):
                await self.queue.announce(self.id, self.cards)
                await self.queue.announce_metrics(self.id, self.metrics.exposition())
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_SECONDS):
                    await self._news.wait()

    @contextlib.asynccontextmanager
    async def _background(self, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(loop) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def load_pipelines(settings: Settings) -> dict[str, Pipeline]:
    """The bundles to serve, loaded, by name.

    Raises:
        BundleError: one is broken.
        InvalidRequest: a model asked for is not there, or there is none at all.
    """
    bundles = {bundle.name: bundle for bundle in list_bundles(settings.bundle_dir)}
    missing = [name for name in settings.models if name not in bundles]
    if missing or not bundles:
        there = ", ".join(bundles) or "none"
        raise InvalidRequest(
            f"no bundle named {', '.join(missing)} in {settings.bundle_dir}; there: {there}", field="models"
        )
    return {name: Pipeline(bundles[name]) for name in settings.models or bundles}


async def serve_worker(settings: Settings, redis_url: str, parent: int | None = None) -> None:
    """Run a worker until SIGTERM or SIGINT, or until the process ``parent`` is gone."""
    use_threads(settings.threads)
    pipelines = await asyncio.to_thread(load_pipelines, settings)
    queue = JobQueue.connect(redis_url, settings)
    worker = Worker(settings, queue, pipelines, parent)
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, worker.draining.set)
    server = None
    if settings.worker_metrics_port:
        server, _ = start_http_server(settings.worker_metrics_port, settings.host, worker.registry)
    try:
        await worker.run()
    finally:
        if server is not None:
            server.shutdown()
        await queue.close()
