"""The job queue on Redis Streams: submit, watch and cancel for gateways; claim, heartbeat and finish for workers.

Each change of a job is one call of `queue.lua`. So it happens completely or not at all, on Redis's clock, and a worker
whose claim went to another worker is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from redis.asyncio import Redis
from ulid import ULID

from patchforge.service.errors import (
    IdempotencyConflict,
    InvalidEventId,
    InvalidRequest,
    NotFound,
    NotReady,
    QueueFull,
    RateLimited,
    TooManyJobs,
    Unavailable,
)
from patchforge.service.messages.endings import terminal_event
from patchforge.service.messages.events import TERMINAL_EVENTS, Cancelled, Completed, Event, Expired, Failed
from patchforge.service.messages.protocol import CAPABILITIES, FIRST, PROTOCOL, Announcement, needs_of, split_card
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard, Priority
from patchforge.service.messages.source import Source
from patchforge.service.queue import keys
from patchforge.service.queue.claims import (
    Claim,
    Delivery,
    Heartbeat,
    claim_arguments,
    finished,
    published,
    stored,
)
from patchforge.service.queue.connection import LONGEST_BLOCK, QueueConnection, redis_call
from patchforge.service.queue.event_hub import EventHub
from patchforge.service.queue.records import Served, event_from, fields_of, job_from, served_from
from patchforge.service.queue.roster import Roster
from patchforge.service.settings import Settings

ANNOUNCED = 15  # seconds until a worker's announcement expires
BATCH = 64  # events a watcher reads at once; if there are as many, it has fallen behind,
FEW = 16  # events that a watcher reads without asking whether it has fallen behind
BATCH_BYTES = 512 << 10  # and so it has if they are larger than this: slow readers must not use up memory
POLL = 2.0  # seconds after which a watcher reads without a bell, in case the bell was lost
LOOK = 1.0  # seconds after which a worker that waits for jobs looks without a bell
RETRY_AFTER = 5  # seconds that a client should wait if the queue is full or its API key has too many jobs

_JOB_ID = re.compile(r"[0-9A-Z]{26}")
_EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?")


@dataclass(frozen=True)
class Backlog:
    """What waits at one moment, by model."""

    workers: int
    """Live workers."""
    jobs: Mapping[str, int]
    """Numbers of waiting jobs, for models that have any."""
    oldest: Mapping[str, float]
    """Seconds that the oldest of them has waited, by the queue server's clock."""


