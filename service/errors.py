"""The errors a caller can meet; each maps to one HTTP status and one gRPC status code.

PatchforgeError
├── Unauthenticated       401 / UNAUTHENTICATED      no API key, or one that is not known
├── InvalidRequest        422 / INVALID_ARGUMENT     a field is wrong; ``field`` names it
│   └── InvalidEventId    400 / INVALID_ARGUMENT     no event ever had this id
├── NotFound              404 / NOT_FOUND            no such job, image, model
├── NotReady              409 / FAILED_PRECONDITION  the job has no picture yet, or never will
├── IdempotencyConflict   422 / ALREADY_EXISTS       same key, another body
├── PayloadTooLarge       413 / RESOURCE_EXHAUSTED
├── RateLimited           429 / RESOURCE_EXHAUSTED   this API key asks too often; with ``retry_after`` seconds
│   └── TooManyJobs       429 / RESOURCE_EXHAUSTED   it has as many jobs in flight as it may
├── QueueFull             503 / UNAVAILABLE          with ``retry_after`` seconds
├── Unavailable           503 / UNAVAILABLE          Redis away, draining
└── JobFailed             500 / INTERNAL             the job itself ended in `failed`
    ├── JobCancelled      409 / CANCELLED            somebody cancelled it
    └── JobExpired        504 / DEADLINE_EXCEEDED    its own deadline passed before a worker was free
"""

from __future__ import annotations


class PatchforgeError(Exception):
    """Base: ``code`` is a stable machine-readable word, ``field`` the request field at fault or None."""

    status = 500
    grpc_status = "INTERNAL"
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class Unauthenticated(PatchforgeError):
    """The caller sent no API key, or one that is not known here."""

    status, grpc_status, code = 401, "UNAUTHENTICATED", "unauthenticated"


class InvalidRequest(PatchforgeError):
    """A request field is missing, malformed or out of range."""

    status, grpc_status, code = 422, "INVALID_ARGUMENT", "invalid_request"


class InvalidEventId(InvalidRequest):
    """A place in an event stream that is not one: a client that sends it is broken, and trying again will not help."""

    status = 400


class NotFound(PatchforgeError):
    """The named thing does not exist, or has expired."""

    status, grpc_status, code = 404, "NOT_FOUND", "not_found"


class NotReady(PatchforgeError):
    """The job exists but what was asked of it is not there (yet)."""

    status, grpc_status, code = 409, "FAILED_PRECONDITION", "not_ready"


class IdempotencyConflict(PatchforgeError):
    """An Idempotency-Key was used again with a different request."""

    status, grpc_status, code = 422, "ALREADY_EXISTS", "idempotency_conflict"


class PayloadTooLarge(PatchforgeError):
    """The request body exceeds the limit."""

    status, grpc_status, code = 413, "RESOURCE_EXHAUSTED", "payload_too_large"


class RateLimited(PatchforgeError):
    """This API key asked for more pictures than its share; try again after ``retry_after`` seconds."""

    status, grpc_status, code = 429, "RESOURCE_EXHAUSTED", "rate_limited"


class TooManyJobs(RateLimited):
    """This API key has as many jobs waiting or running as it may."""

    code = "too_many_jobs"


class QueueFull(PatchforgeError):
    """The queue holds as many waiting jobs as it may; try again after ``retry_after`` seconds."""

    status, grpc_status, code = 503, "UNAVAILABLE", "queue_full"


class Unavailable(PatchforgeError):
    """A part the request needs is away: Redis is down, or the server is draining."""

    status, grpc_status, code = 503, "UNAVAILABLE", "unavailable"


class JobFailed(PatchforgeError):
    """The job ran and failed."""

    status, grpc_status, code = 500, "INTERNAL", "job_failed"


class JobCancelled(JobFailed):
    """The job was cancelled, by its caller or by another with the same key, before its pictures were there."""

    status, grpc_status, code = 409, "CANCELLED", "job_cancelled"


class JobExpired(JobFailed):
    """No worker was free before the job's deadline."""

    status, grpc_status, code = 504, "DEADLINE_EXCEEDED", "job_expired"
