"""Batches and their files, in the shape of OpenAI's Batch API: what gateway and client exchange."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator

from patchforge.service.messages.base import LooseRequest, Message, Request

BatchStatus = Literal["in_progress", "cancelling", "finalizing", "completed", "expired", "cancelled"]
OPEN: tuple[BatchStatus, ...] = ("in_progress", "cancelling", "finalizing")
"""The states of a batch that has not ended."""
ENDINGS: tuple[BatchStatus, ...] = ("completed", "expired", "cancelled")
LINE_OUTCOMES = ("completed", "failed", "cancelled", "refused")
Endpoint = Literal["/v1/images/generations", "/v1/images/edits", "/v1/jobs"]
MAX_REQUESTS = 50_000
MAX_CUSTOM_ID = 256
ShortText = Annotated[str, Field(max_length=64)]
LongText = Annotated[str, Field(max_length=512)]


class RequestCounts(Message):
    """How far the requests of a batch have come."""

    total: int
    completed: int
    failed: int


class BatchNotes(Message):
    """What OpenAI's object has no place for."""

    waiting_for: str | None = Field(None, description="Why no further request of the batch is queued at the moment.")
    kept_until: int | None = Field(None, description="When the results and their pictures expire, in Unix seconds.")


class Batch(Message):
    """A file of requests that the server works through in the background. All times are Unix seconds."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: Endpoint | None = Field(None, description="Of all requests; null if each names its own.")
    errors: None = None
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None = Field(None, description="Completed requests, once the batch has ended.")
    error_file_id: str | None = Field(None, description="All other requests, once the batch has ended.")
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = Field(None, description="When requests that have not completed are given up.")
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: dict[str, str] | None = None
    patchforge: BatchNotes = BatchNotes()

    @property
    def ended(self) -> bool:
        return self.status not in OPEN


class BatchFile(Message):
    """A file of requests, or the results of a batch."""

    id: str
    object: Literal["file"] = "file"
    bytes: int | None = Field(None, description="Null for results, which are written when someone reads them.")
    created_at: int
    expires_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"] = "processed"


class Deleted(Message):
    """What is gone."""

    id: str
    object: Literal["file", "batch"]
    deleted: Literal[True] = True


class BatchError(LooseRequest):
    """Why a line has no result, although nothing answered its request."""

    code: str
    message: str


class BatchResponse(LooseRequest):
    """The answer that the endpoint would have given."""

    status_code: int
    request_id: str
    body: dict[str, JsonValue]


class BatchResult(LooseRequest):
    """A line of a batch's results: a response, or an error if nothing could answer."""

    id: str
    custom_id: str | None
    response: BatchResponse | None
    error: BatchError | None = None


class BatchLine(Message):
    """A line of a file of requests."""

    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID)
    method: Literal["POST"] = "POST"
    url: Endpoint | None = None
    body: dict[str, Any]

    @field_validator("custom_id")
    @classmethod
    def _name_is_clean(cls, name: str) -> str:
        name.encode("utf-8")  # a lone surrogate raises UnicodeEncodeError, a ValueError
        return name


class BatchOptions(Request):
    """What a batch needs beside its requests."""

    endpoint: Endpoint | None = Field(None, description="Of all requests; null: each request has its `url`.")
    completion_window: str = Field("24h", pattern=r"^[1-9][0-9]{0,2}h$", description="Hours, such as `24h`.")
    metadata: dict[ShortText, LongText] | None = Field(None, max_length=16)


class BatchRequest(BatchOptions):
    """The JSON body of `POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=100)


class ExpiresAfter(Request):
    """When a file expires; the server may have a shorter time for all files."""

    anchor: Literal["created_at"] = "created_at"
    seconds: int = Field(ge=60, le=30 * 86400)


class FileOptions(Request):
    """The fields of `POST /v1/files` beside the file."""

    purpose: Literal["batch"] = Field(description="Other files have no use here.")
    expires_after: ExpiresAfter | None = None