class JobQueue(QueueConnection):
    """One process's access to the shared queue. Any method may raise `Unavailable`: Redis is full or silent."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        """`blocking` is for reads of up to `LONGEST_BLOCK` seconds, so its socket timeout must be longer than that."""
        super().__init__(redis, blocking, settings)
        self._hub = EventHub(blocking)
        self.capabilities = CAPABILITIES
        """What the workers of this process can do. They claim no job that needs more."""
        self._roster = Roster(self)
        self._unanswered: dict[str, str] = {}
        """Worker id → token of its last call for a job, if that call got no answer."""

    async def close(self) -> None:
        await self._hub.close()
        await super().close()

    # For gateways: submit, read, cancel.

    async def submit(
        self,
        request: GenerationRequest,
        *,
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
        tenant: str | None = None,
        source: Source | None = None,
        trace: Mapping[str, str] | None = None,
        needs: Collection[str] | None = None,
        degradable: bool = False,
    ) -> Job:
        """Accepts a request whose defaults are filled in, or returns the job that its key was first used for.

        Args:
            request: its `model` must be set.
            fingerprint: identifies the request as the client sent it; default: `request`. A gateway that fills in a
                random seed must pass it, or a client's retry would look like another request.
            tenant: owner of the job. Each tenant has its own idempotency keys and limits.
            source: the picture to edit.
            trace: the caller's trace context, from `patchforge.service.tracing.carrier`.
            needs: capabilities that the job's worker must have; default: those that the request needs.
            degradable: load may lower its quality.

        Raises:
            QueueFull: too many jobs are waiting.
            RateLimited: the tenant requested too many pictures per minute.
            TooManyJobs: the tenant has reached its concurrent-job limit.
            IdempotencyConflict: the key was used with another fingerprint.
            Unavailable: the job may or may not have been accepted. Repeating the call is safe only with a key.
        """
        if request.model is None:
            raise InvalidRequest("no model was chosen", field="model")
        body = written(request)
        special = sorted({*(needs_of(request) if needs is None else needs)} - FIRST)
        outcome, *record = await self._run(
            "submit",
            str(ULID()),
            request.model,
            request.priority.value,
            body,
            "" if request.deadline_seconds is None else request.deadline_seconds,
            "" if idempotency_key is None else keys.idempotency(idempotency_key, tenant),
            sha256((fingerprint or request.model_dump_json()).encode()).hexdigest(),
            tenant or "",
            request.n,
            json.dumps(dict(trace)) if trace else "",
            PROTOCOL,
            " ".join(special),
            "1" if degradable else "",
            *_source_fields(source),
        )
        if outcome == b"full":
            raise QueueFull("too many jobs are waiting", retry_after=RETRY_AFTER)
        if outcome == b"busy":
            raise TooManyJobs("this API key has reached its concurrent-job limit", retry_after=RETRY_AFTER)
        if outcome == b"limited":
            raise RateLimited("this API key has reached its limit of pictures per minute", retry_after=int(record[0]))
        if outcome == b"conflict":
            raise IdempotencyConflict("this Idempotency-Key was used with a different request")
        return job_from(record[0])

    async def get(self, job_id: str) -> Job:
        """Returns the job.

        Raises:
            NotFound: there is no such job.
        """
        return await self._run_on_job("read", job_id)

    async def image(self, job_id: str, index: int) -> bytes:
        """Returns an encoded picture.

        Raises:
            NotFound: there is no such job or index.
            NotReady: the picture is not finished, or never will be.
        """
        _check_job_id(job_id)
        picture: bytes | None = await self._do("HGET", keys.images(job_id), index)
        if picture is None:
            job = await self.get(job_id)
            if not 0 <= index < job.request.n:
                raise NotFound(f"job {job_id} has no picture {index}")
            raise NotReady(f"the job is {job.status.value} and has no picture {index}")
        return picture

    async def source(self, job_id: str) -> Source:
        """Returns the picture that a job edits.

        Raises:
            NotFound: the job edits no picture, or it has expired.
        """
        image, mask = await self._do("HMGET", keys.sources(job_id), "image", "mask")
        if image is None:
            raise NotFound(f"job {job_id} has no picture to edit")
        return Source(image, mask)

    async def cancel(self, job_id: str) -> Job:
        """Ends a waiting job; asks the worker of a running job to stop; leaves an ended job alone. Returns the job.

        Raises:
            NotFound: there is no such job.
        """
        return await self._run_on_job("cancel", job_id)

    def watch(self, job_id: str, after: str = "0") -> AsyncGenerator[tuple[str, Event], None]:
        """Yields (event id, event): past events after the given id, then live ones, up to the terminal event.

        A reader that falls behind misses only previews that newer ones replace, even if its position was trimmed from
        the stream. Every reader gets the terminal event, unless `after` is its id. Other events that this version
        cannot read are skipped.

        Raises:
            InvalidEventId: `after` is malformed; raised by the call itself.
            NotFound: there is no such job; raised by the iteration.
        """
        if not _EVENT_ID.fullmatch(after):
            raise InvalidEventId("is not an event id", field="Last-Event-ID")
        return self._watch(job_id, after if "-" in after else f"{after}-0")

    async def wait_for_end(self, job_id: str) -> Event:
        """Returns the job's terminal event, as soon as there is one. Costs less than to watch all events.

        Raises:
            NotFound: there is no such job.
        """
        _check_job_id(job_id)
        with self._hub.listen(job_id) as bell:
            while True:
                bell.clear()
                known, ended = await self._do("HMGET", keys.job(job_id), "id", "last_event")
                if known is None:
                    raise NotFound(f"no job {job_id}")
                if ended is not None:
                    return terminal_event(await self.get(job_id))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL):
                        await bell.wait()

    async def _watch(self, job_id: str, after: str) -> AsyncGenerator[tuple[str, Event], None]:
        _check_job_id(job_id)
        rung = False
        with self._hub.listen(job_id) as bell:
            while True:
                bell.clear()
                last_id, more = None, False
                # Who waited at the bell has seen all before it: a plain read is cheaper, and enough unless it fails.
                entries = await self._read_few_events(job_id, after) if rung else []
                if not entries:
                    status, last_id, entries, more = await self._run("news", job_id, after, BATCH, BATCH_BYTES)
                    if status is None:
                        raise NotFound(f"no job {job_id}")
                for entry_id, fields in entries:
                    after, event = entry_id.decode(), event_from(fields)
                    if event is None and entry_id == last_id:
                        event = terminal_event(await self.get(job_id))
                    if event is None:
                        continue
                    yield after, event
                    if isinstance(event, TERMINAL_EVENTS):
                        return
                if not entries and last_id is not None:
                    # The job has ended, and its last event was seen before or is gone.
                    if last_id.decode() != after:
                        yield last_id.decode(), terminal_event(await self.get(job_id))
                    return
                rung = not more and await self._hear(bell)

    async def _hear(self, bell: asyncio.Event) -> bool:
        """Waits for the bell. Returns False after `POLL` seconds, or if the bell has rung meanwhile."""
        if bell.is_set():
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(POLL):
                await bell.wait()
                return True
        return False

    async def _read_few_events(self, job_id: str, after: str) -> list[tuple[bytes, list[bytes]]]:
        """Returns the events after an id, or nothing if there are many, or one cannot be read: then run `news`."""
        found = await self._do("XRANGE", keys.events(job_id), f"({after}", "+", "COUNT", FEW)
        entries = [(entry_id, [part for pair in fields.items() for part in pair]) for entry_id, fields in found]
        legible = all(event_from(fields) is not None for _, fields in entries)
        return entries if legible and len(entries) < FEW else []

    async def backlog(self) -> Backlog:
        """Returns what waits now."""
        workers, lines = await self._run("backlog")
        jobs: Counter[str] = Counter()
        oldest: dict[str, float] = {}
        for model, count, age in lines:
            name = model.decode(errors="replace")
            jobs[name] += count
            if age:  # otherwise someone deleted the job by hand
                oldest[name] = max(float(age), oldest.get(name, 0.0))
        return Backlog(workers, dict(jobs), oldest)

    async def waiting(self) -> Mapping[str, int]:
        """Returns model → number of its waiting jobs, for models that have any."""
        return (await self.backlog()).jobs

    async def oldest_waiting(self) -> Mapping[str, float]:
        """Returns model → seconds that its oldest waiting job has waited, by the queue server's clock."""
        return (await self.backlog()).oldest

    # For workers: announce models and metrics. For gateways: read them.

    async def announce(self, worker_id: str, cards: Sequence[ModelCard], metrics: bytes | None = None) -> None:
        """Shows a worker's models to gateways for `ANNOUNCED` seconds. Repeat it well before they are over.

        `metrics`: its Prometheus exposition, if that is to be shown too.
        """
        split = {card.name: split_card(card) for card in cards}
        details = {name: rest for name, (_, rest) in split.items()}
        about = Announcement(protocol=PROTOCOL, capabilities=sorted(self.capabilities), details=details)
        # Under a key of its own: processes of protocol 0 read the cards, and exit at a field that they do not know.
        texts: list[str | bytes] = [keys.announcement(worker_id), written(about)]
        plain = ",".join(written(card) for card, _ in split.values())
        texts += [keys.worker_models(worker_id), f"[{plain}]"]
        if metrics is not None:
            texts += [keys.worker_metrics(worker_id), metrics]
        await self._run("announce", worker_id, ANNOUNCED, 2, *texts)

    async def announce_metrics(self, worker_id: str, text: bytes) -> None:
        """Shows a worker's Prometheus exposition to gateways for `ANNOUNCED` seconds."""
        await self._run("announce", worker_id, ANNOUNCED, 0, keys.worker_metrics(worker_id), text)

    async def retire(self, worker_id: str) -> None:
        """Removes a worker's announcements."""
        await self._run("retire", worker_id)

    async def workers(self) -> dict[str, Served]:
        """Returns worker id → what the worker announced, for all live workers."""
        found = await self._read_announcements(keys.WORKER_MODELS, keys.ANNOUNCEMENT)
        return {worker: served_from(cards, about) for worker, cards, about in found}

    async def known_workers(self) -> Mapping[str, Served]:
        """Returns the same as `workers`, at a cost that does not grow with their number.

        What was read before is kept, and only what changed is read. Workers that died without a word may be in it for
        `roster.READ_AGAIN` seconds more.
        """
        return await self._roster.read()

    async def models(self) -> list[ModelCard]:
        """Returns the models that the live workers serve, sorted by name."""
        cards = {card.name: card for served in (await self.workers()).values() for card in served.cards}
        return [cards[name] for name in sorted(cards)]

    async def worker_metrics(self) -> list[tuple[str, bytes]]:
        """Returns (worker id, Prometheus exposition) for each live worker that announced its metrics."""
        return [(worker, text) for worker, text in await self._read_announcements(keys.WORKER_METRICS)]

    async def _read_announcements(self, *prefixes: str) -> list[tuple[Any, ...]]:
        """Returns (worker id, text under each prefix). Workers without a text under the first prefix are left out."""
        found = await self._run("announced", *prefixes)
        return [(worker.decode(errors="replace"), *texts) for worker, *texts in found]

    # For workers: claim a job, keep it, end it.

    async def claim(
        self, worker_id: str, models: Sequence[str], *, block_seconds: float, take_over: bool = False
    ) -> Claim | None:
        """Claims the most urgent waiting job of these models that needs nothing beyond `capabilities`.

        Waits up to `block_seconds` for one, then returns None. With `take_over`, also takes over the job of a worker
        that stopped responding; it looks for one only if no other worker did so in the last second.
        """
        streams, bells = self._list_streams(models), self._list_bells(models)
        give_up = time.monotonic() + block_seconds
        while True:
            claim, how = await self._take_or_return("claim", worker_id, streams, "1" if take_over else "0", *bells)
            left = give_up - time.monotonic()
            if claim or left <= 0 or not streams:
                return claim
            if how != b"more":
                await self._wait_for_bell(bells, min(left, LOOK))

    async def wait_for_job(self, models: Sequence[str], seconds: float) -> bool:
        """Waits until a job of these models may wait for a worker. One job wakes one worker.

        Returns False if the time was up. A worker should also look without it: what rang may be lost with a worker.
        """
        return await self._wait_for_bell(self._list_bells(models), seconds)

    async def wait_for_call(self, worker_id: str, seconds: float) -> bool:
        """Waits until someone cancels a job that this worker holds. Returns False if the time was up."""
        return await self._wait_for_bell([keys.call(worker_id)], seconds)

    async def _wait_for_bell(self, bells: Sequence[str], seconds: float) -> bool:
        # Nothing is claimed meanwhile: a worker that is cancelled or killed here holds no job.
        with redis_call():
            return await self._blocking.blpop(list(bells), timeout=max(0.001, min(seconds, LONGEST_BLOCK))) is not None

    async def reclaim(self, worker_id: str, models: Sequence[str]) -> Claim | None:
        """Takes over a job whose worker stopped responding. Ends such jobs if cancelled or out of attempts."""
        claim, _ = await self._take_or_return("reclaim", worker_id, self._list_streams(models))
        return claim

    async def heartbeat(self, claim: Claim) -> Heartbeat:
        """Keeps a claim for another `claim_idle_seconds`, and tells its state."""
        return (await self.keep([claim]))[0]

    async def keep(self, claims: Sequence[Claim]) -> list[Heartbeat]:
        """Does the same for several claims of one worker, in one call."""
        if not claims:
            return []
        texts = [text for each in claims for text in (each.job.id, each.attempt, each.stream, each.entry_id)]
        return [Heartbeat(verdict.decode()) for verdict in await self._run("keep", claims[0].worker_id, *texts)]

    async def publish(self, claim: Claim, event: Event) -> bool:
        """Adds an event to the job's stream. Returns False if the claim is lost. Terminal events go to `finish`."""
        return (await self.deliver([published(claim, event)]))[0]

    async def store_image(self, claim: Claim, index: int, data: bytes) -> bool:
        """Stores an encoded picture and publishes ImageReady. Returns False if the claim is lost."""
        return (await self.deliver([stored(claim, index, data)]))[0]

    async def finish(self, claim: Claim, event: Completed | Failed | Cancelled | Expired) -> bool:
        """Ends the job with its only terminal event. Returns False if the claim is lost or the job has ended."""
        return (await self.deliver([finished(claim, event)]))[0]

    async def deliver(self, deliveries: Sequence[Delivery]) -> list[bool]:
        """Does what `publish`, `store_image` and `finish` do, for several of them, in order and in one call."""
        if len(deliveries) == 1:
            return [bool(await self._run(*deliveries[0]))]
        words = [word for each in deliveries for word in (len(each), *each)]
        return [bool(each) for each in await self._run("deliver", *words)]

    async def release(self, claim: Claim) -> bool:
        """Gives the job back: it is next in line, and the attempt does not count. Returns False if the claim is lost.

        If someone asked to cancel the job, it ends instead.
        """
        return bool(await self._run("release", *claim_arguments(claim)))

    @property
    def _special(self) -> frozenset[str]:
        """What the workers of this process can do, but not all workers can."""
        return self.capabilities - FIRST

    def _list_streams(self, models: Sequence[str]) -> list[str]:
        """Returns queue streams, most urgent first. Models are in random order, so that none starves another."""
        shuffled = random.sample(models, len(models))
        kinds = (False, True) if self._special else (False,)
        levels = (keys.RETURNED, *Priority)
        return [keys.queue(name, level, special=kind) for level in levels for kind in kinds for name in shuffled]

    def _list_bells(self, models: Sequence[str]) -> list[str]:
        kinds = (False, True) if self._special else (False,)
        return [keys.bell(name, special=kind) for kind in kinds for name in models]

    async def _run_on_job(self, command: str, job_id: str) -> Job:
        _check_job_id(job_id)
        record = await self._run(command, job_id)
        if not record:
            raise NotFound(f"no job {job_id}")
        return job_from(record)

    async def _take_or_return(
        self, command: str, worker_id: str, streams: Sequence[str], *options: str
    ) -> tuple[Claim | None, bytes]:
        """Runs claim or reclaim. If the caller is cancelled meanwhile, gives the job back: nobody would run it."""
        if not streams:
            return None, b"none"
        running = asyncio.ensure_future(self._run_with_token(command, worker_id, streams, *options))
        try:
            record, how = await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Unavailable):
                record, how = await running
                if record:
                    await self.release(_claim_from(worker_id, record, how))
            raise
        return _claim_from(worker_id, record, how) if record else None, how

    async def _run_with_token(self, command: str, worker_id: str, streams: Sequence[str], *options: str) -> Any:
        """Runs claim or reclaim. If a call got no answer, the next one returns the job that it may have started."""
        token = self._unanswered.pop(worker_id, None) or str(ULID())
        can = " ".join(sorted(self._special))
        try:
            return await self._run(command, worker_id, token, can, *options, streams=streams)
        except Unavailable:
            self._unanswered[worker_id] = token
            raise


def _claim_from(worker_id: str, record: Sequence[bytes], how: bytes) -> Claim:
    job, fields = job_from(record), fields_of(record)
    stream, entry = fields["stream"].decode(), fields["entry"].decode()
    return Claim(job, worker_id, job.attempt, stream, entry, taken_over=how == b"again", last=how == b"last")


def _source_fields(source: Source | None) -> list[str | bytes]:
    """Returns names and values in turn."""
    if source is None:
        return []
    fields: list[str | bytes] = ["image", source.image]
    return fields if source.mask is None else [*fields, "mask", source.mask]


def _check_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("no such job")
