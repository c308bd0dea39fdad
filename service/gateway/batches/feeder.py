"""Feeds the lines of all batches into the queue, a few at a time, and notes how they end.

Every gateway has a feeder for each queue server, and for each server one of them works at a time. All that it knows is
on that server, and each of its steps is one call there, so it may be killed at any moment: another one goes on.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import structlog
from ulid import ULID

from patchforge.service.errors import (
    InvalidRequest,
    NotFound,
    PatchforgeError,
    QueueFull,
    RateLimited,
    ResultsElsewhere,
    ResultsUnavailable,
    Unavailable,
)
from patchforge.service.gateway.batches.lines import answer_with, custom_id_of, prepare_line, read_line
from patchforge.service.gateway.jobs import JobService
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.gateway.problems import UNEXPECTED
from patchforge.service.messages.batches import BatchLine
from patchforge.service.queue import JobQueue
from patchforge.service.queue.batch_records import StoredBatch
from patchforge.service.queue.job_queue import FeedOutcome

BUSY_SECONDS, IDLE_SECONDS = 0.2, 1.0
"""Between passes while there are batches, and while there are none."""
LINES_OF_A_PASS = 256
PAUSE_SECONDS = 5.0
"""Between attempts to use an object store that does not answer: each takes seconds, in which others get no lines."""
RESTART_SECONDS = 60.0
"""A request for a model that nobody serves is refused only if no worker came or went for so long: one may restart."""

log = structlog.get_logger(__name__)


class LineGone(PatchforgeError):
    """A line of a batch expired in the object store before its turn, or somebody deleted it there."""

    code = "line_expired"


class BatchFeeder:
    """One gateway's part in the work on batches."""

    def __init__(self, service: JobService, queue: JobQueue, metrics: GatewayMetrics) -> None:
        """`queue` has the batches, and takes their jobs."""
        self._service = service
        self._queue = queue
        self._metrics = metrics
        self._name = str(ULID())
        self._stopping = asyncio.Event()
        self._served: frozenset[tuple[str, str | None]] = frozenset()
        self._served_since = time.monotonic()
        self._no_objects_before, self._away = 0.0, ""

    async def run(self) -> None:
        """Works until `stop` is called. Nothing that happens to a batch ends it."""
        while not self._stopping.is_set():
            busy = False
            try:
                busy = await self._work()
            except Unavailable:
                pass  # readiness reports it
            except Exception as error:
                log.error("unexpected error while feeding batches", exc_info=error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), BUSY_SECONDS if busy else IDLE_SECONDS)
        with suppress(Unavailable):
            await self._queue.stop_leading(self._name)

    def stop(self) -> None:
        self._stopping.set()

    async def _work(self) -> bool:
        """Makes one pass over all batches. Returns whether there are any for this gateway."""
        keys = await self._queue.open_batches()
        if not keys or not await self._queue.lead_batches(self._name):  # no batches need no leader
            return False
        stepped = [await self._step(key) for key in keys]
        feeding = [stored for stored in stepped if stored is not None and stored.feeding]
        if feeding:
            await self._feed(feeding)
        return True

    async def _step(self, key: str) -> StoredBatch | None:
        stored, outcomes = await self._queue.step_batch(key)
        for outcome in outcomes:
            self._metrics.count_batch_line(outcome)
        if stored is not None:
            await self._move_results(stored)
        if stored is not None and stored.batch.ended:
            self._metrics.count_batch(stored.batch.status)
            counts = stored.batch.request_counts
            log.info("a batch has ended", batch=stored.batch.id, status=stored.batch.status, **counts.model_dump())
        return stored

    async def _move_results(self, stored: StoredBatch) -> None:
        """Moves results to the object store, if they go there. While it is away, they stay, and no batch ends."""
        ends_with_it = stored.archived is not None and stored.batch.status == "finalizing"
        if time.monotonic() < self._no_objects_before:
            if ends_with_it:
                await self._queue.note_waiting(stored, self._away)
            return
        try:
            await self._queue.move_results(stored, custom_id_of)
        except Unavailable as error:  # also if replicas have not confirmed a move: others go on
            if isinstance(error, ResultsUnavailable):
                self._no_objects_before, self._away = time.monotonic() + PAUSE_SECONDS, error.message
            await self._queue.note_waiting(stored, error.message)
        else:
            if not stored.feeding:  # else its next line says what it waits for
                await self._queue.note_waiting(stored, None)

    async def _read_next(self, stored: StoredBatch) -> bytes:
        """Returns a batch's next line. While the object store is away, this fails at once, so that others go on."""
        if stored.apart and time.monotonic() < self._no_objects_before:
            raise ResultsUnavailable(self._away)
        try:
            return await self._queue.batch_line(stored)
        except ResultsElsewhere:  # our store may answer, and other batches need it
            raise
        except ResultsUnavailable as error:
            self._no_objects_before, self._away = time.monotonic() + PAUSE_SECONDS, error.message
            raise

    async def _feed(self, feeding: Sequence[StoredBatch]) -> None:
        """Queues a line of each batch in turn, until the limits are reached."""
        turns = deque(random.sample(feeding, len(feeding)))  # none is always the first
        for _ in range(LINES_OF_A_PASS):
            if not turns or self._stopping.is_set():
                return
            stored = turns.popleft()
            if await self._feed_line(stored) and stored.next + 1 < stored.length:
                turns.append(replace(stored, next=stored.next + 1))

    async def _feed_line(self, stored: StoredBatch) -> bool:
        """Queues or refuses a batch's next line. Returns whether the batch may go on in this pass."""
        line: BatchLine | None = None
        try:
            text = await self._read_next(stored)
        except ResultsUnavailable as error:
            await self._queue.note_waiting(stored, error.message)
            return False
        except NotFound:
            return await self._refuse(stored, b"", line, LineGone("this line is not in the object store any more"))
        if not text.strip():
            return await self._queue.settle_line(stored.key, stored.next, None, None)
        try:
            line = read_line(text, stored.batch.endpoint)
            outcome = await self._queue_line(stored, line)
        except (Unavailable, QueueFull, RateLimited) as error:  # it passes
            await self._queue.note_waiting(stored, error.message)
            return False
        except NotFound as error:
            if await self._may_be_restarting():
                await self._queue.note_waiting(stored, error.message)
                return False
            return await self._refuse(stored, text, line, error)
        except PatchforgeError as error:
            return await self._refuse(stored, text, line, error)
        except Exception as error:  # a bug that this line meets must not stop the others
            log.error("unexpected error", batch=stored.batch.id, line=stored.next, exc_info=error)
            return await self._refuse(stored, text, line, PatchforgeError(UNEXPECTED))
        if outcome is FeedOutcome.DUPLICATE:
            twice = InvalidRequest("an earlier line has the same one", field="custom_id")
            return await self._refuse(stored, text, None, twice)
        return outcome is FeedOutcome.QUEUED

    async def _queue_line(self, stored: StoredBatch, line: BatchLine) -> FeedOutcome:
        ready = await prepare_line(self._service, line)
        made = ready.prepared
        return await self._queue.feed_line(
            stored,
            line.custom_id,
            ready.details,
            made.request,
            source=made.source,
            needs=made.needs,
            room=made.room,
        )

    async def _refuse(self, stored: StoredBatch, text: bytes, line: BatchLine | None, error: PatchforgeError) -> bool:
        """Notes why a line has no job: as its endpoint would answer, or as an error of the line itself."""
        custom_id = custom_id_of(text)
        details: dict[str, Any] = {"custom_id": custom_id}
        if line is not None and line.url is not None:
            details["response"] = answer_with(error, line.url, stored.name_of(stored.next))
        else:
            message = error.message if error.field is None else f"{error.field}: {error.message}"
            details["error"] = {"code": error.code, "message": message}
        settled = await self._queue.settle_line(stored.key, stored.next, custom_id, details)
        if settled:
            self._metrics.count_batch_line("refused")
        return settled

    async def _may_be_restarting(self) -> bool:
        """Whether the models that are served have changed a short time ago."""
        served = (await self._service.fleet()).bundles
        if served != self._served:
            self._served, self._served_since = served, time.monotonic()
        return time.monotonic() - self._served_since < RESTART_SECONDS
