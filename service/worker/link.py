"""A worker's link to one queue server: takes jobs there, keeps its claims, and delivers what their jobs make.

A worker has one link for each queue server, and they are independent: while one server is away, jobs of the others go
on as if it did not exist. They share the worker's room for jobs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

import structlog

from patchforge.service.errors import NotFound, Unavailable
from patchforge.service.messages.endings import terminal_event
from patchforge.service.messages.events import Cancelled, Completed, Failed
from patchforge.service.messages.schemas import Job, ModelCard
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.worker.outages import RETRY_SECONDS, Outages
from patchforge.service.worker.outbox import Message, Outbox

log = structlog.get_logger()

ANNOUNCE_SECONDS = 2.0
NEWS_SECONDS = 1.0  # between two announcements, if jobs ended meanwhile
KEEP_SECONDS = 1.0  # between heartbeats
LOOK_SECONDS = 1.0  # between looks for jobs, if nobody rings
YIELD_SECONDS = 0.2  # how long a busy worker waits for a job before it goes to the back of the line of workers
CALL_SECONDS = 2.0


class Holder(Protocol):
    """What a link needs of its worker."""

    id: str
    room_made: asyncio.Event
    """Set when there may be room for another job."""

    @property
    def models(self) -> Sequence[str]: ...

    @property
    def claims(self) -> Mapping[str, Claim]:
        """Claims of all links, by job."""
        ...

    @property
    def claim_idle_seconds(self) -> float: ...

    @property
    def occupants(self) -> Sequence[Claim]:
        """The claims of all links that take up room."""
        ...

    def has_room(self) -> bool: ...

    def reserve_room(self) -> contextlib.AbstractContextManager[None]:
        """Keeps room for a job while it is being claimed."""
        ...

    def must_run_alone(self, claim: Claim) -> bool: ...

    def wait_for_empty_room(self) -> None:
        """Takes no more jobs until the running ones are finished."""

    def wake(self) -> None:
        """Makes the worker look at what is new."""

    def begin(self, claim: Claim) -> None:
        """Holds a job that was just claimed."""

    def note_taken_over(self, claim: Claim) -> None: ...

    def note_verdict(self, claim: Claim, verdict: Heartbeat) -> None:
        """Drops a job before the next step."""

    def record_end(self, claim: Claim, event: Completed | Failed | Cancelled) -> None: ...

    def drop_lost_job(self, job_id: str) -> None: ...

    def discard(self, message: Message) -> None:
        """Deletes what a message that the queue did not take has in the object store."""

    def record_ended_in_queue(self, job: Job) -> None: ...

    def announcement(self) -> tuple[Sequence[ModelCard], bytes]:
        """Returns what gateways are told: the models, and the metrics' exposition."""
        ...


