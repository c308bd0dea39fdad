"""The worker: takes jobs from the queue, runs them in the engine, and handles outages and draining."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from prometheus_client import CollectorRegistry
from ulid import ULID

from patchforge.model.flops import patch_flops
from patchforge.model.pipeline import Pipeline
from patchforge.service import tracing
from patchforge.service.errors import InvalidRequest, NotFound, ResultsElsewhere, Unavailable
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
from patchforge.service.worker.outages import RETRY_SECONDS, Outages
from patchforge.service.worker.outbox import Message, Outbox
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
NEWS_SECONDS = 1.0  # between two announcements, if jobs ended meanwhile
KEEP_SECONDS = 1.0  # between heartbeats
LOOK_SECONDS = 1.0  # between looks for jobs, if nobody rings
YIELD_SECONDS = 0.2  # how long a busy worker waits for a job before it goes to the back of the line of workers
BACKLOG_SECONDS = 0.25
CALL_SECONDS = 2.0


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
        self.outbox = Outbox(self._send)
        self.transfers = Transfers()
        self._fetched: list[tuple[str, Source | NotFound]] = []
        """Jobs to admit, with the pictures that they edit."""
        self._parent = parent
        self._news = asyncio.Event()
        self._work = asyncio.Event()
        """Set when the main loop may have something to do: it sleeps only without jobs."""
        self._room = asyncio.Event()
        """Set when the worker may have room for another job."""
        self._called = asyncio.Event()
        """Set when a job may have been cancelled."""
        self._new: deque[Claim] = deque()
        """Claimed jobs that are not prepared yet."""
        self._verdicts: dict[str, tuple[Claim, Heartbeat]] = {}
        self._refused: dict[str, Claim] = {}
        """Held jobs of which the queue refused something: it is gone, so no later claim may continue with them."""
        self._making_room = False
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
            async with self._background(
                self._announce_models(), self._keep_claims(), self._listen_for_calls(), self._look_at_backlog()
            ) as self.transfers.group:
                log.info("worker ready", worker=self.id, models=list(self.engine.pipelines))
                async with self._background(self.outbox.run()):
                    await self._unless_drained(self._main_loop(), grace=self.settings.drain_seconds)
                await asyncio.gather(*map(self._give_back_job, self.claims.values()))
            await self.outages.attempt(self.queue.retire, self.id)
        log.info("worker stopped", worker=self.id)

    async def _main_loop(self) -> None:
        async with self._background(self._take_jobs()):
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

    async def _take_jobs(self) -> None:
        """Claim jobs while there is room, beside the engine. Wait for a bell if there are none."""
        while True:
            self._room.clear()
            if self._has_room() and self.outages.reason is None and await self._take_job():
                continue
            self._work.set()  # only now, so that jobs which waited together begin together
            if not self._has_room():
                await self._room.wait()
            elif self.outages.reason is not None:
                await self._await_server()
            else:
                await self._wait_for_job()

    async def _take_job(self) -> bool:
        """Claim a job. Returns False if no other job waits, or the queue is away."""
        # During an outage all workers seemed silent. So let the live ones send heartbeats first.
        take_over = self.outages.seconds_since >= self.settings.claim_idle_seconds
        models = list(self.engine.pipelines)
        claim = await self.outages.attempt(self.queue.claim, self.id, models, block_seconds=0, take_over=take_over)
        if claim is None:
            return False
        if claim.taken_over:
            self.metrics.request_reclaimed(claim.job)
            log.warning("job taken over: its worker stopped responding", job=claim.job.id, attempt=claim.attempt)
        if claim.job.id in self._refused:
            await self._pass_on(claim)
        elif claim.job.id in self.claims:
            self.claims[claim.job.id] = claim  # it was already ours, but idle during an outage: continue with it
        elif self._on_last_attempt(claim) and self.claims:
            # It must run alone: if the worker dies then, this job is the cause. So it waits until the running jobs
            # are finished, or goes to a worker that is idle.
            await self._pass_on(claim)
            self._making_room = True
        else:
            self.claims[claim.job.id] = claim
            self._new.append(claim)
        return not claim.last

    async def _pass_on(self, claim: Claim) -> None:
        """Give back a job before it has started. Draining must not interrupt that: the job would lose an attempt."""
        try:
            await self.outages.outlast(self.queue.release, claim)
        except asyncio.CancelledError:
            await self.outages.attempt(self.queue.release, claim)
            raise

    async def _wait_for_job(self) -> None:
        """Wait for a bell, but not for longer than `LOOK_SECONDS`.

        The queue server wakes the worker that has waited longest. A busy worker waits in short turns, so that jobs go
        to idle workers first.
        """
        look_at = time.monotonic() + LOOK_SECONDS
        while (left := look_at - time.monotonic()) > 0:
            turn = min(left, YIELD_SECONDS) if self.claims else left
            try:
                if await self.queue.wait_for_job(list(self.engine.pipelines), turn):
                    return
            except Unavailable as error:  # all workers seem silent then, so nobody's job is to be taken over
                self.outages.failed(error)
                return

    async def _await_server(self) -> None:
        """Wait until the queue can be used again. With jobs, heartbeats notice that."""
        if self.claims:
            await asyncio.sleep(RETRY_SECONDS)
        else:
            await self.outages.outlast(self.queue.ping)

    async def _look_at_backlog(self) -> None:
        """Tell the pacer what waits. Only a full worker asks: any other takes what waits."""
        while True:
            backlogs = {}
            if len(self.claims) >= self.settings.max_running and (
                seen := await self.outages.attempt(self.queue.backlog)
            ):
                workers = max(1, seen.workers)
                backlogs = {
                    model: Backlog(jobs / workers, seen.oldest.get(model, 0.0)) for model, jobs in seen.hurried.items()
                }
            self.pacer.backlogs = backlogs
            await asyncio.sleep(BACKLOG_SECONDS)

    def _has_room(self) -> bool:
        self._making_room = self._making_room and bool(self.claims)
        if self._refused or self._making_room or self.draining.is_set():
            return False
        if any(map(self._on_last_attempt, self.claims.values())):
            return False
        return len(self.claims) < self.settings.max_running

    def _on_last_attempt(self, claim: Claim) -> bool:
        """Whether all earlier attempts ended with their worker. If only one attempt is allowed, there are none."""
        return 1 < self.settings.max_attempts <= claim.attempt

    async def _start_job(self, claim: Claim) -> None:
        job = claim.job
        self.metrics.request_started(job)
        self.spans.begin(claim)
        log.info("job started", job=job.id, attempt=claim.attempt, model=job.request.model, n=job.request.n)
        if job.unreadable is not None:
            await self._tell_failure(job.id, unsupported(job.unreadable))
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
                source = await self.outages.outlast(self.queue.source, job.id)
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
        await self.outbox.put(Message(job.id, started, patient=job.quiet))

    async def _deliver_outcome(self, outcome: Outcome) -> None:
        if isinstance(outcome, PreviewMade | PatchesMade):
            event = outcome.preview if isinstance(outcome, PreviewMade) else outcome.finished
            if self.outages.reason is None and (claim := self.claims.get(outcome.job_id)) is not None:
                await self.outbox.put(Message(outcome.job_id, event, patient=not claim.job.request.previews))
        elif isinstance(outcome, PictureMade):
            if self.queue.objects is None:
                await self.outbox.put(Message(outcome.job_id, (outcome.index, outcome.data)))
            elif (claim := self.claims.get(outcome.job_id)) is not None:
                self.transfers.begin(outcome.job_id, self._upload(claim, outcome))
        elif isinstance(outcome, JobDone):
            done = Message(outcome.job_id, Completed(report=outcome.report))
            if self.queue.objects is None:
                await self.outbox.put(done)
            else:  # its pictures may still be on their way
                self.transfers.follow(outcome.job_id, lambda: self.outbox.put(done))
        elif isinstance(outcome, JobBroken):
            await self._tell_failure(outcome.job_id, outcome.error)

    async def _upload(self, claim: Claim, made: PictureMade) -> None:
        """Put a picture into the object store, then tell the queue where it is."""
        picture = await outlast_store(self.queue.put_picture, claim, made.index, made.data)
        await self.outbox.put(Message(made.job_id, (made.index, picture)))

    async def _tell_failure(self, job_id: str, error: JobError) -> None:
        self.transfers.drop(job_id)
        await self.outbox.put(Message(job_id, Failed(error=error)))

    async def _send(self, messages: Sequence[Message]) -> None:
        """Deliver messages about jobs that are still ours. Repeat that after an outage: all of it is safe to repeat."""
        new = True  # otherwise the queue may have taken them without an answer
        while True:
            ours = [(each, claim) for each in messages if (claim := self.claims.get(each.job_id)) is not None]
            if new:
                for each in messages:
                    if each.job_id not in self.claims:
                        self._discard(each)
            messages = [each for each, _ in ours]
            try:
                results = await self.queue.deliver([each.delivery(claim) for each, claim in ours]) if ours else []
            except Unavailable as error:
                self.outages.failed(error)
                new = False
                messages = [each for each in messages if not each.may_be_lost]
                await asyncio.sleep(RETRY_SECONDS)
                continue
            if ours:
                self.outages.answered()
            messages = []
            for (message, claim), accepted in zip(ours, results, strict=True):
                now = self.claims.get(message.job_id)
                if not accepted and now is not None and now is not claim:
                    messages.append(message)  # the job has been ours again meanwhile: tell it for the new claim
                else:
                    await self._note_answer(message, claim, accepted, new)
            if not messages:
                return

    async def _note_answer(self, message: Message, claim: Claim, accepted: bool, new: bool) -> None:
        if not accepted and new:
            self._discard(message)
        if self.claims.get(message.job_id) is not claim:
            return  # an earlier message has ended the job
        if isinstance(message.content, Completed | Failed | Cancelled):
            if accepted or await self._ended_so(claim, message.content):
                self._record_end(claim, message.content)
            else:
                self._drop_lost_job(message.job_id)
        elif not accepted:
            self._refused[message.job_id] = claim
            if not self.outbox.ends(message.job_id):
                self._note_verdict(claim, Heartbeat.LOST)

    def _discard(self, message: Message) -> None:
        """Delete the picture of a message that the queue did not take, if it is in the object store."""
        if isinstance(message.content, tuple) and not isinstance(message.content[1], bytes):
            assert self.transfers.group is not None
            self.transfers.group.create_task(self.queue.discard_picture(message.content[1]))  # the store may be slow

    async def _ended_so(self, claim: Claim, event: Completed | Failed | Cancelled) -> bool:
        """Tell whether an earlier attempt to end the job succeeded, but its answer was lost."""
        try:
            job = await self.outages.outlast(self.queue.get, claim.job.id)
        except NotFound:
            return False
        return job.status.terminal and job.attempt == claim.attempt and terminal_event(job) == event

    def _record_end(self, claim: Claim, event: Completed | Failed | Cancelled) -> None:
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

    def _note_verdict(self, claim: Claim, verdict: Heartbeat) -> None:
        """Let the main loop drop a job before its next step."""
        self._verdicts[claim.job.id] = claim, verdict
        self._work.set()

    async def _apply_verdicts(self) -> None:
        """Drop cancelled and lost jobs before the next step."""
        verdicts, self._verdicts = self._verdicts, {}
        for job_id, (heard_for, verdict) in verdicts.items():
            claim = self.claims.get(job_id)
            if claim is None or claim != heard_for or self.outbox.ends(job_id):
                continue  # the verdict was about an earlier claim, or comes after the job's end
            self.engine.drop(job_id)
            self.transfers.drop(job_id)
            self._new = deque(each for each in self._new if each.job.id != job_id)
            self._fetched = [each for each in self._fetched if each[0] != job_id]
            if verdict is Heartbeat.LOST:
                self._drop_lost_job(job_id)
            else:
                await self.outbox.put(Message(job_id, Cancelled()))

    def _end_job(
        self, job: Job, status: JobStatus, report: SavingsReport | None = None, error: JobError | None = None
    ) -> None:
        self.claims.pop(job.id, None)
        self._refused.pop(job.id, None)
        self.transfers.drop(job.id)
        self.metrics.request_finished(job, report, status, error.code if error else None)
        self.spans.end(job.id, status.value, report, error)
        for event in (self._news, self._room, self._work):
            event.set()

    def _drop_lost_job(self, job_id: str) -> None:
        """Drop a job that is no longer ours; its new owner will end it."""
        claim = self.claims.pop(job_id, None)
        self._refused.pop(job_id, None)
        self.transfers.drop(job_id)
        if claim is not None:
            self.metrics.request_lost(claim.job)
            self.spans.end(job_id, "lost")
            log.warning("claim lost", job=job_id, attempt=claim.attempt)
        for event in (self._room, self._work):
            event.set()

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
        """Send heartbeats for all claims, in one call. The main loop drops cancelled and lost ones before a step."""
        while True:
            self._called.clear()
            if claims := list(self.claims.values()):
                verdicts = await self.outages.attempt(self.queue.keep, claims) or [Heartbeat.OK] * len(claims)
                for claim, verdict in zip(claims, verdicts, strict=True):
                    if verdict is not Heartbeat.OK:
                        self._note_verdict(claim, verdict)
            pause = KEEP_SECONDS if self.outages.reason is None else RETRY_SECONDS
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(pause, self.settings.claim_idle_seconds / 4)):
                    await self._called.wait()

    async def _listen_for_calls(self) -> None:
        """Notice cancelled jobs at once. If this fails, heartbeats notice them later."""
        while True:
            try:
                if await self.queue.wait_for_call(self.id, CALL_SECONDS):
                    self._called.set()
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)

    async def _announce_models(self) -> None:
        """Tell gateways what this worker serves, and its metrics."""
        while True:
            if self._parent is not None and os.getppid() != self._parent:
                log.warning("the process that started this worker is gone")
                self.draining.set()
            self._news.clear()
            await self.outages.attempt(self.queue.announce, self.id, self.cards, self.metrics.exposition())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_SECONDS):
                    await asyncio.gather(self._news.wait(), asyncio.sleep(NEWS_SECONDS))

    @contextlib.asynccontextmanager
    async def _background(self, *loops: Coroutine[Any, Any, None]) -> AsyncIterator[asyncio.TaskGroup]:
        """Run loops beside the body. If one breaks, the worker ends: without them, it would lose its jobs."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(loop) for loop in loops]
            yield group
            for task in tasks:
                task.cancel()
