"""What both clients share: they build requests and read answers here. Nothing here waits."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from patchforge.service.client.errors import UnexpectedAnswer, raise_for, unreachable
from patchforge.service.client.results import Picture
from patchforge.service.errors import JobFailed, PatchforgeError
from patchforge.service.messages.batches import Batch, BatchResult
from patchforge.service.messages.events import Event
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard, SavingsReport

M = TypeVar("M", bound=BaseModel)

Requests = bytes | Iterable[Mapping[str, Any]]
"""A file of requests, or what its lines say."""

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 30.0  # longer than the time between pings on an idle event stream
POLL_SECONDS = 2.0  # between looks at a batch
RETRY_SECONDS = (0.1, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0)

EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
EVENT_TYPES = frozenset(EVENTS.json_schema()["discriminator"]["mapping"])


def headers(api_key: str | None) -> dict[str, str]:
    """Headers of every request."""
    return {} if api_key is None else {"Authorization": f"Bearer {api_key}"}


def body(request: GenerationRequest | None, fields: dict[str, Any]) -> dict[str, Any]:
    """A request as JSON: the fields that are set in `request`, replaced by `fields`; the server checks them.

    Pictures in `fields` are the bytes of their files.
    """
    chosen = {} if request is None else request.model_dump(mode="json", include=request.model_fields_set)
    given = {
        name: b64encode(value).decode("ascii") if isinstance(value, bytes) else value
        for name, value in fields.items()
        if value is not None
    }
    return chosen | {str(name): value for name, value in to_jsonable_python(given).items()}


def parsed(model: type[M], response: httpx.Response) -> M:
    """The body of an answer; ignores unknown fields, so that a newer server may add some.

    Raises:
        PatchforgeError: the server refused the request.
        UnexpectedAnswer: the body does not fit `model`.
    """
    raise_for(response)
    try:
        return model.model_validate_json(response.content, extra="ignore")
    except ValidationError as error:
        raise UnexpectedAnswer(f"the answer of {response.url} is not a {model.__name__}") from error


def cards(response: httpx.Response) -> list[ModelCard]:
    """The models of `GET /v1/models`."""
    raise_for(response)
    try:
        listed = json.loads(response.content)["data"]
        return [ModelCard.model_validate_json(json.dumps(entry["patchforge"]), extra="ignore") for entry in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise UnexpectedAnswer(f"the answer of {response.url} is not a list of models") from error


def picture(response: httpx.Response, job: Job, index: int) -> Picture:
    """A finished picture."""
    raise_for(response)
    return Picture(response.content, response.headers["content-type"], (job.request.seed or 0) + index)


def batch_form(
    lines: Requests, endpoint: str | None, window: str, metadata: Mapping[str, str] | None
) -> dict[str, Any]:
    """The form of a new batch, as httpx takes it."""
    if not isinstance(lines, bytes):
        lines = "".join(f"{json.dumps(to_jsonable_python(line))}\n" for line in lines).encode()
    fields = {"completion_window": window}
    if endpoint is not None:
        fields["endpoint"] = endpoint
    if metadata is not None:
        fields["metadata"] = json.dumps(dict(metadata))
    return {"files": {"file": ("batch.jsonl", lines)}, "data": fields}


def batches(response: httpx.Response) -> list[Batch]:
    """The batches of `GET /v1/batches`."""
    raise_for(response)
    try:
        return [Batch.model_validate_json(json.dumps(each), extra="ignore") for each in response.json()["data"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UnexpectedAnswer(f"the answer of {response.url} is not a list of batches") from error


def result_files(batch: Batch) -> list[str]:
    """The paths of a batch's results."""
    files = (batch.output_file_id, batch.error_file_id)
    return [f"/v1/files/{file}/content" for file in files if file is not None]


def batch_result(line: str) -> BatchResult:
    """A line of a batch's results.

    Raises:
        UnexpectedAnswer: it is none.
    """
    try:
        return BatchResult.model_validate_json(line)
    except ValidationError as error:
        raise UnexpectedAnswer("a line of the results is not the result of a request") from error


@dataclass(frozen=True)
class Drawn:
    """What a completed request of a batch left: its pictures, or where they are."""

    job_id: str
    report: SavingsReport
    pictures: list[bytes | None]
    """The files that are in the result itself."""
    content_type: str

    @classmethod
    def by(cls, result: BatchResult) -> Drawn:
        """From a result.

        Raises:
            JobFailed: it is no result of a completed request; `code` says why.
            UnexpectedAnswer: it has no pictures.
        """
        answer = result.response
        if answer is None or answer.status_code >= httpx.codes.BAD_REQUEST:
            raise failure_of(result)
        body: dict[str, Any] = answer.body
        try:
            report = body["report"] if "report" in body else body["patchforge"]["report"]
            job_id = body["id"] if "id" in body else body["patchforge"]["job_id"]
            kind = body["output_format"] if "output_format" in body else body["request"]["output_format"]
            files = [image.get("b64_json") for image in body.get("data", ())]
            pictures = [None if file is None else b64decode(file) for file in files] or [None] * len(report["images"])
            known = SavingsReport.model_validate_json(json.dumps(report), extra="ignore")
            return cls(job_id, known, pictures, f"image/{kind}")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UnexpectedAnswer("a line of the results has no pictures") from error


def failure_of(result: BatchResult) -> JobFailed:
    """Why a request of a batch did not complete."""
    code, message = JobFailed.code, "the request did not complete"
    if result.error is not None:
        code, message = result.error.code, result.error.message
    elif result.response is not None:
        body: dict[str, Any] = result.response.body
        said = body.get("error", body)
        if isinstance(said, dict):
            code = str(said.get("code", code))
            message = str(said.get("message", said.get("detail", message)))
            field = said.get("param", said.get("field"))
            message = f"{field}: {message}" if field else message
    failure = JobFailed(message)
    failure.code = code
    return failure


@dataclass
class Place:
    """Position of a watcher in a job's events, and the number of failed connections since the last event."""

    url: httpx.URL
    after: str | None
    failures: int = 0
    over: bool = False
    """The job had ended before the latest connection began, so no further events can come."""

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.after is None else {"Last-Event-ID": self.after}

    def take(self, sent: ServerSentEvent) -> Event | None:
        """Move past an event and return it; None if this client is too old to know its kind.

        Raises:
            UnexpectedAnswer: the event does not have the fields of its kind.
        """
        self.after, self.failures = sent.id, 0
        if sent.event not in EVENT_TYPES:
            return None
        try:
            return EVENTS.validate_json(sent.data, extra="ignore")
        except ValidationError as error:
            raise UnexpectedAnswer(f"{self.url} sent an invalid {sent.event} event") from error

    def wait(self, error: httpx.TransportError | PatchforgeError | None) -> float:
        """Seconds until the next try; `error` is None if the stream ended without one.

        Raises:
            PatchforgeError: too many tries have failed since the last event.
        """
        if self.failures < len(RETRY_SECONDS):
            self.failures += 1
            return RETRY_SECONDS[self.failures - 1]
        raised: PatchforgeError = UnexpectedAnswer(f"{self.url} ended repeatedly before the job did")
        if error is not None:
            raised = unreachable(self.url, error) if isinstance(error, httpx.TransportError) else error
        raise raised from error
