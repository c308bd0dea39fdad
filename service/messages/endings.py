"""How jobs end: the last event of a job, and the error for a caller who waited for its pictures."""

from __future__ import annotations

from patchforge.service.errors import JobCancelled, JobExpired, JobFailed
from patchforge.service.messages.events import Cancelled, Completed, Event, Expired, Failed
from patchforge.service.messages.schemas import Job, JobError, JobStatus


def terminal_event(job: Job) -> Event:
    """The last event of an ended job, derived from its record."""
    if job.status is JobStatus.COMPLETED and job.report is not None:
        return Completed(report=job.report)
    if job.status is JobStatus.FAILED and job.error is not None:
        return Failed(error=job.error)
    if job.status is JobStatus.CANCELLED:
        return Cancelled()
    if job.status is JobStatus.EXPIRED:
        return Expired()
    return Failed(error=unsupported(job.unreadable or "its outcome is missing"))


def unsupported(reason: str) -> JobError:
    """The error of a job that this process cannot read."""
    return JobError(code="unsupported", message=f"this version cannot read the job: {reason}")


def raise_if_lost(event: Event) -> None:
    """Raises the error that fits the last event of a job, unless the job completed.

    Raises:
        JobFailed: the job failed; `code` says how.
        JobCancelled: it was cancelled.
        JobExpired: no worker was free before its deadline.
    """
    if isinstance(event, Failed):
        failure = JobFailed(event.error.message)
        failure.code = event.error.code
        raise failure
    if isinstance(event, Cancelled):
        raise JobCancelled("the job was cancelled")
    if isinstance(event, Expired):
        raise JobExpired("no worker was free before the deadline", field="deadline_seconds")
