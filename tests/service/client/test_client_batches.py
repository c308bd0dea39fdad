"""Batches by both clients, against a real gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from patchforge.service.client import AsyncClient, Client
from patchforge.service.errors import IdempotencyConflict, InvalidRequest, JobFailed, NotFound, NotReady
from patchforge.service.gateway.batches import feeder
from patchforge.service.messages.batches import Batch, BatchResult
from tests.service.gateway.harness import ScriptedWorker, png

LINES: list[dict[str, Any]] = [
    {"custom_id": "a", "url": "/v1/jobs", "body": {"prompt": "apple", "seed": 7, "n": 2}},
    {"custom_id": "b", "url": "/v1/images/generations", "body": {"prompt": "apple", "seed": 8}},
    {"custom_id": "c", "url": "/v1/images/generations", "body": {"prompt": "x", "seed": 9, "response_format": "url"}},
    {"custom_id": "d", "url": "/v1/jobs", "body": {"prompt": "apple", "steps": 0}},
    {"custom_id": "e", "url": "/v1/images/generations", "body": {"prompt": "fail"}},
    {"custom_id": "f", "body": {}},
]


@pytest.fixture(autouse=True)
def prompt_feeder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_from_lines_to_pictures(kind: str, url: str, worker: ScriptedWorker) -> None:
    client = Client(url) if kind == "sync" else AsyncClient(url)

    async def call(method: str, *arguments: Any, **options: Any) -> Any:
        bound = getattr(client, method)
        if kind == "sync":
            return await asyncio.to_thread(bound, *arguments, **options)
        return await bound(*arguments, **options)

    async def results(batch: Batch) -> list[BatchResult]:
        if isinstance(client, Client):
            read = client.batch_results
            return await asyncio.to_thread(lambda: list(read(batch)))
        return [each async for each in client.batch_results(batch)]

    worker.curtain.clear()
    begun = await call("create_batch", LINES, metadata={"order": "7"}, idempotency_key="once")
    assert isinstance(begun, Batch)
    assert (await call("create_batch", LINES, metadata={"order": "7"}, idempotency_key="once")).id == begun.id
    with pytest.raises(IdempotencyConflict):
        await call("create_batch", LINES[:1], idempotency_key="once")
    with pytest.raises(NotReady):
        await call("delete_batch", begun.id)
    worker.curtain.set()
    batch = await call("wait_for_batch", begun.id, poll_seconds=0.02)
    assert (batch.status, batch.metadata) == ("completed", {"order": "7"})
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 3)
    found = {each.custom_id: each for each in await results(batch)}
    drawn = {name: await call("batch_pictures", found[name]) for name in "abc"}
    assert [picture.data for picture in drawn["a"]] == [png(7), png(8)]
    assert [picture.seed for picture in drawn["a"]] == [7, 8]
    assert [picture.data for name in "bc" for picture in drawn[name]] == [png(8), png(9)]
    assert {picture.content_type for pictures in drawn.values() for picture in pictures} == {"image/png"}
    for name, code, message in [
        ("d", "invalid_request", "steps: "),
        ("e", "out_of_memory", "the picture is too big"),
        ("f", "invalid_request", "url: name the endpoint"),
    ]:
        with pytest.raises(JobFailed, match=message) as caught:
            await call("batch_pictures", found[name])
        assert caught.value.code == code

    other = await call("create_batch", b'{"custom_id": "a", "body": {"prompt": "x"}}', endpoint="/v1/jobs")
    assert [each.id for each in await call("batches")] == [other.id, batch.id]
    assert [each.id for each in await call("batches", after=other.id)] == [batch.id]
    await call("cancel_batch", other.id)
    await call("wait_for_batch", other.id, poll_seconds=0.02)
    await call("delete_batch", batch.id)
    with pytest.raises(NotFound):
        await call("batch", batch.id)
    with pytest.raises(InvalidRequest) as refused:
        await call("create_batch", b"no requests")
    assert refused.value.field == "file"
    await (asyncio.to_thread(client.close) if isinstance(client, Client) else client.aclose())
