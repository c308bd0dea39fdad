"""The errors a caller can meet; each class has one HTTP status and one gRPC status code.

PatchforgeError
├── Unauthenticated       401 / UNAUTHENTICATED      no API key, or an unknown one
├── InvalidRequest        422 / INVALID_ARGUMENT     a field is wrong; `field` names it
│   ├── InvalidEventId    400 / INVALID_ARGUMENT     no event has this id
│   └── NeverRoom         422 / INVALID_ARGUMENT     no queue server has the memory that the job may need
├── NotFound              404 / NOT_FOUND            no such job, image or model
├── NotReady              409 / FAILED_PRECONDITION  the job has no picture yet, or will never have one
├── IdempotencyConflict   422 / ALREADY_EXISTS       same Idempotency-Key, different request
├── PayloadTooLarge       413 / RESOURCE_EXHAUSTED   the request body is too large
├── RateLimited           429 / RESOURCE_EXHAUSTED   too many pictures for this API key; see `retry_after`
│   └── TooManyJobs       429 / RESOURCE_EXHAUSTED   this API key has reached its concurrent-job limit
├── QueueFull             503 / UNAVAILABLE          too many jobs are waiting; see `retry_after`
│   └── NoRoom            503 / UNAVAILABLE          the queue server might run out of memory
├── TooLittleTime         503 / UNAVAILABLE          no worker could finish in the time asked for
├── Unavailable           503 / UNAVAILABLE          Redis is down, or the server is shutting down
│   ├── QueueRefused      503 / UNAVAILABLE          Redis answers and refuses this server: its password, its ACL
│   └── ResultsUnavailable  503 / UNAVAILABLE        the object store with the pictures cannot be used
│       └── ResultsRefused  503 / UNAVAILABLE        it refuses this server: its key, its rights, the bucket
├── Unsupported           501 / UNIMPLEMENTED        only another version of the servers can do or read this
├── JobFailed             500 / INTERNAL             the job failed
│   ├── JobCancelled      409 / CANCELLED            the job was cancelled
│   └── JobExpired        504 / DEADLINE_EXCEEDED    no worker was free before the job's deadline
├── Unreachable           only in the client         the server cannot be reached
└── UnexpectedAnswer      only in the client         the answer does not come from a compatible Patchforge server
"""

from __future__ import annotations


class PatchforgeError(Exception):
    """Base class: `code` is a stable name for programs, `field` the request field at fault or None."""

    status = 500
    grpc_status = "INTERNAL"
    code = "internal_error"

    def __init__(self, message: str, *, field: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after = retry_after


class Unauthenticated(PatchforgeError):
    """The request has no API key, or an unknown one."""

    status, grpc_status, code = 401, "UNAUTHENTICATED", "unauthenticated"


class InvalidRequest(PatchforgeError):
    """A request field is missing, malformed or out of range."""

    status, grpc_status, code = 422, "INVALID_ARGUMENT", "invalid_request"


class InvalidEventId(InvalidRequest):
    """The event id in a request for a stream is invalid; another try will not help."""

    status = 400


class NeverRoom(InvalidRequest):
    """The job may need more memory than a queue server has for all jobs together."""

    most = 0.0
    """Bytes that it has for them."""


class NotFound(PatchforgeError):
    """The named object does not exist, or has expired."""

    status, grpc_status, code = 404, "NOT_FOUND", "not_found"


class NotReady(PatchforgeError):
    """The job exists, but the requested result does not exist (yet)."""

    status, grpc_status, code = 409, "FAILED_PRECONDITION", "not_ready"


class IdempotencyConflict(PatchforgeError):
    """An Idempotency-Key was used again with a different request."""

    status, grpc_status, code = 422, "ALREADY_EXISTS", "idempotency_conflict"


class PayloadTooLarge(PatchforgeError):
    """The request body exceeds the limit."""

    status, grpc_status, code = 413, "RESOURCE_EXHAUSTED", "payload_too_large"


class RateLimited(PatchforgeError):
    """This API key has reached its rate limit; try again after `retry_after` seconds."""

    status, grpc_status, code = 429, "RESOURCE_EXHAUSTED", "rate_limited"


class TooManyJobs(RateLimited):
    """This API key has reached its limit of waiting and running jobs."""

    code = "too_many_jobs"


class QueueFull(PatchforgeError):
    """The queue has reached its limit of waiting jobs; try again after `retry_after` seconds."""

    status, grpc_status, code = 503, "UNAVAILABLE", "queue_full"


class NoRoom(QueueFull):
    """The queue server might run out of memory."""


class TooLittleTime(PatchforgeError):
    """No worker could finish the pictures within `finish_within_seconds`; the message says how long it would take."""

    status, grpc_status, code = 503, "UNAVAILABLE", "too_little_time"


class Unavailable(PatchforgeError):
    """A part that the request needs is not available: Redis is down, or the server is shutting down."""

    status, grpc_status, code = 503, "UNAVAILABLE", "unavailable"


class QueueRefused(Unavailable):
    """The queue server refuses what this process needs; until someone changes its settings or ours, it always will."""


class ResultsUnavailable(Unavailable):
    """The object store, which has the pictures, does not answer, or refuses this; the message says why."""

    code = "results_unavailable"


class ResultsElsewhere(ResultsUnavailable):
    """What is wanted is in another object store than this process may use."""


class ResultsRefused(ResultsUnavailable):
    """The object store refuses what this process needs; until someone changes its settings or ours, it always will."""


class Unsupported(PatchforgeError):
    """No worker that is there can do this, or this gateway cannot read what another version wrote."""

    status, grpc_status, code = 501, "UNIMPLEMENTED", "unsupported"


class JobFailed(PatchforgeError):
    """The job failed."""

    status, grpc_status, code = 500, "INTERNAL", "job_failed"


class JobCancelled(JobFailed):
    """The job was cancelled before its pictures were finished, by its caller or by another one with the same key."""

    status, grpc_status, code = 409, "CANCELLED", "job_cancelled"


class JobExpired(JobFailed):
    """No worker was free before the job's deadline."""

    status, grpc_status, code = 504, "DEADLINE_EXCEEDED", "job_expired"
