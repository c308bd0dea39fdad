"""What callers of every protocol do with jobs: submit, run, watch, cancel, fetch pictures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry import trace

from patchforge.service import tracing
from patchforge.service.errors import InvalidRequest, NotFound, PatchforgeError, Unavailable, Unsupported
from patchforge.service.gateway.defaults import check_budget, check_fits_model, fill_defaults, is_degradable
from patchforge.service.gateway.fleet import Fleet
from patchforge.service.gateway.remembered import RememberedModels
from patchforge.service.gateway.runs import Run
from patchforge.service.gateway.source_pictures import SourcePictures
from patchforge.service.gateway.statistics import InferenceStatistics
from patchforge.service.messages.events import Event
from patchforge.service.messages.protocol import needs_of
from patchforge.service.messages.room import room_for
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard
from patchforge.service.messages.source import Source
from patchforge.service.queue import GatewayQueue
from patchforge.service.queue.records import Served

MAX_IDEMPOTENCY_KEY = 255
RETRY_SECONDS = 0.5  # between attempts to cancel a job while the queue server is away
FLEET_SECONDS = 1.0  # for which an answer that no worker's announcement has changed counts, if no news says otherwise

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A request that is ready for the queue."""

    request: GenerationRequest
    """With every default filled in."""
    source: Source | None
    fingerprint: str
    """Of the request as its caller sent it."""
    needs: frozenset[str]
    degradable: bool
    card: ModelCard
    room: int
    """Bytes that the queue server may come to hold of the job."""