class Link:
    """A worker's part at one queue server."""

    def __init__(self, queue: JobQueue, holder: Holder, *, only: bool = True) -> None:
        """`only`: whether the worker has no other link."""
        self.queue = queue
        self.outages = Outages() if only else Outages(queue.number)
        self.outbox = Outbox(self._send)
        self.claims: dict[str, Claim] = {}
        """Claims of this server, by job."""
        self.refused: dict[str, Claim] = {}
        """Held jobs of which the queue refused something: it is gone, so no later claim may continue with them."""
        self.news = asyncio.Event()
        """Set when there is something to announce."""
        self._holder = holder
        self._only = only
        self._claiming = asyncio.Lock()
        """Held while a claim is on its way. Its answer may say that a held job is ours anew: see `_hear_claims`."""
        self._ready = asyncio.Event()
        self._called = asyncio.Event()
        """Set when a job may have been cancelled."""
        queue.on_ended = holder.record_ended_in_queue

    async def await_server(self) -> None:
        """Waits until the server can be used for the first time."""
        await self.outages.outlast(self.queue.check_server)
        self._ready.set()

    async def run(self) -> None:
        """Announces the models, sends heartbeats and hears of cancellations, until it is cancelled."""
        if not self._ready.is_set():
            await self.await_server()
        async with asyncio.TaskGroup() as group:
            for loop in self._announce(), self._keep_claims(), self._listen_for_calls():
                group.create_task(loop)

    async def take_jobs(self) -> None:
        """Claims jobs while there is room, beside the engine. Waits for a bell if there are none."""
        await self._ready.wait()
        room_made = self._holder.room_made
        while True:
            room_made.clear()
            if self._has_room() and self.outages.reason is None and await self._take_job():
                continue
            self._holder.wake()  # only now, so that jobs which waited together begin together
            if not self._has_room():
                await room_made.wait()
            elif self.outages.reason is not None:
                await self._await_return()
            else:
                await self._wait_for_job()

    def _has_room(self) -> bool:
        return not self.refused and self._holder.has_room()

    def list_occupants(self) -> list[Claim]:
        """Returns the claims that take up room: not those of jobs that ended and cannot tell an absent server."""
        away = self.outages.reason is not None
        return [claim for job_id, claim in self.claims.items() if not (away and self.outbox.ends(job_id))]

    async def _take_job(self) -> bool:
        """Claims a job. Returns False if no other job waits, or the queue is away."""
        # During an outage all workers seemed silent. So let the live ones send heartbeats first.
        take_over = self.outages.seconds_since >= self._holder.claim_idle_seconds
        async with self._claiming:
            with self._holder.reserve_room():
                claim = await self.outages.attempt(
                    self.queue.claim, self._holder.id, self._holder.models, block_seconds=0, take_over=take_over
                )
        # No await before the claim is noted: `_hear_claims` returns then.
        if claim is None:
            return False
        if claim.taken_over:
            self._holder.note_taken_over(claim)
        if claim.job.id in self.refused:
            await self._pass_on(claim)
        elif claim.job.id in self.claims:
            self.claims[claim.job.id] = claim  # it was already ours, but idle during an outage: continue with it
        elif any(map(self._holder.must_run_alone, self._holder.occupants)):  # one that another link just took
            await self._pass_on(claim)
        elif self._holder.must_run_alone(claim) and self._holder.occupants:
            # If the worker dies then, this job is the cause. So it waits until the running jobs are finished, or goes
            # to a worker that is idle.
            await self._pass_on(claim)
            self._holder.wait_for_empty_room()
        else:
            self.claims[claim.job.id] = claim
            self._holder.begin(claim)
        return not claim.last

    async def _hear_claims(self) -> None:
        """Waits for the answer of a claim that is on its way.

        After a pause, a worker may take over its own job. The server then refuses what comes for the old claim, and
        that answer may overtake the new claim, as each call has its own connection. To believe it would drop a job that
        is ours. A claim that explains a refusal was sent before that refusal arrived.
        """
        async with self._claiming:
            pass

    async def _pass_on(self, claim: Claim) -> None:
        """Gives back a job before it has started. Draining must not interrupt that: the job would lose an attempt."""
        try:
            await self.outages.outlast(self.queue.release, claim)
        except asyncio.CancelledError:
            await self.outages.attempt(self.queue.release, claim)
            raise

    async def _wait_for_job(self) -> None:
        """Waits for a bell, but not for longer than `LOOK_SECONDS`.

        The queue server wakes the worker that has waited longest. A busy worker waits in short turns, so that jobs go
        to idle workers first.
        """
        look_at = time.monotonic() + LOOK_SECONDS
        while (left := look_at - time.monotonic()) > 0:
            was_idle = not self._holder.claims
            turn = left if was_idle else min(left, YIELD_SECONDS)
            try:
                if (bell := await self.queue.wait_for_job(self._holder.models, turn)) is None:
                    continue
                full = not self._has_room()
                if not full and (not was_idle or not self._holder.claims):
                    return
                # A job of another server came meanwhile. Another worker, if one waits, must hear this bell.
                await self.queue.ring(bell)
                if full:
                    return
            except Unavailable as error:  # all workers seem silent then, so nobody's job is to be taken over
                self.outages.failed(error)
                return

    async def _await_return(self) -> None:
        """Waits until the queue can be used again. With jobs, heartbeats notice that."""
        if self.claims:
            await asyncio.sleep(RETRY_SECONDS)
        else:
            await self.outages.outlast(self.queue.ping)

    async def _send(self, messages: Sequence[Message]) -> None:
        """Delivers messages about jobs that are still ours. Repeats that after an outage: repeating is safe."""
        new = True  # otherwise the queue may have taken them without an answer
        while True:
            ours = [(each, claim) for each in messages if (claim := self.claims.get(each.job_id)) is not None]
            if new:
                for each in messages:
                    if each.job_id not in self.claims:
                        self._holder.discard(each)
            messages = [each for each, _ in ours]
            try:
                results = await self.queue.deliver([each.delivery(claim) for each, claim in ours]) if ours else []
            except Unavailable as error:
                self.outages.failed(error)
                if not self._only:  # jobs of other servers need not wait for this one
                    await self.outbox.lift_limit()
                    self._holder.room_made.set()
                new = False
                for each in messages:
                    if each.may_be_lost:  # if the queue has it nevertheless, watchers are shown its small copy
                        self._holder.discard(each)
                messages = [each for each in messages if not each.may_be_lost]
                await asyncio.sleep(RETRY_SECONDS)
                continue
            self.outbox.unlimited = False
            if ours:
                self.outages.answered()
            if not all(results):
                await self._hear_claims()
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
            self._holder.discard(message)
        if self.claims.get(message.job_id) is not claim:
            return  # an earlier message has ended the job
        if isinstance(message.content, Completed | Failed | Cancelled):
            if accepted or await self._ended_so(claim, message.content):
                self._holder.record_end(claim, message.content)
            else:
                self._holder.drop_lost_job(message.job_id)
        elif not accepted:
            self.refused[message.job_id] = claim
            if not self.outbox.ends(message.job_id):
                self._holder.note_verdict(claim, Heartbeat.LOST)

    async def _ended_so(self, claim: Claim, event: Completed | Failed | Cancelled) -> bool:
        """Tells whether an earlier attempt to end the job succeeded, but its answer was lost."""
        try:
            job = await self.outages.outlast(self.queue.get, claim.job.id)
        except NotFound:
            return False
        return job.status.terminal and job.attempt == claim.attempt and terminal_event(job) == event

    async def give_back(self, claim: Claim) -> bool:
        """Returns a job to the queue, and uses up no attempt. Returns False if the claim is lost, or the queue away."""
        return bool(await self.outages.attempt(self.queue.release, claim))

    async def _keep_claims(self) -> None:
        """Sends heartbeats for all claims, in one call. The worker drops cancelled and lost ones before a step."""
        while True:
            self._called.clear()
            if claims := list(self.claims.values()):
                verdicts = await self.outages.attempt(self.queue.keep, claims) or [Heartbeat.OK] * len(claims)
                if Heartbeat.LOST in verdicts:
                    await self._hear_claims()
                for claim, verdict in zip(claims, verdicts, strict=True):
                    if verdict is not Heartbeat.OK:
                        self._holder.note_verdict(claim, verdict)
            pause = KEEP_SECONDS if self.outages.reason is None else RETRY_SECONDS
            await _wait(self._called, min(pause, self._holder.claim_idle_seconds / 4))

    async def _listen_for_calls(self) -> None:
        """Notices cancelled jobs at once. If this fails, heartbeats notice them later."""
        while True:
            try:
                if await self.queue.wait_for_call(self._holder.id, CALL_SECONDS):
                    self._called.set()
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)

    async def _announce(self) -> None:
        """Tells gateways what this worker serves, and its metrics."""
        while True:
            self.news.clear()
            cards, metrics = self._holder.announcement()
            await self.outages.attempt(self.queue.announce, self._holder.id, cards, metrics)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_SECONDS):
                    await asyncio.gather(self.news.wait(), asyncio.sleep(NEWS_SECONDS))


async def first_usable(links: Collection[Link]) -> None:
    """Waits until one of the queue servers can be used."""
    waits = [asyncio.create_task(link.await_server()) for link in links]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
