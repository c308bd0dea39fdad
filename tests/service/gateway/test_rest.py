"""The native REST API over real HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from patchforge.service.queue import JobQueue
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, png

Event = dict[str, Any]


async def sse(response: httpx.Response) -> AsyncIterator[Event]:
    """The events of a stream as their fields, with `data` parsed; comments have only `comment`."""
    event: Event = {}
    async for line in response.aiter_lines():
        name, _, value = line.partition(": ")
        if not line and event:
            yield event
            event = {}
        elif line:
            event[name or "comment"] = json.loads(value) if name == "data" else value


async def submit(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await http.post("/v1/jobs", json={"prompt": "a red apple"} | fields)
    assert response.status_code == 202, response.text
    job: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


async def test_a_job_from_submit_to_picture(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = await submit(http, model="tiny-text", n=2, seed=7)
    async with http.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [event async for event in sse(response) if "event" in event]
    kinds = [event["event"] for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert kinds[-3:] == ["image", "image", "completed"]
    assert set(kinds[2:-3]) == {"preview"}
    assert all(event["data"]["type"] == event["event"] for event in events)

    done = (await http.get(f"/v1/jobs/{job['id']}")).json()
    assert done["status"] == "completed"
    assert done["report"]["savings_ratio"] == pytest.approx(1 / 3)
    picture = await http.get(f"/v1/jobs/{job['id']}/image", params={"index": 1})
    assert picture.headers["content-type"] == "image/png"
    assert picture.content == png(8)
    again = await http.get(f"/v1/jobs/{job['id']}/image?index=1", headers={"If-None-Match": picture.headers["etag"]})
    assert again.status_code == 304


async def test_what_is_left_open_is_filled_in_from_the_model(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    request = (await submit(http, model="tiny-text"))["request"]
    assert request["steps"] == 8
    assert request["guidance"] == 3.0
    assert request["sampler"] == {"name": "dual_loop", "quantile": 0.5, "inner_steps": 4, "exact": False}
    assert isinstance(request["seed"], int)


async def test_the_first_model_serves_requests_that_name_none(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    response = await http.post("/v1/jobs", json={"class_label": "cat"})
    assert response.json()["request"]["model"] == "tiny-class"


async def test_a_class_is_found_as_people_write_it(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    response = await http.post("/v1/jobs", json={"class_label": "Grinning_Fa"})
    assert response.json()["request"]["class_label"] == "grinning face"
    response = await http.post("/v1/jobs", json={"class_label": "grining face"})
    assert response.status_code == 422
    assert "no such class; the nearest: 'grinning face'" in response.text


async def test_a_sampler_may_be_just_a_name(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = await submit(http, model="tiny-text", sampler="look_ahead")
    assert job["request"]["sampler"]["ratio"] == 1.4


async def test_a_job_says_that_its_pictures_hold_no_metadata(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    fields = {"model": "tiny-text", "prompt": "x"}
    plain, bare = [
        (await http.post("/v1/jobs", json=fields | more)).json()["request"] for more in ({}, {"metadata": False})
    ]
    assert "metadata" not in plain
    assert bare["metadata"] is False


async def test_watching_resumes_after_the_last_event_seen(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = await submit(http, model="tiny-text")
    path = f"/v1/jobs/{job['id']}/events"
    async with http.stream("GET", path) as response:
        events = [event async for event in sse(response) if "event" in event]
    async with http.stream("GET", path, headers={"Last-Event-ID": events[3]["id"]}) as response:
        rest = [event async for event in sse(response) if "event" in event]
    assert rest == events[4:]


async def test_leaving_a_watch_leaves_the_job_alone(
    http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    job = await submit(http, model="tiny-text")
    async with http.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        async for event in sse(response):
            if event.get("event") == "preview":
                break
    worker.curtain.set()
    assert await ended(queue, job["id"]) == "completed"


async def test_idle_streams_are_kept_alive(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    job = await submit(http, model="tiny-text")
    async with asyncio.timeout(PATIENCE), http.stream("GET", f"/v1/jobs/{job['id']}/events") as response:
        async for event in sse(response):
            if "comment" in event:
                break


async def test_cancelling_is_harmless_to_repeat(
    http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue
) -> None:
    worker.curtain.clear()
    job = await submit(http, model="tiny-text")
    for _ in range(2):
        assert (await http.delete(f"/v1/jobs/{job['id']}")).status_code == 200
    assert await ended(queue, job["id"]) == "cancelled"
    assert (await http.delete(f"/v1/jobs/{job['id']}")).json()["status"] == "cancelled"


async def test_a_picture_that_is_not_there_yet(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    job = await submit(http, model="tiny-text")
    response = await http.get(f"/v1/jobs/{job['id']}/image")
    assert response.status_code == 409
    assert response.json()["code"] == "not_ready"


async def test_a_repeated_idempotency_key_returns_the_same_job(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body, headers = {"model": "tiny-text", "prompt": "x"}, {"Idempotency-Key": "k" * 255}
    replies = await asyncio.gather(*(http.post("/v1/jobs", json=body, headers=headers) for _ in range(5)))
    assert len({reply.json()["id"] for reply in replies}) == 1
    other = await http.post("/v1/jobs", json=body | {"n": 2}, headers=headers)
    assert other.status_code == 422
    assert other.json()["code"] == "idempotency_conflict"
    for key in ("k" * 256, ""):
        refused = await http.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})
        assert refused.status_code == 422
        assert refused.json()["field"] == "idempotency_key"


async def test_unknown_jobs(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    ids = ("01ARZ3NDEKTSV4RRFFQ69G5FAV", "nope", "%2e%2e", "a%00b", "%ff%fe", "*", "x" * 5000)
    calls = (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/image"))
    for job_id, (method, path) in itertools.product(ids, calls):
        response = await http.request(method, f"/v1/jobs/{job_id}{path}")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert set(response.json()) == {"type", "title", "status", "detail", "code", "field", "request_id"}


async def test_a_full_queue_says_when_to_come_back(http: httpx.AsyncClient, queue: JobQueue) -> None:
    await queue.announce("takes none", [CARDS[0]])
    replies = [await http.post("/v1/jobs", json={"prompt": "x"}) for _ in range(9)]
    assert [reply.status_code for reply in replies] == [202] * 8 + [503]
    assert int(replies[-1].headers["retry-after"]) > 0
    assert replies[-1].json()["code"] == "queue_full"
