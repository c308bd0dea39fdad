"""The worker: runs in the engine the jobs that its links take from the queue servers, and handles draining."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import ChainMap, deque
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry
from ulid import ULID

from patchforge.model.flops import patch_flops
from patchforge.model.pipeline import Pipeline
from patchforge.service import tracing
from patchforge.service.errors import InvalidRequest, NotFound, ResultsElsewhere
from patchforge.service.messages.endings import unsupported
from patchforge.service.messages.events import Cancelled, Completed, Failed, Started
from patchforge.service.messages.protocol import digest_need
from patchforge.service.messages.schemas import Job, JobError, JobStatus, ModelCard, SavingsReport
from patchforge.service.messages.source import Source
from patchforge.service.queue import Backlog as QueueBacklog
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.results.metrics import watch_store
from patchforge.service.settings import Settings
from patchforge.service.threads import in_thread
from patchforge.service.worker.cards import model_card
from patchforge.service.worker.device_metrics import register_host
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.link import Link, first_usable
from patchforge.service.worker.metrics import WorkerMetrics
from patchforge.service.worker.outbox import Message
from patchforge.service.worker.outcomes import JobBroken, JobDone, Outcome, PatchesMade, PictureMade, PreviewMade
from patchforge.service.worker.pace import Backlog
from patchforge.service.worker.pacer import Pacer
from patchforge.service.worker.previews import PreviewPace
from patchforge.service.worker.scheduler import Scheduler
from patchforge.service.worker.spans import JobSpans
from patchforge.service.worker.transfers import Transfers, outlast_store
from patchforge.service.worker.trouble import job_error
from patchforge.service.worker.uploads import Uploads

log = structlog.get_logger()
T = TypeVar("T")

BACKLOG_SECONDS = 0.25
PARENT_SECONDS = 2.0  # between looks whether the parent process is there


class Worker:
    """Runs several jobs at once: startup, run until told to stop, drain, shutdown."""

    def __init__(
        self,
        settings: Settings,
        queues: Sequence[JobQueue],
        pipelines: dict[str, Pipeline],
        patch_budgets: Mapping[str, int],
        parent: int | None = None,
    ) -> None:
        """`queues`: that of each queue server. `patch_budgets`: most patches per evaluation of each model.

        Drains when the process `parent` is gone.
        """
        self.settings = settings
        self.id = f"{socket.gethostname()}-{os.getpid()}-{str(ULID())[-6:]}"
        previews = PreviewPace(settings.preview_interval_seconds, settings.preview_share)
        target = settings.target_latency if settings.degrade else None
        self.pacer = Pacer(pipelines, patch_budgets, settings.min_quality, target)
        scheduler = Scheduler(patch_budgets, self.pacer.limits)
        self.engine = Engine(pipelines, scheduler, previews, settings.cache_bytes, self.pacer)
        self.registry = CollectorRegistry()
        flops = {name: patch_flops(pipeline.manifest) for name, pipeline in pipelines.items()}
        self.metrics = WorkerMetrics(self.registry, patch_budgets, flops)
        self._objects = queues[0].objects
        watch_store(self._objects, self.registry)
        register_host(self.registry, {pipeline.device for pipeline in pipelines.values()})
        self.spans = JobSpans()
        self.links = [Link(queue, self, only=len(queues) == 1) for queue in queues]
        self.claims: Mapping[str, Claim] = ChainMap(*(link.claims for link in self.links))
        """Claims of all links, by job; each of them is in the link that took it."""
        self.draining = asyncio.Event()
        self.room_made = asyncio.Event()
        self.transfers = Transfers()
        self._uploads = Uploads(queues[0], self.transfers, self._tell, self.discard, settings.results_preview_bytes)
        self._fetched: list[tuple[str, Source | NotFound]] = []
        """Jobs to admit, with the pictures that they edit."""
        self._parent = parent
        self._work = asyncio.Event()
        """Set when the main loop may have something to do: it sleeps only without jobs."""
        self._new: deque[Claim] = deque()
        """Claimed jobs that are not prepared yet."""
        self._verdicts: dict[str, tuple[Claim, Heartbeat]] = {}
        self._making_room = False
        self._being_claimed = 0
        for queue in queues:
            queue.capabilities |= {digest_need(pipeline.digest) for pipeline in pipelines.values()}

    @property
    def models(self) -> list[str]:
        return list(self.engine.pipelines)

    @property
    def claim_idle_seconds(self) -> float:
        return self.settings.claim_idle_seconds

    @property
    def cards(self) -> list[ModelCard]:
        """The models that this worker serves."""
        now = time.monotonic()
        cards = []
        for each in self.engine.pipelines.values():
            card = model_card(each.manifest, weights_sha256=each.weights_sha256, digest=each.digest)
            first, more = self.pacer.least_seconds(card.name, now) or (None, None)
            measured = {"usual_seconds": self.pacer.usual_seconds(card.name), "least_seconds": first}
            cards.append(card.model_copy(update=measured | {"least_seconds_more": more}))
        return cards

    def announcement(self) -> tuple[list[ModelCard], bytes]:
        return self.cards, self.metrics.exposition()

    async def run(self) -> None:
        """Work until `draining` is set. Then finish the running jobs within the grace period, or give them back."""
        await self._unless_drained(first_usable(self.links), grace=0)
        if not self.draining.is_set():
            async with self._background(
                *(link.run() for link in self.links), self._look_at_backlog(), self._watch_parent()
            ) as self.transfers.group:
                log.info("worker ready", worker=self.id, models=self.models)
                async with self._background(*(link.outbox.run() for link in self.links)):
                    await self._unless_drained(self._main_loop(), grace=self.settings.drain_seconds)
                await asyncio.gather(*map(self._give_back_job, self.claims.values()))
            await asyncio.gather(*(link.outages.attempt(link.queue.retire, self.id) for link in self.links))
        log.info("worker stopped", worker=self.id)

    async def _main_loop(self) -> None:
        async with self._background(*(link.take_jobs() for link in self.links)):
            while not self.draining.is_set():
                if not await self._work_once():
                    await self._unless_drained(self._work.wait(), grace=0)
        log.info("draining", jobs=len(self.claims))
        while self.claims:
            if not await self._work_once():
                await self._work.wait()

    async def _work_once(self) -> bool:
        """Drop and prepare jobs, and make one step. Returns False if there was nothing to do."""
        self._work.clear()
        await self._apply_verdicts()
        while self._new:
            await self._start_job(self._new.popleft())
        await self._admit_fetched()
        if not self.engine.jobs:
            return False
        await self._step_engine()  # continues during an outage; heartbeats notice when it is over
        return True

    async def _step_engine(self) -> None:
        """Make one engine step and deliver its results."""
        began, began_ns = time.monotonic(), time.time_ns()
        outcomes = await in_thread(self.engine.step)
        if self.engine.last_shares:  # otherwise nothing was evaluated: all patches were known
            patches, model = self.engine.last_evaluation
            self.metrics.evaluated(model, patches, time.monotonic() - began)
        broken = {each.job_id: each.error for each in outcomes if isinstance(each, JobBroken)}
        self.spans.stepped(self.engine.last_shares, began_ns, broken)
        for outcome in outcomes:
            await self._deliver_outcome(outcome)

    async def _look_at_backlog(self) -> None:
        """Tell the pacer what waits. Only a full worker asks: any other takes what waits."""
        while True:
            backlogs = {}
            if len(self.claims) >= self.settings.max_running:
                usable = [link for link in self.links if link.outages.reason is None]
                answers = await asyncio.gather(*(link.outages.attempt(link.queue.backlog) for link in usable))
                seen = QueueBacklog.together([each for each in answers if each is not None])
                workers = max(1, seen.workers)
                backlogs = {
                    model: Backlog(jobs / workers, seen.oldest.get(model, 0.0)) for model, jobs in seen.hurried.items()
                }
            self.pacer.backlogs = backlogs
            await asyncio.sleep(BACKLOG_SECONDS)

    async def _watch_parent(self) -> None:
        while True:
            if self._parent is not None and os.getppid() != self._parent:
                log.warning("the process that started this worker is gone")
                self.draining.set()
            await asyncio.sleep(PARENT_SECONDS)

    @property
    def occupants(self) -> Sequence[Claim]:
        return [claim for link in self.links for claim in link.list_occupants()]

    def has_room(self) -> bool:
        occupants = self.occupants
        self._making_room = self._making_room and bool(occupants)
        if self._making_room or self.draining.is_set() or any(map(self.must_run_alone, occupants)):
            return False
        return len(occupants) + self._being_claimed < self.settings.max_running

    @contextlib.contextmanager
    def reserve_room(self) -> Iterator[None]:
        self._being_claimed += 1
        try:
            yield
        finally:
            self._being_claimed -= 1
            self.room_made.set()  # if no job came, another link may have it

    def must_run_alone(self, claim: Claim) -> bool:
        """Whether all earlier attempts ended with their worker. If only one attempt is allowed, there are none."""
        return 1 < self.settings.max_attempts <= claim.attempt

    def wait_for_empty_room(self) -> None:
        self._making_room = True

    def wake(self) -> None:
        self._work.set()

    def begin(self, claim: Claim) -> None:
        self._new.append(claim)

    def note_taken_over(self, claim: Claim) -> None:
        self.metrics.request_reclaimed(claim.job)
        log.warning("job taken over: its worker stopped responding", job=claim.job.id, attempt=claim.attempt)

    def _link_of(self, job_id: str) -> Link:
        """The link that holds a job; any one if none does, which then drops what it should send."""
        return next((link for link in self.links if job_id in link.claims), self.links[0])

    async def _tell(self, message: Message) -> None:
        await self._link_of(message.job_id).outbox.put(message)

    async def _start_job(self, claim: Claim) -> None:
        job = claim.job
        self.metrics.request_started(job)
        self.spans.begin(claim)
        log.info("job started", job=job.id, attempt=claim.attempt, model=job.request.model, n=job.request.n)
        if job.unreadable is not None:
            await self._tell_failure(job.id, unsupported(job.unreadable))
        elif job.request.image and (self._objects is not None or len(self.links) > 1):  # its server may be away
            self.transfers.begin(job.id, self._fetch_source(job.id))
        else:
            await self._admit_job(claim)

    async def _fetch_source(self, job_id: str) -> None:
        """Fetch the picture that a job edits, from a store that may be away. The main loop then admits the job."""
        link = self._link_of(job_id)
        try:
            source: Source | NotFound = await outlast_store(link.outages.outlast, link.queue.source, job_id)
        except NotFound as error:
            source = error
        except ResultsElsewhere as error:  # it will not come back
            source = NotFound(error.message)
        self._fetched.append((job_id, source))
        self._work.set()

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
                link = self._link_of(job.id)
                source = await link.outages.outlast(link.queue.source, job.id)
            live = await in_thread(self.engine.admit, job, source)
        except NotFound as error:
            await self._tell_failure(job.id, JobError(code="source_lost", message=error.message))
            return
        except InvalidRequest as error:
            await self._tell_failure(job.id, JobError(code=error.code, message=f"{error.field}: {error.message}"))
            return
        except Exception as error:  # a faulty job must not stop the worker
            await self._tell_failure(job.id, job_error(job.id, error, otherwise="preparation_failed"))
            return
        steps = live.pictures[0].trajectory.sampler.evaluations
        started = Started(attempt=claim.attempt, steps=steps)
        await self._tell(Message(job.id, started, patient=job.quiet))

    async def _deliver_outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, PreviewMade | PatchesMade):
            event = outcome.preview if isinstance(outcome, PreviewMade) else outcome.finished
            link, claim = self._link_of(outcome.job_id), self.claims.get(outcome.job_id)
            if link.outages.reason is None and claim is not None:
                message = Message(outcome.job_id, event, patient=not claim.job.request.previews)
                if self._objects is None or not self._uploads.take_event(claim, event.index, message):
                    await self._tell(message)
        elif isinstance(outcome, PictureMade):
            if self._objects is None:
                await self._tell(Message(outcome.job_id, (outcome.index, outcome.data)))
            elif (claim := self.claims.get(outcome.job_id)) is not None:
                self._uploads.take_picture(claim, outcome)
        elif isinstance(outcome, JobDone):
            done = Message(outcome.job_id, Completed(report=outcome.report))
            if self._objects is None:
                await self._tell(done)
            else:  # its pictures may still be on their way
                self.transfers.follow(outcome.job_id, lambda: self._tell(done))
        elif isinstance(outcome, JobBroken):
            await self._tell_failure(outcome.job_id, outcome.error)

    async def _tell_failure(self, job_id: str, error: JobError) -> None:
        self.transfers.drop(job_id)
        await self._tell(Message(job_id, Failed(error=error)))

    def discard(self, message: Message) -> None:
        """Delete what a message that the queue did not take has in the object store."""
        if message.stored is not None:
            assert self.transfers.group is not None
            queue = self.links[0].queue  # all use one store
            with contextlib.suppress(RuntimeError):  # the worker breaks off: then the bucket's rule deletes it
                self.transfers.group.create_task(queue.discard_picture(message.stored))  # it may be slow

    def record_end(self, claim: Claim, event: Completed | Failed | Cancelled) -> None:
        job = claim.job
        if isinstance(event, Completed):
            report = event.report
            self._end_job(job, JobStatus.COMPLETED, report)
            took, saved = round(report.duration_seconds, 3), round(report.savings_ratio, 3)
            log.info("job completed", job=job.id, seconds=took, savings=saved)
        elif isinstance(event, Failed):
            self._end_job(job, JobStatus.FAILED, error=event.error)
            log.warning("job failed", job=job.id, code=event.error.code, reason=event.error.message)
        else:
            self._end_job(job, JobStatus.CANCELLED)
            log.info("job cancelled", job=job.id)

    def note_verdict(self, claim: Claim, verdict: Heartbeat) -> None:
        """Let the main loop drop a job before its next step."""
        self._verdicts[claim.job.id] = claim, verdict
        self._work.set()

    async def _apply_verdicts(self) -> None:
        """Drop cancelled and lost jobs before the next step."""
        verdicts, self._verdicts = self._verdicts, {}
        for job_id, (heard_for, verdict) in verdicts.items():
            claim = self.claims.get(job_id)
            if claim is None or claim != heard_for or self._link_of(job_id).outbox.ends(job_id):
                continue  # the verdict was about an earlier claim, or comes after the job's end
            self.engine.drop(job_id)
            self.transfers.drop(job_id)
            self._new = deque(each for each in self._new if each.job.id != job_id)
            self._fetched = [each for each in self._fetched if each[0] != job_id]
            if verdict is Heartbeat.LOST:
                self.drop_lost_job(job_id)
            else:
                await self._tell(Message(job_id, Cancelled()))

    def _end_job(
        self, job: Job, status: JobStatus, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        self._forget_claim(job.id)
        self.transfers.drop(job.id)
        self.metrics.request_finished(job, report, status, error.code if error else None)
        self.spans.end(job.id, status.value, report, error)
        for event in (*(link.news for link in self.links), self.room_made, self._work):
            event.set()

    def _forget_claim(self, job_id: str) -> Claim | None:
        link = self._link_of(job_id)
        link.refused.pop(job_id, None)
        return link.claims.pop(job_id, None)

    def drop_lost_job(self, job_id: str) -> None:
        """Drop a job that is no longer ours; its new owner will end it."""
        claim = self._forget_claim(job_id)
        self.transfers.drop(job_id)
        if claim is not None:
            self.metrics.request_lost(claim.job)
            self.spans.end(job_id, "lost")
            log.warning("claim lost", job=job_id, attempt=claim.attempt)
        for event in (self.room_made, self._work):
            event.set()

    async def _give_back_job(self, claim: Claim) -> None:
        """Return the job to the queue without using up an attempt. If the queue is away, its claim simply expires."""
        self.transfers.drop(claim.job.id)
        if await self._link_of(claim.job.id).give_back(claim):
            log.info("job given back", job=claim.job.id, attempt=claim.attempt)
        self.engine.drop(claim.job.id)
        self.metrics.request_released(claim.job)
        self.spans.end(claim.job.id, "given_back")

    def record_ended_in_queue(self, job: Job) -> None:
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

    @contextlib.asynccontextmanager
    async def _background(self, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.TaskGroup]:
        """Run loops beside the body. If one breaks, the worker ends: without them, it would lose its jobs."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            yield group
            for task in tasks:
                task.cancel()
