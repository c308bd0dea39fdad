"""The job queue on Redis Streams: submit, watch and cancel for gateways, claim, heartbeat and finish for workers.

Whatever changes a job is one call of ``queue.lua``: it happens entirely or not at all, on Redis's clock, and a worker
whose claim went to another is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Any

from redis.asyncio import Redis
from ulid import ULID

from service import keys
from service.errors import (
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
from service.event_hub import EventHub
from service.events import TERMINAL_EVENTS, Cancelled, Completed, Event, Expired, Failed, ImageReady
from service.queue_records import CARDS, EVENT, Source, cards_from, fields_of, job_from, terminal_event
from service.queue_redis import EVENTS_KEPT, LONGEST_BLOCK, QueueConnection, redis_call
from service.schemas import GenerationRequest, Job, ModelCard, Priority
from service.settings import Settings

ANNOUNCED = 15  # seconds a worker's announcement lasts
BATCH = 64  # events a watcher reads at once; one for whom there are as many has fallen behind,
BATCH_BYTES = 512 << 10  # and so has one for whom there is more than this: nobody holds memory by reading slowly
EVENT_BYTES = 1 << 20  # what one job's events may take, about
POLL = 2.0  # seconds after which a watcher looks unbidden, in case its bell was lost
RETRY_AFTER = 5  # seconds a client is asked to wait when the queue is full, or its own share of it

_JOB_ID = re.compile(r"[0-9A-Z]{26}")
_EVENT_ID = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?")


class Heartbeat(StrEnum):
    """What a worker learns of its claim: go on; stop, someone cancelled; or drop it, the job is another's now."""

    OK = "ok"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True)
class Claim:
    """A worker's right to run a job until it finishes or releases it, or is silent for ``claim_idle_seconds``."""

    job: Job
    worker_id: str
    attempt: int
    stream: str
    entry_id: str


