"""Reads the lines of a batch's file: each is a request of one of the endpoints."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from patchforge.service.errors import InvalidRequest, PatchforgeError
from patchforge.service.gateway.jobs import JobService, Prepared
from patchforge.service.gateway.openai.api import choose_model
from patchforge.service.gateway.openai.drawing import repeat_options
from patchforge.service.gateway.openai.requests import ImagesRequest, JsonEditRequest
from patchforge.service.gateway.problems import Problem
from patchforge.service.gateway.validation import parse_json, validated
from patchforge.service.messages.batches import MAX_CUSTOM_ID, BatchLine, Endpoint
from patchforge.service.messages.schemas import GenerationRequest, Priority

JOBS = "/v1/jobs"
OPENAI_BODIES: dict[str, type[ImagesRequest] | type[JsonEditRequest]] = {
    "/v1/images/generations": ImagesRequest,
    "/v1/images/edits": JsonEditRequest,
}


@dataclass(frozen=True)
class ReadyLine:
    """A line whose request is ready for the queue."""

    prepared: Prepared
    details: dict[str, Any]
    """What its results need beside the job."""


def read_line(text: bytes, endpoint: Endpoint | None) -> BatchLine:
    """Returns a line of a batch whose requests all go to `endpoint`, if that is not None. Its `url` is set.

    Raises:
        InvalidRequest: it is no such line.
    """
    value = parse_json(text)
    if not isinstance(value, dict):
        raise InvalidRequest("the line must be a JSON object")
    line = validated(BatchLine, value)
    url = line.url or endpoint
    if url is None:
        raise InvalidRequest("name the endpoint, such as /v1/images/generations", field="url")
    if endpoint is not None and url != endpoint:
        raise InvalidRequest(f"must be the batch's endpoint, {endpoint}", field="url")
    return line.model_copy(update={"url": url})


def custom_id_of(text: bytes) -> str | None:
    """Returns the custom_id of a line that may be wrong in any way, or None."""
    with suppress(PatchforgeError):
        value = parse_json(text)
        name = value.get("custom_id") if isinstance(value, dict) else None
        if isinstance(name, str) and len(name) <= MAX_CUSTOM_ID:
            return name.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
    return None


async def prepare_line(service: JobService, line: BatchLine) -> ReadyLine:
    """Checks the request of a line as its endpoint would, and fills in what it leaves open.

    Raises:
        PatchforgeError: those of `JobService.prepare`.
    """
    details: dict[str, Any] = {"custom_id": line.custom_id, "url": line.url}
    kind = OPENAI_BODIES.get(line.url or "")
    if kind is None:
        request = validated(GenerationRequest, line.body)
        _check_priority(request)
        return ReadyLine(await service.prepare(_in_background(request)), details)
    body = validated(kind, line.body)
    if body.stream:
        raise InvalidRequest("a batch cannot stream; leave it out", field="stream")
    _check_priority(body)
    prepared = await service.prepare(_in_background(body.generation(await choose_model(service, body))))
    details["repeat"] = repeat_options(prepared.request, body, prepared.card)
    if body.response_format is not None:
        details["response_format"] = body.response_format
    return ReadyLine(prepared, details)


def _check_priority(request: GenerationRequest) -> None:
    if "priority" in request.model_fields_set and request.priority is not Priority.LOW:
        raise InvalidRequest("batches have low priority; leave it out", field="priority")


def _in_background(request: GenerationRequest) -> GenerationRequest:
    """The request at low priority, and without previews unless it asks for some: nobody watches."""
    return request.model_copy(update={"priority": Priority.LOW, "previews": bool(request.partial_images)})


def answer_with(error: PatchforgeError, url: str, request_id: str) -> dict[str, Any]:
    """The response that an endpoint gives to a request with this error."""
    problem = Problem.of(error)
    status, body = problem.status, dict[str, Any](problem.details(request_id))
    if url in OPENAI_BODIES:
        status, body = problem.openai_status, {"error": problem.openai_error()}
    return {"status_code": int(status), "request_id": request_id, "body": body}


def dumped(result: dict[str, Any]) -> bytes:
    """A line of results."""
    return json.dumps(result, separators=(",", ":")).encode() + b"\n"
