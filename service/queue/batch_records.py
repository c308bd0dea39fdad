"""What the queue server has of a batch, and of what became of its lines."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from patchforge.service.messages.batches import Batch, BatchNotes, BatchStatus, RequestCounts
from patchforge.service.messages.schemas import Job
from patchforge.service.queue.files import number_of
from patchforge.service.queue.records import fields_of

BATCH_ID = re.compile(r"batch_([0-9A-Z]{26})")
UNSETTLED, RESULT_GONE = "unsettled", "gone"


@dataclass(frozen=True)
class StoredBatch:
    """A batch as the queue server has it."""

    batch: Batch
    tenant: str | None
    next: int
    """The first line that is neither queued nor refused."""
    length: int
    """Lines of its file, empty ones included."""
    feeding: bool
    """Whether further lines may be queued."""
    apart: bool = False
    """Whether its lines are in the object store."""
    archived: int | None = None
    """What became of the lines before this one is in the object store; None: it stays on the queue server."""

    @property
    def key(self) -> str:
        return number_of(BATCH_ID, self.batch.id, "batch")

    def name_of(self, line: int) -> str:
        """The id of a line's request."""
        return f"batch_req_{self.key}_{line}"


@dataclass(frozen=True)
class SettledLine:
    """What became of a line.

    `outcome` is `flying`, `completed`, `failed`, `cancelled` or `refused`; in the object store also `unsettled`, of a
    line that was never queued; or `gone`, of one whose result is not in the object store any more.
    """

    number: int
    outcome: str
    details: Mapping[str, Any]
    """`custom_id`; of a line with a job also `job`; of a refused one `status` and `error`."""
    job: Job | None = None
    """Its job, if that was read already."""


def batch_from(record: Sequence[bytes]) -> StoredBatch:
    """Returns the batch that a record describes."""
    fields = {name: value.decode(errors="replace") for name, value in fields_of(record).items()}

    def at(name: str) -> int | None:
        return int(float(fields[name])) if name in fields else None

    def file(kind: str) -> str | None:
        return f"file-{fields[f'{kind}_file']}" if f"{kind}_file" in fields else None

    status = cast(BatchStatus, fields["status"])
    completed, failed = int(fields["completed"]), int(fields["failed"])
    total = max(int(fields["total"]), completed + failed)  # an empty line counts if its object is gone: who knows it
    waits = status in ("in_progress", "finalizing")
    batch = Batch(
        id=f"batch_{fields['id']}",
        endpoint=cast(Any, fields.get("endpoint") or None),
        input_file_id=f"file-{fields['input_file']}",
        completion_window=fields["window"],
        status=status,
        output_file_id=file("output"),
        error_file_id=file("error"),
        created_at=int(float(fields["created_at"])),
        in_progress_at=at("created_at"),
        expires_at=at("expires_at"),
        finalizing_at=at("finalizing_at"),
        completed_at=at("completed_at"),
        expired_at=at("expired_at"),
        cancelling_at=at("cancelling_at"),
        cancelled_at=at("cancelled_at"),
        request_counts=RequestCounts(total=total, completed=completed, failed=failed),
        metadata=json.loads(fields["metadata"]) if fields.get("metadata") else None,
        patchforge=BatchNotes(waiting_for=fields.get("waiting_for") if waits else None, kept_until=at("kept_until")),
    )
    feeding = status == "in_progress" and "ending" not in fields and int(fields["next"]) < int(fields["length"])
    return StoredBatch(
        batch,
        fields["tenant"] or None,
        int(fields["next"]),
        int(fields["length"]),
        feeding,
        apart="apart" in fields,
        archived=int(fields["archived"]) if "archived" in fields else None,
    )
