"""The job queue on Redis Streams for gateways: submit, read, cancel, and what waits and who serves.

`watching.py` has the jobs' events, `batches.py` the batches, `work.py` what workers do. Each change of a job is one
call of `queue.lua`. So it happens completely or not at all, on Redis's clock, and a worker whose claim went to another
worker is refused.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from itertools import chain
from typing import Any

from redis.asyncio import Redis

from patchforge.service.errors import (
    IdempotencyConflict,
    InvalidRequest,
    NeverRoom,
    NotFound,
    NotReady,
    PatchforgeError,
    QueueFull,
    RateLimited,
    TooManyJobs,
)
from patchforge.service.messages.protocol import FIRST, PROTOCOL, needs_of
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard
from patchforge.service.messages.source import Source
from patchforge.service.queue import keys
from patchforge.service.queue.accepted import Accepted
from patchforge.service.queue.batch_records import StoredBatch
from patchforge.service.queue.batches import BatchStore
from patchforge.service.queue.connection import redis_call
from patchforge.service.queue.files import megabytes, no_room
from patchforge.service.queue.ids import new_id
from patchforge.service.queue.records import Served, announced, job_from, served_from
from patchforge.service.queue.roster import Roster
from patchforge.service.queue.watching import WatchedJobs, check_job_id
from patchforge.service.queue.work import WorkQueue
from patchforge.service.settings import Settings

RETRY_AFTER = 5  # seconds that a client should wait if the queue is full or its API key has too many jobs


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
class Backlog:
    """What waits at one moment, by model."""

    workers: int
    """Live workers."""
    jobs: Mapping[str, int]
    """Numbers of waiting jobs, for models that have any."""
    hurried: Mapping[str, int]
    """The same without jobs of batches, for which nobody waits."""
    oldest: Mapping[str, float]
    """Seconds that the oldest of these has waited, by the queue server's clock."""

    @classmethod
    def together(cls, parts: Sequence[Backlog]) -> Backlog:
        """Returns what waits on several servers together; every worker is known to all of them."""
        jobs, hurried, oldest = Counter[str](), Counter[str](), dict[str, float]()
        for part in parts:
            jobs.update(part.jobs)
            hurried.update(part.hurried)
            oldest |= {model: max(age, oldest.get(model, 0.0)) for model, age in part.oldest.items()}
        return cls(max((part.workers for part in parts), default=0), dict(jobs), dict(hurried), oldest)


