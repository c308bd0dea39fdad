"""The responses that the OpenAPI document lists: every status except success, with the schema of its body."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

MEANINGS = {
    400: "A field is not valid: `param` names it.",
    401: "The API key is missing or not valid.",
    404: "It does not exist, has expired, or belongs to another API key.",
    408: "The request body did not arrive in time.",
    409: "The job has no such picture yet, will never have it, or was cancelled.",
    413: "The request body is too large.",
    415: "The request body has the wrong media type.",
    422: "A field is not valid: `field` names it.",
    429: "This API key has reached its rate limit or its concurrent-job limit: retry after `Retry-After` seconds.",
    500: "The job failed, or the server had an unexpected error.",
    501: "Only another server version supports or can read this: see *Versions side by side* in docs/operation.md.",
    503: "The queue is full or unreachable, no worker is ready or fast enough, or the server is shutting down.",
    504: "No worker was free within `deadline_seconds`.",
}
BODY = (408, 413, 415)
SERVER_SENT_EVENT = {
    "type": "object",
    "description": "One event.",
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string", "description": "The `type` field of `data`."},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait before trying again.", "schema": {"type": "integer"}}}


class ProblemDetails(BaseModel):
    """An error in the native API: RFC 9457 problem details."""

    type: str = Field(description="`urn:patchforge:error:` followed by the code.")
    title: str
    status: int
    detail: str
    code: str = Field(description="A stable name of the error, for programs.")
    field: str | None = Field(description="The field that is not valid, or null.")
    request_id: str | None = Field(description="The answer's `x-request-id`, which is in the gateway's log too.")


class OpenAIError(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """The error body that OpenAI's clients expect."""

    error: OpenAIError


class InferenceError(BaseModel):
    """The error body of the Open Inference Protocol."""

    error: str


Answers = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Answers:
    """The native API's errors with these statuses."""
    return _answers(ProblemDetails, "application/problem+json", statuses)


def openai_errors(*statuses: int) -> Answers:
    """The OpenAI-compatible API's errors with these statuses."""
    return _answers(OpenAIErrorBody, "application/json", statuses)


def inference_errors(*statuses: int) -> Answers:
    """The Open Inference Protocol's errors with these statuses."""
    return _answers(InferenceError, "application/json", statuses)


def success(media_type: str, description: str, schema: dict[str, Any] | None = None) -> Answers:
    """A 200 response whose body FastAPI cannot infer from the code."""
    return {200: {"description": description, "content": {media_type: {"schema": schema or {"type": "string"}}}}}


def _answers(shape: type[BaseModel], media_type: str, statuses: tuple[int, ...]) -> Answers:
    schema = {"$ref": f"#/components/schemas/{shape.__name__}"}
    return {
        status: {
            "description": MEANINGS[status],
            "content": {media_type: {"schema": schema}},
            **({"headers": RETRY_AFTER} if status in (429, 503) else {}),
        }
        for status in statuses
    }
