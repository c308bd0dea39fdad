"""What callers may be told, for the OpenAPI document: every status beside success, with the shape it comes in."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

MEANINGS = {
    400: "A field is wrong: `param` names it.",
    401: "No API key, or one that is not known.",
    404: "No such thing; or it has expired, or is another's.",
    408: "The body did not arrive in time.",
    409: "The job has no such picture yet, or never will; or it was cancelled while you waited for it.",
    413: "The body is too large.",
    415: "The body is not of the media type this call takes.",
    422: "A field is wrong: `field` names it.",
    429: "This API key asks too often, or has too many jobs in flight; try again after `Retry-After` seconds.",
    500: "The job failed, or something went wrong on our side.",
    503: "The queue is full or away, no worker is ready, or the server is stopping; `Retry-After` says when to try.",
    504: "No worker was free before `deadline_seconds` had passed.",
}
BODY = (408, 413, 415)
SERVER_SENT_EVENT = {
    "type": "object",
    "description": "One of the events.",
    "properties": {
        "id": {"type": "string"},
        "event": {"type": "string", "description": "The `type` in `data`."},
        "data": {"type": "string", "contentMediaType": "application/json"},
    },
    "required": ["event", "data"],
}
RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}


class ProblemDetails(BaseModel):
    """RFC 9457 problem details."""

    type: str = Field(description="`urn:patchforge:error:` and the code.")
    title: str
    status: int
    detail: str
    code: str = Field(description="A stable word for programs.")
    field: str | None = Field(description="The field at fault.")


class OpenAIError(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str = Field(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    param: str | None
    code: str | None


class OpenAIErrorBody(BaseModel):
    """An error as OpenAI's clients expect it."""

    error: OpenAIError


class InferenceError(BaseModel):
    """An error of the Open Inference Protocol."""

    error: str


Answers = dict[int | str, dict[str, Any]]


def problems(*statuses: int) -> Answers:
    """Refusals of the native API."""
    return _answers(ProblemDetails, "application/problem+json", statuses)


def openai_errors(*statuses: int) -> Answers:
    """Refusals of the APIs that are OpenAI's."""
    return _answers(OpenAIErrorBody, "application/json", statuses)


def inference_errors(*statuses: int) -> Answers:
    """Refusals of the Open Inference Protocol."""
    return _answers(InferenceError, "application/json", statuses)


def success(media_type: str, description: str, schema: dict[str, Any] | None = None) -> Answers:
    """The answer 200 of a call whose body FastAPI cannot tell from its code."""
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