class JobQueue(WatchedJobs, BatchStore, WorkQueue):
    """One process's access to the shared queue. Any method may raise `Unavailable`: Redis is full or silent."""

    def __init__(self, redis: Redis, blocking: Redis, settings: Settings) -> None:
        """`blocking` is for reads of up to `LONGEST_BLOCK` seconds, so its socket timeout must be longer than that."""
        super().__init__(redis, blocking, settings)
        self._roster = Roster(self)
        self._accepted = Accepted(settings.result_ttl_seconds / 2)

    @property
    def shards(self) -> Sequence[JobQueue]:
        """The queue on each server: there is one."""
        return [self]

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
        quiet: bool = False,
        tell_no_room: bool = True,
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
            tell_no_room: call `on_no_room` if that is why it is refused. Otherwise the caller tries another server.
            quiet: nobody waits for more than the job's end. Whoever watches it nevertheless hears of all that follows.

        Raises:
            QueueFull: too many jobs are waiting, or the queue server might run out of memory.
            NeverRoom: it would, even if it held nothing else.
            RateLimited: the tenant requested too many pictures per minute.
            TooManyJobs: the tenant has reached its concurrent-job limit.
            IdempotencyConflict: the key was used with another fingerprint.
            Unavailable: the job may or may not have been accepted. Repeating the call is safe only with a key.
        """
        needed = self.source_needs(source).union(needs_of(request) if needs is None else needs)
        job_id = new_id(self.number)
        sent = _submit_arguments(job_id, request, idempotency_key, fingerprint, tenant, trace, needed, room)
        fields = await self._keep_source(job_id, source)
        flags = ("1" if degradable else "", "1" if quiet else "")
        outcome, *record = await self._run("submit", *sent, *flags, *fields)
        if outcome != b"ok":
            await self._discard_source(fields)
        if outcome == b"crowded" and tell_no_room:
            self.on_no_room()
        _raise_if_refused(outcome, record)
        job = job_from(record[0])
        if job.id != job_id:  # the key's first job, which has its own
            await self._discard_source(fields)
        self._accepted.note(job.id)
        return job

    async def has_key(self, key: str) -> bool:
        """Tells whether a job was made with a key, which is from `keys.idempotency`."""
        return bool(await self._do("EXISTS", key))

    async def lost_jobs(self) -> list[str]:
        """Returns jobs that were accepted here and are gone since a failover, each once. Call it every second or so."""
        history, self._history = self._history, None
        if history is None:  # otherwise `check_server` has read it since the last call
            history = str((await self._do("INFO", "replication"))["master_replid"])
        doubtful = self._accepted.doubtful(history)
        if not doubtful:
            return []
        with redis_call():
            async with self._redis.pipeline(transaction=False) as looks:
                for job_id in doubtful:
                    looks.exists(keys.job(job_id))
                there = await looks.execute()
        lost = [job_id for job_id, found in zip(doubtful, there, strict=True) if not found]
        self._accepted.looked(lost)
        return lost

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
            ResultsUnavailable: the object store cannot take the picture to edit.
            InvalidRequest: the queue server's memory would never suffice.
            Unavailable: the line may or may not have been queued. Read the batch again.
        """
        offer = await self._make_offer(batch.key, batch.next, source)
        needed = self.source_needs(source).union(needs)
        sent = _submit_arguments(offer.job_id, request, None, None, batch.tenant, None, needed, room)
        result = f"flying {json.dumps({'job': sent[0], **details})}"
        outcome, *record = await self._run(
            "feed_line",
            batch.key,
            batch.next,
            custom_id,
            result,
            *sent,
            *("", "1"),  # nobody watches it: the feeder looks now and then
            *offer.fields,
        )
        fed = FeedOutcome(outcome.decode()) if outcome.decode() in list(FeedOutcome) else FeedOutcome.QUEUED
        try:
            _raise_if_refused(outcome, record)
        except InvalidRequest:
            await self._discard_source(offer.fields)
            raise
        except PatchforgeError:
            await self._put_off(batch.key, offer)
            raise
        if fed is FeedOutcome.ENOUGH:
            await self._put_off(batch.key, offer)
        elif fed is not FeedOutcome.QUEUED:
            await self._discard_source(offer.fields)
        return fed

    async def image(self, job_id: str, index: int) -> bytes:
        """Returns an encoded picture.

        Raises:
            NotFound: there is no such job or index.
            NotReady: the picture is not finished, or never will be.
            ResultsUnavailable: it is in the object store, which cannot be used.
        """
        check_job_id(job_id)
        picture = await self._read_picture(job_id, index)
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

    async def backlog(self) -> Backlog:
        """Returns what waits now."""
        workers, lines = await self._run("backlog")
        jobs, hurried, oldest = Counter[str](), Counter[str](), dict[str, float]()
        for model, count, count_hurried, age in lines:
            name = model.decode(errors="replace")
            jobs[name] += count
            hurried[name] += count_hurried
            if age:  # otherwise all are of batches, or someone deleted the job by hand
                oldest[name] = max(float(age), oldest.get(name, 0.0))
        return Backlog(workers, dict(jobs), dict(+hurried), oldest)

    async def waiting(self, *, batches: bool = True) -> Mapping[str, int]:
        """Returns model → number of its waiting jobs, for models that have any. `batches`: count theirs too."""
        backlog = await self.backlog()
        return backlog.jobs if batches else backlog.hurried

    async def oldest_waiting(self) -> Mapping[str, float]:
        """Returns model → seconds that its oldest job, batches apart, has waited, by the queue server's clock."""
        return (await self.backlog()).oldest

    async def held(self) -> dict[str, int]:
        """Returns model → number of its jobs that workers hold, dead or alive, for models that have any."""
        found: Counter[str] = Counter()
        for name, jobs in await self._run("held"):
            found[name.decode(errors="replace")] += jobs
        return dict(+found)

    async def workers(self) -> dict[str, Served]:
        """Returns worker id → what the worker announced, for all live workers."""
        found = await self._read_announcements(keys.WORKER_MODELS, keys.ANNOUNCEMENT)
        return {worker: served_from(cards, about) for worker, cards, about in found}

    async def known_workers(self, within: float = 0.0) -> Mapping[str, Served]:
        """Returns the same as `workers`, at a cost that does not grow with their number.

        What was read before is kept, and only what changed is read; while nothing changes, the result is the same
        object. Workers that died without a word may be in it for `roster.READ_AGAIN` seconds more.

        `within`: seconds for which an answer that nothing has changed counts. News of a change ends that at once,
        except for changes that workers of versions before this one make.
        """
        return await self._roster.read(within)

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


def _submit_arguments(
    job_id: str,
    request: GenerationRequest,
    idempotency_key: str | None,
    fingerprint: str | None,
    tenant: str | None,
    trace: Mapping[str, str] | None,
    needs: Collection[str],
    room: int,
) -> list[str | int | float]:
    """Returns what `submit` takes in `queue.lua`, from the job's id to its room."""
    if request.model is None:
        raise InvalidRequest("no model was chosen", field="model")
    return [
        job_id,
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


def _never_room(needed: int, free: int, most: int) -> NeverRoom:
    error = NeverRoom(
        f"too many or too large pictures: they may need {megabytes(needed)} of the queue server's memory, and it has "
        f"{megabytes(most)} for all jobs",
        field="n",
    )
    error.most = most
    return error
