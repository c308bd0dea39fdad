"""What both clients share: they build requests and read answers here. Nothing here waits."""

from __future__ import annotations

import json
from base64 import b64encode
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from patchforge.service.client.errors import UnexpectedAnswer, raise_for, unreachable
from patchforge.service.client.results import Picture
from patchforge.service.errors import PatchforgeError
from patchforge.service.messages.events import Event
from patchforge.service.messages.schemas import GenerationRequest, Job, ModelCard

M = TypeVar("M", bound=BaseModel)

DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_SECONDS = 30.0  # longer than the time between pings on an idle event stream
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
