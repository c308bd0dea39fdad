"""How jobs end, for callers that waited for pictures."""

from __future__ import annotations

from service.errors import JobCancelled, JobExpired, JobFailed
from service.events import Cancelled, Event, Expired, Failed


def raise_if_lost(event: Event) -> None:
    """Raises JobFailed, or the kind of it that fits, if a job ended with this event, and without its pictures."""
    if isinstance(event, Failed):
        failure = JobFailed(event.error.message)
        failure.code = event.error.code
        raise failure
    if isinstance(event, Cancelled):
        raise JobCancelled("the job was cancelled")
    if isinstance(event, Expired):
        raise JobExpired("no worker was free before the deadline", field="deadline_seconds")
