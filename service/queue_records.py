"""From what Redis holds to messages and back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from pydantic import TypeAdapter

from service.events import Cancelled, Completed, Event, Expired, Failed
from service.schemas import GenerationRequest, Job, JobError, JobStatus, ModelCard, SavingsReport

EVENT: TypeAdapter[Event] = TypeAdapter(Event)
CARDS: TypeAdapter[list[ModelCard]] = TypeAdapter(list[ModelCard])


@lru_cache(maxsize=256)
def cards_from(text: bytes) -> tuple[ModelCard, ...]:
    """What a worker announced; the same for minutes on end, and looked at with every submit."""
    return tuple(CARDS.validate_json(text))


@dataclass(frozen=True)
class Source:
    """The picture a job starts from, kept beside its record: both are PNG, as large as the finished picture will be."""

    image: bytes
    """RGB."""
    mask: bytes | None = None
    """Greyscale: 255 marks what is to change, 0 what is kept; None: all may change."""


def fields_of(record: Sequence[bytes]) -> dict[str, bytes]:
    """A hash as scripts return it, names and values in turn."""
    return {name.decode(): value for name, value in zip(record[::2], record[1::2], strict=True)}


def job_from(record: Sequence[bytes]) -> Job:
    """The job a record describes."""
    fields = fields_of(record)

    def seconds(name: str) -> float | None:
        return float(fields[name]) if name in fields else None

    return Job(
        id=fields["id"].decode(),
        status=JobStatus(fields["status"].decode()),
        request=GenerationRequest.model_validate_json(fields["request"]),
        created_at=float(fields["created_at"]),
        started_at=seconds("started_at"),
        finished_at=seconds("finished_at"),
        attempt=int(fields["attempt"]),
        error=JobError.model_validate_json(fields["error"]) if "error" in fields else None,
        report=SavingsReport.model_validate_json(fields["report"]) if "report" in fields else None,
        tenant=fields["tenant"].decode() if "tenant" in fields else None,
        trace=json.loads(fields["trace"]) if "trace" in fields else {},
    )


def terminal_event(job: Job) -> Event:
    """The event an ended job ended with, from its record."""
    if job.report is not None:
        return Completed(report=job.report)
    if job.error is not None:
        return Failed(error=job.error)
    return Cancelled() if job.status is JobStatus.CANCELLED else Expired()
