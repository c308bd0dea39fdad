"""A client works with a newer server, and gives up if the server is gone."""

from __future__ import annotations

import json

import httpx
import pytest
from httpx_sse import ServerSentEvent

from patchforge.service.client import UnexpectedAnswer, Unreachable
from patchforge.service.client.wire import RETRY_SECONDS, Place, parsed
from patchforge.service.errors import QueueFull, Unavailable
from patchforge.service.messages.events import Queued
from patchforge.service.messages.schemas import GenerationRequest, Job

URL = httpx.URL("http://127.0.0.1:8000/v1/jobs/x/events")


def answer(status: int, content: bytes, **headers: str) -> httpx.Response:
    return httpx.Response(status, content=content, headers=headers, request=httpx.Request("GET", URL))


def test_fields_of_a_newer_server_are_ignored() -> None:
    job = Job(id="x", status="waiting", request=GenerationRequest(prompt="a pear"), created_at=1.0)
    newer = json.loads(job.model_dump_json())
    newer["mood"] = "good"
    newer["request"]["tempo"] = 3
    assert parsed(Job, answer(200, json.dumps(newer).encode())) == job


def test_events_of_a_newer_server_are_ignored_but_advance_the_position() -> None:
    place = Place(URL, None)
    assert place.take(ServerSentEvent("queued", '{"type": "queued", "mood": "good"}', "1-0")) == Queued()
    assert place.take(ServerSentEvent("fireworks", "{}", "2-0")) is None
    assert place.headers == {"Last-Event-ID": "2-0"}
    with pytest.raises(UnexpectedAnswer):
        place.take(ServerSentEvent("started", "{}", "3-0"))


def test_retries_are_limited_and_every_event_resets_them() -> None:
    place = Place(URL, None)
    broken = httpx.ReadError("reset")
    waits = [place.wait(broken) for _ in RETRY_SECONDS]
    assert waits == list(RETRY_SECONDS)
    with pytest.raises(Unreachable, match="reset"):
        place.wait(broken)
    with pytest.raises(Unavailable, match="draining"):
        place.wait(Unavailable("draining"))
    with pytest.raises(UnexpectedAnswer):
        place.wait(None)
    place.take(ServerSentEvent("queued", '{"type": "queued"}', "1-0"))
    assert place.wait(broken) == RETRY_SECONDS[0]


def test_a_full_queue_has_retry_after() -> None:
    problem = {"code": "queue_full", "detail": "too many wait", "field": None, "status": 503}
    with pytest.raises(QueueFull, match="too many wait") as caught:
        parsed(Job, answer(503, json.dumps(problem).encode(), **{"Retry-After": "5"}))
    assert caught.value.retry_after == 5
