"""A job that belongs to one call."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

from patchforge.service.errors import Unavailable
from patchforge.service.messages.endings import raise_if_lost
from patchforge.service.messages.events import TERMINAL_EVENTS, Completed, Event
from patchforge.service.messages.schemas import Job

if TYPE_CHECKING:
    from patchforge.service.gateway.jobs import JobService

EVENTS_BROKE_OFF = "the job's events ended before the job did: try again"


class Run:
    """A job bound to one call. Iterating yields its events; leaving before its end cancels it, unless `detached`."""

    def __init__(self, service: JobService, job: Job, *, detached: bool, since: float | None = None) -> None:
        """`since`: a time of the monotonic clock before the job was submitted."""
        self.job = job
        self._since = since
        self._pictures: dict[int, bytes] = {}
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

    async def completed(self, *, pictures: bool) -> Completed:
        """Waits for the job's end, for callers that need no other event. `pictures`: whether they will need these.

        Raises:
            JobFailed: the job failed.
            JobCancelled: it was cancelled.
            JobExpired: no worker was free before its deadline.
            NotFound: it was deleted.
        """
        event, self._pictures = await self._service.queue.wait_for_end(self.job.id, self._since, pictures=pictures)
        self._ended = True
        raise_if_lost(event)
        if not isinstance(event, Completed):
            raise Unavailable(EVENTS_BROKE_OFF)
        return event

    async def image(self, index: int) -> bytes:
        """Returns a picture; raises the same errors as `JobQueue.image`."""
        if index in self._pictures:
            return self._pictures[index]
        return await self._service.image(self.job, index)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> tuple[str, Event]:
        event_id, event = await anext(self._events)
        self._ended = isinstance(event, TERMINAL_EVENTS)
        return event_id, event
