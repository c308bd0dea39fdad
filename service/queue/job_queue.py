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
from enum import StrEnum
from hashlib import sha256
from itertools import chain
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
from patchforge.service.messages.events import TERMINAL_EVENTS, Cancelled, Completed, Event, Expired, Failed, ImageReady
from patchforge.service.messages.protocol import (
    CAPABILITIES,
    FIRST,
    OBJECT_STORE,
    PROTOCOL,
    needs_of,
)
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard, Priority
from patchforge.service.messages.source import Source
from patchforge.service.queue import keys
from patchforge.service.queue.batches import BatchStore, StoredBatch, megabytes, no_room
from patchforge.service.queue.connection import LONGEST_BLOCK, redis_call
from patchforge.service.queue.event_hub import EventHub
from patchforge.service.queue.pictures import reference_field, source_fields
from patchforge.service.queue.records import (
    Served,
    announced,
    event_from,
    fields_of,
    job_from,
    served_from,
    with_digest,
)
from patchforge.service.results import Reference
from patchforge.service.settings import Settings

ANNOUNCED = 15  # seconds until a worker's announcement expires
BATCH = 64  # events a watcher reads at once; if there are as many, it has fallen behind,
BATCH_BYTES = 512 << 10  # and so it has if they are larger than this: slow readers must not use up memory
POLL = 2.0  # seconds after which a watcher reads without a bell, in case the bell was lost
RETRY_AFTER = 5  # seconds that a client should wait if the queue is full or its API key has too many jobs

_JOB_ID = re.compile(r"[0-9A-Z]{26}")
_EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?")


class Heartbeat(StrEnum):
    """What a worker learns about its claim: continue; stop, because the job was cancelled; or drop a lost claim."""

    OK = "ok"
    CANCELLED = "cancelled"
    LOST = "lost"


class FeedOutcome(StrEnum):
    """What became of an attempt to queue a line of a batch."""

    QUEUED = "queued"
    STALE = "stale"
    """Another gateway settled this line, or the batch is ending."""
    DUPLICATE = "duplicate"
    """An earlier line has the same custom_id."""
    ENOUGH = "enough"
    """Batches have as many jobs in the queue as they may."""


@dataclass(frozen=True)
class Claim:
    """A worker's right to run a job. It ends with the job, on release, or after `claim_idle_seconds` of silence.

    If `job.unreadable` is set, the job cannot be drawn: finish it as `Failed`, with `unsupported`.
    """

    job: Job
    worker_id: str
    attempt: int
    stream: str
    entry_id: str


