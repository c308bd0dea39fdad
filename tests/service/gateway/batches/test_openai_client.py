"""OpenAI's own client, as its documentation uses it for batches."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode
from collections.abc import AsyncIterator

import openai
import pytest

from patchforge.service.gateway.batches import feeder
from tests.patience import PATIENCE
from tests.service.gateway.batches.kit import GENERATIONS, drawn, jsonl
from tests.service.gateway.harness import ScriptedWorker, png


@pytest.fixture(autouse=True)
def prompt_feeder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)


@pytest.fixture
async def client(url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=PATIENCE) as made:
        yield made


async def ended(client: openai.AsyncOpenAI, batch_id: str) -> openai.types.Batch:
    async with asyncio.timeout(PATIENCE):
        while True:
            batch = await client.batches.retrieve(batch_id)
            if batch.status in ("completed", "cancelled", "expired", "failed"):
                return batch
            await asyncio.sleep(0.02)


async def test_from_file_to_results(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    content = jsonl(drawn("a", seed=7), drawn("b", steps=0), drawn("c", seed=9, response_format="url"))
    file = await client.files.create(
        file=("requests.jsonl", content),
        purpose="batch",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert (file.object, file.purpose, file.bytes, file.filename) == ("file", "batch", len(content), "requests.jsonl")
    assert file.expires_at == file.created_at + 3600
    assert (await client.files.content(file.id)).content == content
    assert (await client.files.retrieve(file.id)) == file
    batch = await client.batches.create(
        input_file_id=file.id, endpoint=GENERATIONS, completion_window="24h", metadata={"order": "7"}
    )
    assert (batch.object, batch.endpoint, batch.input_file_id) == ("batch", GENERATIONS, file.id)
    assert batch.metadata == {"order": "7"}
    batch = await ended(client, batch.id)
    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
    made = [json.loads(line) for line in (await client.files.content(batch.output_file_id or "")).text.splitlines()]
    assert [line["custom_id"] for line in made] == ["a", "c"]
    assert all(line.keys() == {"id", "custom_id", "response", "error"} for line in made)
    answer = openai.types.ImagesResponse.model_validate(made[0]["response"]["body"])
    assert answer.data is not None
    assert b64decode(answer.data[0].b64_json or "") == png(7)
    assert made[1]["response"]["body"]["data"][0].keys() == {"url"}
    wrong = json.loads((await client.files.content(batch.error_file_id or "")).text)
    assert (wrong["custom_id"], wrong["response"]["status_code"]) == ("b", 400)
    assert wrong["response"]["body"]["error"]["param"] == "steps"

    listed = [each.id async for each in client.batches.list(limit=1)]
    assert listed == [batch.id]
    assert {each.id async for each in client.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)
    with pytest.raises(openai.NotFoundError) as caught:
        await client.batches.create(input_file_id=file.id, endpoint=GENERATIONS, completion_window="24h")
    assert caught.value.param == "input_file_id"


async def test_cancel(client: openai.AsyncOpenAI, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    file = await client.files.create(file=jsonl(*(drawn(str(i)) for i in range(40))), purpose="batch")
    batch = await client.batches.create(input_file_id=file.id, endpoint=GENERATIONS, completion_window="24h")
    await worker.next_job()
    assert (await client.batches.cancel(batch.id)).status == "cancelling"
    assert (await ended(client, batch.id)).status == "cancelled"
    with pytest.raises(openai.BadRequestError) as caught:
        await client.files.create(file=b"{}", purpose="assistants")
    assert caught.value.param == "purpose"