class JobQueue(QueueConnection):
    """One process's view of the shared queue. Any method may raise ``Unavailable``: Redis is away, or full."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        """``blocking`` is for reads of up to ``LONGEST_BLOCK`` seconds: its socket timeout must exceed that."""
        super().__init__(redis, blocking, settings)
        self._hub = EventHub(blocking)
        self._unanswered: dict[str, str] = {}
        """Token of a worker's last call for a job, if that had no answer."""

    async def close(self) -> None:
        await self._hub.close()
        await super().close()

    # Gateways: submit, look, cancel.

    async def submit(
        self,
        request: GenerationRequest,
        *,
        idempotency_key: str | None = None,
        fingerprint: str | None = None,
        tenant: str | None = None,
        source: Source | None = None,
        trace: Mapping[str, str] | None = None,
    ) -> Job:
        """Accepts a request with every default filled in, or returns the job its key was first used for.

        ``fingerprint`` stands for the request as the client sent it; default: the filled-in request. A gateway that
        draws a seed must pass it, or a client's retry would look like another request. ``tenant`` owns the job, and its
        keys are its own, as are its limits. ``source`` is what the job starts from, ``trace`` the caller's place in a
        trace: see ``service.tracing.carrier``.
        Raises QueueFull, RateLimited, TooManyJobs, or IdempotencyConflict if the key was used with another fingerprint.
        ``Unavailable`` leaves open whether the job was accepted: repeating the call is safe with a key, and only then.
        """
        if request.model is None:
            raise InvalidRequest("no model was chosen", field="model")
        body = request.model_dump_json()
        outcome, *record = await self._run(
            "submit",
            str(ULID()),
            request.model,
            request.priority.value,
            body,
            "" if request.deadline_seconds is None else request.deadline_seconds,
            "" if idempotency_key is None else keys.idempotency(idempotency_key, tenant),
            sha256((fingerprint or body).encode()).hexdigest(),
            tenant or "",
            request.n,
            json.dumps(dict(trace)) if trace else "",
            *_fields(source),
        )
        if outcome == b"full":
            raise QueueFull("too many jobs are waiting", retry_after=RETRY_AFTER)
        if outcome == b"busy":
            raise TooManyJobs("as many jobs of this API key are in flight as may be", retry_after=RETRY_AFTER)
        if outcome == b"limited":
            raise RateLimited("this API key asks for too many pictures a minute", retry_after=int(record[0]))
        if outcome == b"conflict":
            raise IdempotencyConflict("this Idempotency-Key was used with a different request")
        return job_from(record[0])

    async def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        return await self._job_after("read", job_id)

    async def image(self, job_id: str, index: int) -> bytes:
        """The encoded picture. Raises NotFound (no such job or index) or NotReady (not yet, or never)."""
        job = await self.get(job_id)
        if not 0 <= index < job.request.n:
            raise NotFound(f"job {job_id} has no picture {index}")
        picture: bytes | None = await self._do("HGET", keys.images(job_id), index)
        if picture is None:
            raise NotReady(f"the job is {job.status.value} and has no picture {index}")
        return picture

    async def source(self, job_id: str) -> Source:
        """What a job starts from. Raises NotFound if it has no such thing, or has it no more."""
        image, mask = await self._do("HMGET", keys.sources(job_id), "image", "mask")
        if image is None:
            raise NotFound(f"job {job_id} has no picture to start from")
        return Source(image, mask)

    async def cancel(self, job_id: str) -> Job:
        """Ends a waiting job, asks the worker of a running one to stop, leaves an ended one be. Raises NotFound."""
        return await self._job_after("cancel", job_id)

    def watch(self, job_id: str, after: str = "0") -> AsyncGenerator[tuple[str, Event], None]:
        """Yields (event id, event) from after the given id, past and then live, up to the terminal event.

        A reader that falls behind misses previews that newer ones supersede, and nothing else; nor does one whose place
        was trimmed away. Each gets the terminal event, unless ``after`` is its id.
        Raises InvalidEventId at once if ``after`` is malformed; NotFound when iterated.
        """
        if not _EVENT_ID.fullmatch(after):
            raise InvalidEventId("not an event id", field="Last-Event-ID")
        return self._watch(job_id, after if "-" in after else f"{after}-0")

    async def _watch(self, job_id: str, after: str) -> AsyncGenerator[tuple[str, Event], None]:
        _check_job_id(job_id)
        with self._hub.listen(job_id) as bell:
            while True:
                bell.clear()
                status, last_id, entries = await self._run("news", job_id, after, BATCH, BATCH_BYTES)
                if status is None:
                    raise NotFound(f"no job {job_id}")
                for entry_id, (_, text) in entries:
                    after, event = entry_id.decode(), EVENT.validate_json(text)
                    yield after, event
                    if isinstance(event, TERMINAL_EVENTS):
                        return
                if entries:
                    continue
                if last_id is None:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(POLL):
                            await bell.wait()
                else:  # the job ended, and its last event was seen before, or has gone
                    if last_id.decode() != after:
                        yield last_id.decode(), terminal_event(await self.get(job_id))
                    return

    async def waiting(self) -> dict[str, int]:
        """The number of waiting jobs of each model that has any."""
        members = await self._run("waiting")
        return dict(Counter(member.decode().partition(":")[2] for member in members))

    async def oldest_waiting(self) -> dict[str, float]:
        """Seconds the longest waiting job of each model that has any has waited, by the queue server's clock."""
        return {model.decode(): float(age) for model, age in await self._run("oldest")}

    # Workers tell gateways what they serve and how they fare.

    async def announce(self, worker_id: str, cards: Sequence[ModelCard]) -> None:
        """Shows a worker's models to gateways for ``ANNOUNCED`` seconds; to be repeated well within that."""
        await self._run("announce", worker_id, keys.worker_models(worker_id), CARDS.dump_json(list(cards)), ANNOUNCED)

    async def announce_metrics(self, worker_id: str, text: bytes) -> None:
        """Shows a worker's Prometheus exposition to gateways for ``ANNOUNCED`` seconds."""
        await self._run("announce", worker_id, keys.worker_metrics(worker_id), text, ANNOUNCED)

    async def retire(self, worker_id: str) -> None:
        """Takes a worker's announcements back."""
        await self._do("DEL", keys.worker_models(worker_id), keys.worker_metrics(worker_id))
        await self._do("ZREM", keys.WORKERS, worker_id)

    async def workers(self) -> dict[str, list[ModelCard]]:
        """What each live worker serves, by the worker's id."""
        return {worker: list(cards_from(text)) for worker, text in await self._announced(keys.WORKER_MODELS)}

    async def models(self) -> list[ModelCard]:
        """What the live workers serve between them, by name."""
        cards = {card.name: card for served in (await self.workers()).values() for card in served}
        return [cards[name] for name in sorted(cards)]

    async def worker_metrics(self) -> list[tuple[str, bytes]]:
        """(worker id, Prometheus exposition) of each live worker that announced one."""
        return await self._announced(keys.WORKER_METRICS)

    async def _announced(self, prefix: str) -> list[tuple[str, bytes]]:
        return [(worker.decode(), text) for worker, text in await self._run("announced", prefix)]

    # Workers: take a job, keep it, end it.

    async def claim(self, worker_id: str, models: Sequence[str], *, block_seconds: float) -> Claim | None:
        """Takes the most urgent waiting job of these models, waiting up to ``block_seconds`` for one."""
        streams = _streams(models)
        give_up = time.monotonic() + block_seconds
        while True:
            claim, seen = await self._take("claim", worker_id, streams)
            left = give_up - time.monotonic()
            if claim or left <= 0 or not streams:
                return claim
            # Waits for news without taking it: a worker cancelled or killed here holds nothing.
            block = max(1, round(1000 * min(left, LONGEST_BLOCK)))
            with redis_call():
                await self._blocking.xread(dict(zip(streams, seen, strict=True)), count=1, block=block)

    async def reclaim(self, worker_id: str, models: Sequence[str]) -> Claim | None:
        """Takes over a job whose worker fell silent; ends those that were cancelled or are out of attempts."""
        claim, _ = await self._take("reclaim", worker_id, _streams(models))
        return claim

    async def heartbeat(self, claim: Claim) -> Heartbeat:
        """Keeps a claim for another ``claim_idle_seconds`` and tells how it stands."""
        return Heartbeat((await self._run("heartbeat", *_proof(claim))).decode())

    async def publish(self, claim: Claim, event: Event) -> bool:
        """Appends to the job's events; False if the claim is lost. A terminal event is for ``finish``."""
        if isinstance(event, TERMINAL_EVENTS):
            raise TypeError(f"{event.type} ends a job: finish it")
        text = EVENT.dump_json(event)
        kept = max(16, min(EVENTS_KEPT, EVENT_BYTES // len(text)))
        return bool(await self._run("publish", *_proof(claim), text, kept))

    async def store_image(self, claim: Claim, index: int, data: bytes) -> bool:
        """Keeps an encoded picture and publishes ImageReady; False if the claim is lost."""
        return bool(
            await self._run("store_image", *_proof(claim), index, data, ImageReady(index=index).model_dump_json())
        )

    async def finish(self, claim: Claim, event: Completed | Failed | Cancelled | Expired) -> bool:
        """Ends the job with its one terminal event; False if the claim is lost or the job has ended."""
        outcome: tuple[str, ...] = ()
        if isinstance(event, Completed):
            outcome = ("report", event.report.model_dump_json())
        elif isinstance(event, Failed):
            outcome = ("error", event.error.model_dump_json())
        return bool(await self._run("finish", *_proof(claim), event.type, event.model_dump_json(), *outcome))

    async def release(self, claim: Claim) -> bool:
        """Gives the job back, first in line and with no attempt charged; False if the claim is lost.

        A job that someone asked to cancel ends instead.
        """
        return bool(await self._run("release", *_proof(claim)))

    async def _job_after(self, command: str, job_id: str) -> Job:
        _check_job_id(job_id)
        record = await self._run(command, job_id)
        if not record:
            raise NotFound(f"no job {job_id}")
        return job_from(record)

    async def _take(self, command: str, worker_id: str, streams: Sequence[str]) -> tuple[Claim | None, list[bytes]]:
        """Runs claim or reclaim; a caller cancelled meanwhile gives back what it took, for no one would run it."""
        if not streams:
            return None, []
        running = asyncio.ensure_future(self._ask(command, worker_id, streams))
        try:
            record, seen = await asyncio.shield(running)
        except asyncio.CancelledError:
            with contextlib.suppress(Unavailable):
                record, _ = await running
                if record:
                    await self.release(_claim(worker_id, record))
            raise
        return _claim(worker_id, record) if record else None, seen

    async def _ask(self, command: str, worker_id: str, streams: Sequence[str]) -> Any:
        """Runs claim or reclaim; the next call after one without an answer gets the job that one may have started."""
        token = self._unanswered.pop(worker_id, None) or str(ULID())
        try:
            return await self._run(command, worker_id, token, streams=streams)
        except Unavailable:
            self._unanswered[worker_id] = token
            raise


def _streams(models: Sequence[str]) -> list[str]:
    """Queue streams, most urgent first; within a priority in random order, so that no model starves another."""
    shuffled = random.sample(models, len(models))
    return [keys.queue(model, level) for level in (keys.RETURNED, *Priority) for model in shuffled]


def _claim(worker_id: str, record: Sequence[bytes]) -> Claim:
    job, fields = job_from(record), fields_of(record)
    return Claim(job, worker_id, job.attempt, fields["stream"].decode(), fields["entry"].decode())


def _proof(claim: Claim) -> tuple[str, str, int, str, str]:
    """What a script checks a claim by; the entry tells apart two claims of a job that was released between them."""
    return claim.job.id, claim.worker_id, claim.attempt, claim.stream, claim.entry_id


def _fields(source: Source | None) -> list[str | bytes]:
    """Names and values in turn."""
    if source is None:
        return []
    fields: list[str | bytes] = ["image", source.image]
    return fields if source.mask is None else [*fields, "mask", source.mask]


def _check_job_id(job_id: str) -> None:
    if not _JOB_ID.fullmatch(job_id):
        raise NotFound("no such job")