class JobQueue(BatchStore):
    """One process's access to the shared queue. Any method may raise `Unavailable`: Redis is full or silent."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        """`blocking` is for reads of up to `LONGEST_BLOCK` seconds, so its socket timeout must be longer than that."""
        super().__init__(redis, blocking, settings)
        self._hub = EventHub(blocking)
        self.capabilities = CAPABILITIES if self.objects is None else CAPABILITIES | {OBJECT_STORE}
        """What the workers of this process can do. They claim no job that needs more."""
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
        room: int = 0,
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
            room: bytes that the queue server may come to hold of the job: see `room_for`.
            degradable: load may lower its quality.

        Raises:
            QueueFull: too many jobs are waiting, or the queue server might run out of memory.
            InvalidRequest: it would, even if it held nothing else.
            RateLimited: the tenant requested too many pictures per minute.
            TooManyJobs: the tenant has reached its concurrent-job limit.
            IdempotencyConflict: the key was used with another fingerprint.
            Unavailable: the job may or may not have been accepted. Repeating the call is safe only with a key.
        """
        needed = self.source_needs(source).union(needs_of(request) if needs is None else needs)
        sent = _submit_arguments(request, idempotency_key, fingerprint, tenant, trace, needed, room)
        fields = await self._keep_source(str(sent[0]), source)
        outcome, *record = await self._run("submit", *sent, "1" if degradable else "", *fields)
        if outcome != b"ok":
            await self._discard_source(fields)
        if outcome == b"crowded":
            self.on_no_room()
        _raise_if_refused(outcome, record)
        job = job_from(record[0])
        if job.id != sent[0]:  # the key's first job, which has its own
            await self._discard_source(fields)
        return job

    async def feed_line(
        self,
        batch: StoredBatch,
        custom_id: str,
        details: Mapping[str, Any],
        request: GenerationRequest,
        *,
        source: Source | None,
        needs: Collection[str],
        room: int = 0,
    ) -> FeedOutcome:
        """Queues the job of a batch's next line. Filled in as for `submit`. Load never lowers its quality.

        The same call moves the batch to its following line. So a line is queued once, however often this is called for
        it, and by however many gateways: a key per line would do no more, and could expire.

        Args:
            batch: as it was just read; `batch.next` is the line.
            details: what its results need beside the job.

        Raises:
            QueueFull, RateLimited, TooManyJobs: batches have used up their part of the limit.
            InvalidRequest: the queue server's memory would never suffice.
            Unavailable: the line may or may not have been queued. Read the batch again.
        """
        sent = _submit_arguments(request, None, None, batch.tenant, None, needs, room)
        result = f"flying {json.dumps({'job': sent[0], **details})}"
        outcome, *record = await self._run(
            "feed_line",
            batch.key,
            batch.next,
            custom_id,
            result,
            *sent,
            "",
            *source_fields(source),
        )
        if outcome.decode() in list(FeedOutcome):
            return FeedOutcome(outcome.decode())
        _raise_if_refused(outcome, record)
        return FeedOutcome.QUEUED

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
            ResultsUnavailable: it is in the object store, which cannot be used.
        """
        job = await self.get(job_id)
        if not 0 <= index < job.request.n:
            raise NotFound(f"job {job_id} has no picture {index}")
        picture = await self._read_picture(job_id, index)
        if picture is None:
            raise NotReady(f"the job is {job.status.value} and has no picture {index}")
        return picture

    async def source(self, job_id: str) -> Source:
        """Returns the picture that a job edits.

        Raises:
            NotFound: the job edits no picture, or it has expired.
        """
        source = await self._read_source(job_id)
        if source is None:
            raise NotFound(f"job {job_id} has no picture to edit")
        return source

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

    async def _watch(self, job_id: str, after: str) -> AsyncGenerator[tuple[str, Event], None]:
        _check_job_id(job_id)
        with self._hub.listen(job_id) as bell:
            while True:
                bell.clear()
                status, last_id, digest, entries = await self._run("news", job_id, after, BATCH, BATCH_BYTES)
                if status is None:
                    raise NotFound(f"no job {job_id}")
                for entry_id, fields in entries:
                    after, event = entry_id.decode(), event_from(fields)
                    if event is None and entry_id == last_id:
                        event = terminal_event(await self.get(job_id))
                    if event is None:
                        continue
                    if isinstance(event, Completed):
                        event = Completed(report=with_digest(event.report, digest))
                    yield after, event
                    if isinstance(event, TERMINAL_EVENTS):
                        return
                if entries:
                    continue
                if last_id is None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL):
                            await bell.wait()
                else:  # The job has ended, and its last event was seen before or is gone.
                    if last_id.decode() != after:
                        yield last_id.decode(), terminal_event(await self.get(job_id))
                    return

    async def waiting(self, *, batches: bool = True) -> dict[str, int]:
        """Returns model → number of its waiting jobs, for models that have any. `batches`: count theirs too."""
        members = await self._run("waiting", "" if batches else "1")
        return dict(Counter(member.decode(errors="replace").partition(":")[2] for member in members))

    async def oldest_waiting(self) -> dict[str, float]:
        """Returns model → seconds that its oldest job, batches apart, has waited, by the queue server's clock."""
        return {model.decode(errors="replace"): float(age) for model, age in await self._run("oldest")}

    async def held(self) -> dict[str, int]:
        """Returns model → number of its jobs that workers hold, dead or alive, for models that have any."""
        found: Counter[str] = Counter()
        for name, jobs in await self._run("held"):
            found[name.decode(errors="replace")] += jobs
        return dict(+found)

    async def count_workers(self) -> int:
        """Returns the number of live workers."""
        return int(await self._do("ZCARD", keys.WORKERS))

    # For workers: announce models and metrics. For gateways: read them.

    async def announce(self, worker_id: str, cards: Sequence[ModelCard]) -> None:
        """Shows a worker's models to gateways for `ANNOUNCED` seconds. Repeat it well before they are over."""
        plain, about = announced(cards, self.capabilities)
        # Under a key of its own: processes of protocol 0 read the cards, and exit at a field that they do not know.
        texts = [keys.announcement(worker_id), about, keys.worker_models(worker_id), plain]
        await self._run("announce", worker_id, ANNOUNCED, *texts)

    async def announce_metrics(self, worker_id: str, text: bytes) -> None:
        """Shows a worker's Prometheus exposition to gateways for `ANNOUNCED` seconds."""
        await self._run("announce", worker_id, ANNOUNCED, keys.worker_metrics(worker_id), text)

    async def retire(self, worker_id: str) -> None:
        """Removes a worker's announcements."""
        named = (keys.worker_models, keys.announcement, keys.worker_metrics)
        await self._do("DEL", *(name(worker_id) for name in named))
        await self._do("ZREM", keys.WORKERS, worker_id)

    async def workers(self) -> dict[str, Served]:
        """Returns worker id → what the worker announced, for all live workers."""
        found = await self._read_announcements(keys.WORKER_MODELS, keys.ANNOUNCEMENT)
        return {worker: served_from(cards, about) for worker, cards, about in found}

    async def remember(self, models: Sequence[Served], seconds: int) -> None:
        """Keeps for so long what workers announced of some models: one card in each."""
        texts = [(card.name, *announced([card], each.capabilities)) for each in models for card in each.cards]
        if texts:
            await self._run("remember", seconds, *chain(*texts))

    async def remembered(self) -> list[Served]:
        """Returns what is remembered of models, whether they are served now or not: one card in each."""
        return [served_from(cards, about) for cards, about in await self._run("remembered")]

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

    async def claim(self, worker_id: str, models: Sequence[str], *, block_seconds: float) -> Claim | None:
        """Claims the most urgent waiting job of these models that needs nothing beyond `capabilities`.

        Waits up to `block_seconds` for one, then returns None.
        """
        streams = self._list_streams(models)
        give_up = time.monotonic() + block_seconds
        while True:
            claim, seen = await self._take_or_return("claim", worker_id, streams)
            left = give_up - time.monotonic()
            if claim or left <= 0 or not streams:
                return claim
            # Wait for news without claiming anything: a worker that is cancelled or killed here holds no job.
            block = max(1, round(1000 * min(left, LONGEST_BLOCK)))
            with redis_call():
                await self._blocking.xread(dict(zip(streams, seen, strict=True)), count=1, block=block)

    async def reclaim(self, worker_id: str, models: Sequence[str]) -> Claim | None:
        """Takes over a job whose worker stopped responding. Ends such jobs if cancelled or out of attempts."""
        claim, _ = await self._take_or_return("reclaim", worker_id, self._list_streams(models))
        return claim

    async def heartbeat(self, claim: Claim) -> Heartbeat:
        """Keeps a claim for another `claim_idle_seconds`, and tells its state."""
        return Heartbeat((await self._run("heartbeat", *_claim_arguments(claim))).decode())

    async def publish(self, claim: Claim, event: Event) -> bool:
        """Adds an event to the job's stream. Returns False if the claim is lost. Terminal events go to `finish`."""
        if isinstance(event, TERMINAL_EVENTS):
            raise TypeError(f"{event.type} ends a job: use finish")
        return bool(await self._run("publish", *_claim_arguments(claim), written(event)))

    async def put_picture(self, claim: Claim, index: int, data: bytes) -> bytes | Reference:
        """Stores an encoded picture where the settings say. Returns what `store_image` must have. Safe to repeat.

        Raises:
            ResultsUnavailable: the object store cannot be used.
        """
        if self.objects is None:
            return data
        return await self._put_picture(claim.job, index, data, f"{claim.entry_id}-{claim.attempt}")

    async def store_image(self, claim: Claim, index: int, picture: bytes | Reference) -> bool:
        """Stores a picture, or where it is, and publishes ImageReady. Returns False if the claim is lost."""
        field = reference_field(index) if isinstance(picture, str) else index
        event = ImageReady(index=index).model_dump_json()
        return bool(await self._run("store_image", *_claim_arguments(claim), field, picture, event))

    async def finish(self, claim: Claim, event: Completed | Failed | Cancelled | Expired) -> bool:
        """Ends the job with its only terminal event. Returns False if the claim is lost or the job has ended."""
        outcome: tuple[str, ...] = ()
        if isinstance(event, Completed):
            # The digest is written apart: readers of protocol 0 exit at a field of a report that they do not know.
            digest = event.report.model_digest
            event = Completed(report=event.report.model_copy(update={"model_digest": None}))
            outcome = ("report", written(event.report), *(() if digest is None else ("digest", digest)))
        elif isinstance(event, Failed):
            outcome = ("error", written(event.error))
        return bool(await self._run("finish", *_claim_arguments(claim), event.type, written(event), *outcome))

    async def release(self, claim: Claim) -> bool:
        """Gives the job back: it is next in line, and the attempt does not count. Returns False if the claim is lost.

        If someone asked to cancel the job, it ends instead.
        """
        return bool(await self._run("release", *_claim_arguments(claim)))

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

    async def _run_on_job(self, command: str, job_id: str) -> Job:
        _check_job_id(job_id)
        record = await self._run(command, job_id)
        if not record:
            raise NotFound(f"no job {job_id}")
        return job_from(record)

    async def _take_or_return(
        self, command: str, worker_id: str, streams: Sequence[str]
    ) -> tuple[Claim | None, list[bytes]]:
        """Runs claim or reclaim. If the caller is cancelled meanwhile, gives the job back: nobody would run it."""
        if not streams:
            return None, []
        running = asyncio.ensure_future(self._run_with_token(command, worker_id, streams))
        try:
            record, seen = await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Unavailable):
                record, _ = await running
                if record:
                    await self.release(_claim_from(worker_id, record))
            raise
        return _claim_from(worker_id, record) if record else None, seen

    async def _run_with_token(self, command: str, worker_id: str, streams: Sequence[str]) -> Any:
        """Runs claim or reclaim. If a call got no answer, the next one returns the job that it may have started."""
        token = self._unanswered.pop(worker_id, None) or str(ULID())
        try:
            return await self._run(command, worker_id, token, " ".join(sorted(self._special)), streams=streams)
        except Unavailable:
            self._unanswered[worker_id] = token
            raise


