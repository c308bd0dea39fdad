"""A worker's claim of a job, and what the worker delivers for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from patchforge.service.messages.events import TERMINAL_EVENTS, Cancelled, Completed, Event, Expired, Failed, ImageReady
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import Job
from patchforge.service.queue.pictures import reference_field
from patchforge.service.queue.records import fields_of, job_from
from patchforge.service.results import Reference

Delivery = tuple[str, *tuple[str | int | bytes, ...]]
"""What `deliver` in `queue.lua` does, and the arguments."""


class Heartbeat(StrEnum):
    """What a worker learns about its claim: continue; stop, because the job was cancelled; or drop a lost claim."""

    OK = "ok"
    CANCELLED = "cancelled"
    LOST = "lost"


@dataclass(frozen=True)
class Claim:
    """A worker's right to run a job. It ends with the job, on release, or after `claim_idle_seconds` of silence.

    If `job.unreadable` is set, the job cannot be drawn: finish it as `Failed`, with `unsupported`.
    """

    job: Job
    worker_id: str
    attempt: int
    stream: str
    entry_id: str
    taken_over: bool = False
    """Whether the job was taken from a worker that stopped responding."""
    last: bool = False
    """Whether no other job waited then, for any worker."""


def published(claim: Claim, event: Event) -> Delivery:
    """Adds an event to the job's stream. Terminal events need `finished`."""
    if isinstance(event, TERMINAL_EVENTS):
        raise TypeError(f"{event.type} ends a job: use finish")
    return "publish", *claim_arguments(claim), written(event)


def stored(claim: Claim, index: int, picture: bytes | Reference) -> Delivery:
    """Stores an encoded picture, or where it is, and publishes ImageReady."""
    field = reference_field(index) if isinstance(picture, str) else index
    return "store_image", *claim_arguments(claim), field, picture, ImageReady(index=index).model_dump_json()


def finished(claim: Claim, event: Completed | Failed | Cancelled | Expired) -> Delivery:
    """Ends the job with its only terminal event."""
    outcome: tuple[str, ...] = ()
    if isinstance(event, Completed):
        # The digest is written apart: readers of protocol 0 exit at a field of a report that they do not know.
        digest = event.report.model_digest
        event = Completed(report=event.report.model_copy(update={"model_digest": None}))
        outcome = ("report", written(event.report), *(() if digest is None else ("digest", digest)))
    elif isinstance(event, Failed):
        outcome = ("error", written(event.error))
    words: tuple[str | int | bytes, ...] = (*claim_arguments(claim), event.type, written(event), *outcome)
    return "finish", *words


def claim_from(worker_id: str, record: Sequence[bytes], how: bytes) -> Claim:
    """Returns the claim that a script answered with."""
    job, fields = job_from(record), fields_of(record)
    stream, entry = fields["stream"].decode(), fields["entry"].decode()
    return Claim(job, worker_id, job.attempt, stream, entry, taken_over=how == b"again", last=how == b"last")


def claim_arguments(claim: Claim) -> tuple[str, str, int, str, str]:
    """Returns what scripts check a claim by. The entry distinguishes claims of a job that was released between."""
    return claim.job.id, claim.worker_id, claim.attempt, claim.stream, claim.entry_id
