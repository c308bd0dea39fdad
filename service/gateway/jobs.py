"""What REST, OpenAI and gRPC callers do with jobs: submit, run, watch, cancel, fetch pictures."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Self

import structlog
from opentelemetry import trace

from service import tracing
from service.errors import InvalidRequest, NotFound, PatchforgeError, Unavailable
from service.events import TERMINAL_EVENTS, Event
from service.gateway.source_pictures import SourcePictures
from service.queue import JobQueue
from service.sampler_options import Adaptive, Quality, preset
from service.schemas import GenerationRequest, Job, ModelCard

MAX_IDEMPOTENCY_KEY = 255
RETRY_SECONDS = 0.5  # between attempts to cancel a job while the queue server is away
SEEDS = 2**32  # what the gateway draws from; short enough to copy by hand and exact in JavaScript

log = structlog.get_logger(__name__)


class JobService:
    """The rules of the gateway, the same for every protocol."""

    def __init__(self, queue: JobQueue) -> None:
        self.queue = queue
        self.draining = False
        self._pictures = SourcePictures()
        self._closing = asyncio.Event()
        self._watches: set[asyncio.Timeout] = set()
        self._background: set[asyncio.Task[Any]] = set()

    async def ready(self) -> list[ModelCard]:
        """The models served now; :class:`Unavailable` unless a request could be accepted."""
        self._refuse_when_draining()
        await self.queue.check_server()
        return await self.models()

    async def models(self) -> list[ModelCard]:
        """The models of live workers; :class:`Unavailable` if there is none."""
        cards = await self.queue.models()
        if not cards:
            raise Unavailable("no worker is serving a model", retry_after=5)
        return cards

    async def model(self, name: str | None) -> ModelCard:
        """The model of that name, or the first."""
        cards = await self.models()
        if name is None:
            return cards[0]
        for card in cards:
            if card.name == name:
                return card
        raise NotFound("no such model", field="model")

    async def submit(self, request: GenerationRequest, tenant: str | None, idempotency_key: str | None = None) -> Job:
        """Queues a job that lives on without its caller; ``tenant`` alone will find it."""
        self._refuse_when_draining()
        if idempotency_key is not None and not 0 < len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
            raise InvalidRequest(f"must have 1 to {MAX_IDEMPOTENCY_KEY} characters", field="idempotency_key")
        card = await self.model(request.model)
        check(request, card)
        request, source = await self._pictures.take_in(request)
        # The fingerprint is of what was sent: a retry is the same request, though chance gives it another seed.
        sent = request.model_dump_json()
        job = await self.queue.submit(
            fill(request, card),
            idempotency_key=idempotency_key,
            fingerprint=sent,
            tenant=tenant,
            source=source,
            trace=tracing.carrier(),
        )
        trace.get_current_span().set_attribute("patchforge.job", job.id)
        return job

    async def run(self, request: GenerationRequest, tenant: str | None, idempotency_key: str | None = None) -> Run:
        """Queues a job that belongs to its caller; to be entered with ``async with``.

        With a key, the caller can come back for it: then leaving does not cancel it.
        """
        submitting = asyncio.create_task(self.submit(request, tenant, idempotency_key))
        try:
            job = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            # The queue may accept the job all the same, and whoever wanted it is gone.
            self._spawn(self._abandon(submitting, cancel=idempotency_key is None))
            raise
        return Run(self, job, detached=idempotency_key is not None)

    async def get(self, job_id: str, tenant: str | None) -> Job:
        """The tenant's job; to anyone else it does not exist."""
        job = await self.queue.get(job_id)
        if job.tenant != tenant:
            raise NotFound(f"no job {job_id}")
        return job

    async def cancel(self, job_id: str, tenant: str | None) -> Job:
        return await self.queue.cancel((await self.get(job_id, tenant)).id)

    async def image(self, job: Job, index: int) -> bytes:
        return await self.queue.image(job.id, index)

    async def watch(
        self, job_id: str, tenant: str | None, after: str | None
    ) -> AsyncGenerator[tuple[str, Event], None]:
        """Replays a job's events after an id and follows it to its end; what is wrong shows at once."""
        events = self.queue.watch(job_id, after or "0")
        await self.get(job_id, tenant)
        return events

    @asynccontextmanager
    async def until_drained(self) -> AsyncIterator[None]:
        """Cuts its body short with :class:`Unavailable` when the server starts to shut down."""
        self._refuse_when_draining()
        limit = asyncio.timeout(None)
        self._watches.add(limit)
        try:
            async with limit:
                yield
        except TimeoutError:
            if limit.expired():
                self._refuse_when_draining()
            raise
        finally:
            self._watches.discard(limit)

    def drain(self) -> None:
        """Refuses new jobs and ends watches, which can go on elsewhere; runs in progress keep going."""
        if self.draining:
            return
        self.draining = True
        for limit in self._watches:
            limit.reschedule(asyncio.get_running_loop().time())

    def cancel_soon(self, job_id: str) -> None:
        """Cancels a job for a caller who left, out of reach of that caller's own cancellation."""
        self._spawn(self._cancel(job_id))

    async def aclose(self) -> None:
        """Waits for what was left to do in the background, which tries once more and then gives up."""
        self._closing.set()
        await asyncio.gather(*self._background, return_exceptions=True)

    async def _abandon(self, submitting: asyncio.Task[Job], *, cancel: bool) -> None:
        with suppress(PatchforgeError):
            job = await submitting
            if cancel:
                await self._cancel(job.id)

    async def _cancel(self, job_id: str) -> None:
        """Tells the queue, as soon as it can be told: a device works for whoever asked, and no one does any more."""
        told = False
        while True:
            try:
                await self.queue.cancel(job_id)
                return
            except NotFound:
                return
            except Unavailable:
                if self._closing.is_set():
                    raise
            if not told:
                log.warning("a job whose caller left is cancelled once the queue server is back", job=job_id)
                told = True
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), RETRY_SECONDS)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise Unavailable("the server is shutting down")

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)  # the event loop itself holds tasks only weakly
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("a job could not be cancelled", reason=str(error))