def _claim_from(worker_id: str, record: Sequence[bytes]) -> Claim:
    job, fields = job_from(record), fields_of(record)
    return Claim(job, worker_id, job.attempt, fields["stream"].decode(), fields["entry"].decode())


def _claim_arguments(claim: Claim) -> tuple[str, str, int, str, str]:
    """Returns what scripts check a claim by. The entry distinguishes claims of a job that was released between."""
    return claim.job.id, claim.worker_id, claim.attempt, claim.stream, claim.entry_id


def _submit_arguments(
    request: GenerationRequest,
    idempotency_key: str | None,
    fingerprint: str | None,
    tenant: str | None,
    trace: Mapping[str, str] | None,
    needs: Collection[str],
    room: int,
) -> list[str | int | float]:
    """Returns what `submit` takes in `queue.lua`, from the job's new id to its room."""
    if request.model is None:
        raise InvalidRequest("no model was chosen", field="model")
    return [
        str(ULID()),
        request.model,
        request.priority.value,
        written(request),
        "" if request.deadline_seconds is None else request.deadline_seconds,
        "" if idempotency_key is None else keys.idempotency(idempotency_key, tenant),
        sha256((fingerprint or request.model_dump_json()).encode()).hexdigest(),
        tenant or "",
        request.n,
        json.dumps(dict(trace)) if trace else "",
        PROTOCOL,
        " ".join(sorted({*needs} - FIRST)),
        room,
    ]


def _raise_if_refused(outcome: bytes, record: Sequence[Any]) -> None:
    """Raises what a submit that was refused means; see `JobQueue.submit`."""
    if outcome == b"full":
        raise QueueFull("too many jobs are waiting", retry_after=RETRY_AFTER)
    if outcome == b"busy":
        raise TooManyJobs("this API key has reached its concurrent-job limit", retry_after=RETRY_AFTER)
    if outcome == b"limited":
        raise RateLimited("this API key has reached its limit of pictures per minute", retry_after=int(record[0]))
    if outcome == b"crowded":
        raise no_room(*record) if record[0] <= record[2] else _never_room(*record)
    if outcome == b"conflict":
        raise IdempotencyConflict("this Idempotency-Key was used with a different request")


def _never_room(needed: int, free: int, most: int) -> InvalidRequest:
    return InvalidRequest(
        f"too many or too large pictures: they may need {megabytes(needed)} of the queue server's memory, and it has "
        f"{megabytes(most)} for all jobs",
        field="n",
    )


def _check_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("no such job")