class JobService:
    """The gateway's rules for jobs, the same for every protocol."""

    def __init__(self, queue: GatewayQueue, default_models: Sequence[str] = (), remember_seconds: int = 0) -> None:
        """Requests without a model go to the first of `default_models` that fits, then to the first by name.

        A model whose workers have gone is still accepted for `remember_seconds`.
        """
        self.queue = queue
        self.remembered = RememberedModels(queue, remember_seconds)
        self._default_models = default_models
        self._fleet: Fleet | None = None
        self._fleet_of: tuple[Mapping[str, Served], Sequence[Served]] = {}, ()
        """What that was made of."""
        self.draining = False
        self.statistics = InferenceStatistics()
        self._pictures = SourcePictures()
        self._closing = asyncio.Event()
        self._watches: set[asyncio.Timeout] = set()
        self._background: set[asyncio.Task[Any]] = set()

    async def ready(self) -> Fleet:
        """Returns the live workers and their models, if the gateway is ready for requests.

        Raises:
            Unavailable: the server is shutting down, or the queue server or all workers are away.
        """
        self.refuse_when_draining()
        await self.queue.check_server()
        fleet = await self.fleet()
        if not fleet.cards:
            raise Unavailable("no worker is serving a model", retry_after=5)
        return fleet

    async def fleet(self) -> Fleet:
        """Returns the live workers and their models, and the models that are remembered."""
        workers, remembered = await asyncio.gather(self.queue.known_workers(FLEET_SECONDS), self.remembered.read())
        # To look at every worker for each request would cost more than all else, if there are many.
        if self._fleet is None or workers is not self._fleet_of[0] or remembered != self._fleet_of[1]:
            self._fleet_of = workers, remembered
            self._fleet = Fleet(workers.values(), self._default_models, remembered)
        return self._fleet

    async def model(self, name: str) -> ModelCard:
        """Returns the model of that name; raises the same errors as `Fleet.find`."""
        return (await self.fleet()).find(name)

    async def submit(
        self,
        request: GenerationRequest,
        tenant: str | None,
        idempotency_key: str | None = None,
        *,
        quiet: bool = False,
    ) -> Job:
        """Queues a job that continues without its caller. Only `tenant` can see it.

        `quiet`: its caller waits only for its end.

        Raises:
            InvalidRequest: the request does not fit the model, or a picture cannot be used; `field` says which.
            NotFound: no worker serves the model, or the bundle that the request pins.
            IdempotencyConflict: the key was used with another request.
            RateLimited: the API key has reached a limit.
            QueueFull: too many jobs are waiting, or the queue server might run out of memory.
            TooLittleTime: no worker could finish the pictures within `finish_within_seconds`.
            Unavailable: the server is shutting down, or the queue server or all workers are away.
            ResultsUnavailable: the object store cannot take the picture to edit.
        """
        self.refuse_when_draining()
        check_idempotency_key(idempotency_key)
        ready = await self.prepare(request)
        job = await self.queue.submit(
            ready.request,
            idempotency_key=idempotency_key,
            fingerprint=ready.fingerprint,
            tenant=tenant,
            source=ready.source,
            trace=tracing.carrier(),
            needs=ready.needs,
            room=ready.room,
            degradable=ready.degradable,
            quiet=quiet,
        )
        trace.get_current_span().set_attribute("patchforge.job", job.id)
        return check_readable(job)

    async def prepare(self, request: GenerationRequest) -> Prepared:
        """Checks a request, and fills in all that its caller left open.

        Raises:
            InvalidRequest, NotFound, TooLittleTime, Unavailable: as `submit`.
        """
        self.refuse_when_draining()
        fleet = await self.fleet()
        card = fleet.choose_for(request)
        check_fits_model(request, card)
        request, source = await self._pictures.prepare(request)
        # The fingerprint covers the request as sent: a retry is the same request, although it gets another random seed.
        # All gateway versions must compute the same one, so a new field must not appear in it until it is used.
        sent = request.model_dump_json()
        filled = fill_defaults(request, card)
        check_budget(filled, card)
        needs = needs_of(filled) | self.queue.source_needs(source)
        fleet.check_capabilities(card.name, needs)
        fleet.check_time(filled)
        room = room_for(filled, card, source, pictures_elsewhere=self.queue.objects is not None)
        return Prepared(filled, source, sent, needs, is_degradable(request), card, room)

    async def run(
        self,
        request: GenerationRequest,
        tenant: str | None,
        idempotency_key: str | None = None,
        *,
        quiet: bool = False,
    ) -> Run:
        """Queues a job that belongs to its caller. Use the result in `async with`: leaving it early cancels the job.

        With an idempotency key the caller can come back for the job, so leaving does not cancel it.
        `quiet`: the caller will only wait for `completed`. Raises the same errors as `submit`.
        """
        began = time.monotonic()
        submitting = asyncio.create_task(self.submit(request, tenant, idempotency_key, quiet=quiet))
        try:
            job = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # The queue may still accept the job, but its caller is gone.
            self._spawn(self._abandon(submitting, cancel=idempotency_key is None))
            raise
        # A key's job may have been accepted long before.
        return Run(self, job, detached=idempotency_key is not None, since=began if idempotency_key is None else None)

    async def get(self, job_id: str, tenant: str | None) -> Job:
        """Returns the tenant's job.

        Raises:
            NotFound: there is no such job, or it belongs to another tenant.
            Unsupported: another version wrote the job, and this gateway cannot read it.
        """
        return check_readable(await self._get_owned(job_id, tenant))

    async def cancel(self, job_id: str, tenant: str | None) -> Job:
        """Cancels the tenant's job and returns it.

        Raises:
            NotFound: there is no such job, or it belongs to another tenant.
            Unsupported: the job is cancelled, but this gateway cannot read it.
        """
        await self._get_owned(job_id, tenant)
        return check_readable(await self.queue.cancel(job_id))

    async def _get_owned(self, job_id: str, tenant: str | None) -> Job:
        job = await self.queue.get(job_id)
        if job.tenant != tenant:
            raise NotFound(f"no job {job_id}")
        return job

    async def image(self, job: Job, index: int) -> bytes:
        return await self.queue.image(job.id, index)

    async def picture_links(self, job: Job) -> dict[int, str]:
        """Returns index → link that needs no API key, for the pictures that are in the object store."""
        return await self.queue.picture_links(job.id)

    async def watch(
        self, job_id: str, tenant: str | None, after: str | None
    ) -> AsyncGenerator[tuple[str, Event], None]:
        """Yields a job's events after the event id `after`, past ones first, until the job ends.

        Errors are raised here, before the first event:

        Raises:
            InvalidEventId: `after` is not an event id.
            NotFound: there is no such job, or it belongs to another tenant.
        """
        events = self.queue.watch(job_id, after or "0")
        await self._get_owned(job_id, tenant)
        return events

    async def watch_rest(
        self, job_id: str, tenant: str | None, after: str | None
    ) -> AsyncGenerator[tuple[str, Event], None] | None:
        """Does the same as `watch`, but returns None if the job has ended and all its events were before `after`."""
        events = await self.watch(job_id, tenant, after)
        if after is None or not (await self._get_owned(job_id, tenant)).status.terminal:
            return events
        try:
            first = await anext(events)
        except StopAsyncIteration:
            return None
        return _with_first(first, events)

    @asynccontextmanager
    async def until_drained(self) -> AsyncIterator[None]:
        """Interrupts its `async with` block when the server starts to shut down.

        Raises:
            Unavailable: the server is shutting down.
        """
        self.refuse_when_draining()
        limit = asyncio.timeout(None)
        self._watches.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                self.refuse_when_draining()
            raise
        finally:
            self._watches.discard(limit)

    def drain(self) -> None:
        """Refuses new jobs and ends event watches, which clients can resume elsewhere. Running calls continue."""
        if self.draining:
            return
        self.draining = True
        for limit in self._watches:
            limit.reschedule(asyncio.get_running_loop().time())

    def cancel_soon(self, job_id: str) -> None:
        """Cancels a job in the background, for a caller that left: the caller's own task may be cancelled by now."""
        self._spawn(self._cancel(job_id))

    async def aclose(self) -> None:
        """Waits for background cancellations. Each tries once more, then gives up."""
        self._closing.set()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _abandon(self, submitting: asyncio.Task[Job], *, cancel: bool) -> None:
        with suppress(PatchforgeError):
            job = await submitting
            if cancel:
                await self._cancel(job.id)

    async def _cancel(self, job_id: str) -> None:
        """Cancels a job, and retries while the queue server is away: a device would work for nobody."""
        logged = False
        while True:
            try:
                await self.queue.cancel(job_id)
                return
            except NotFound:
                return
            except Unavailable:
                if self._closing.is_set():
                    raise
            if not logged:
                log.warning("an abandoned job will be cancelled when the queue server is back", job=job_id)
                logged = True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), RETRY_SECONDS)

    def refuse_when_draining(self) -> None:
        """Raises Unavailable if the server is shutting down."""
        if self.draining:
            raise Unavailable("the server is shutting down")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)  # the event loop keeps only a weak reference
        task.add_done_callback(self._log_failure)

    def _log_failure(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("could not cancel a job", reason=str(error))


async def _with_first(
    first: tuple[str, Event], rest: AsyncGenerator[tuple[str, Event], None]
) -> AsyncGenerator[tuple[str, Event], None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def check_idempotency_key(key: str | None) -> None:
    """Raises InvalidRequest if a key is empty or too long."""
    if key is not None and not 0 < len(key) <= MAX_IDEMPOTENCY_KEY:
        raise InvalidRequest(f"must have 1 to {MAX_IDEMPOTENCY_KEY} characters", field="idempotency_key")


def check_readable(job: Job) -> Job:
    """Returns the job if this gateway can read all of it.

    Raises:
        Unsupported: another version wrote the job, and this gateway cannot read it.
    """
    if job.unreadable is not None:
        raise Unsupported(f"this gateway cannot read the job, which another version wrote: {job.unreadable}")
    return job