class Run:
    """A job bound to one call: iterating yields its events, leaving before its end cancels it, unless ``detached``."""

    def __init__(self, service: JobService, job: Job, *, detached: bool) -> None:
        self.job = job
        self._detached = detached
        self._service = service
        self._events = service.queue.watch(job.id)
        self._ended = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended and not self._detached:
            self._service.cancel_soon(self.job.id)
        await self._events.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Event]:
        event_id, event = await anext(self._events)
        self._ended = isinstance(event, TERMINAL_EVENTS)
        return event_id, event


def check(request: GenerationRequest, card: ModelCard) -> None:
    """Raises :class:`InvalidRequest` if ``card``'s model cannot draw what is asked."""
    if card.kind == "text" and request.prompt is None:
        raise InvalidRequest(f"{card.name} draws from a prompt, not from a class", field="class_label")
    if card.kind == "class":
        if request.class_label is None:
            raise InvalidRequest(f"{card.name} draws classes: give class_label instead", field="prompt")
        if request.class_label not in card.classes:
            raise InvalidRequest(f"no such class; {card.name} lists its classes in /v1/models", field="class_label")
    if request.image is not None and request.sampler is not None and not isinstance(request.sampler, Adaptive):
        raise InvalidRequest("only adaptive can start from a picture", field="sampler")


def fill(request: GenerationRequest, card: ModelCard) -> GenerationRequest:
    """``request`` with everything it leaves open decided, so that running it twice draws the same pictures."""
    quality = request.quality
    if request.image is not None and quality is None and not isinstance(card.sampler, Adaptive):
        quality = Quality.STANDARD  # for the model's own sampler cannot start from a picture
    sampler, steps = preset(quality, card.sampler, card.steps) if quality else (card.sampler, card.steps)
    chosen = {
        "model": card.name,
        "seed": secrets.randbelow(SEEDS),
        "sampler": sampler,
        "steps": steps,
        "guidance": card.guidance,
    }
    open_fields = {name: value for name, value in chosen.items() if getattr(request, name) is None}
    return request.model_copy(update=open_fields | {"quality": None})  # which its sampler and steps now say
