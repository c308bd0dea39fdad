"""Batches and API keys: each sees its own, within its limits."""

from __future__ import annotations

import httpx
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.auth import make_entry
from patchforge.service.gateway.batches import feeder
from patchforge.service.queue import connection
from patchforge.service.settings import Settings
from tests.service.gateway.batches.kit import JSON_LINES, begin, drawn, jsonl, results, until, waiting_for
from tests.service.gateway.harness import ScriptedWorker


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    keys = [make_entry("alice", "a"), make_entry("bob", "b")]
    return Settings(
        redis_url=queue_server.url,
        http_port=0,
        grpc_port=0,
        drain_seconds=1,
        api_keys=keys,
        max_in_flight=4,
        rate_limit=1,
        rate_burst=6,
        max_upload_bytes=1 << 16,
    )


@pytest.fixture(autouse=True)
def prompt_feeder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)


def key(name: str) -> dict[str, str]:
    return {"x-api-key": name}


async def test_others_see_nothing(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    http.headers.update(key("a"))
    batch = await until(http, await begin(http, drawn("one")))
    made = await results(http, batch)
    paths = [f"batches/{batch['id']}", *(f"files/{batch[kind]}" for kind in ("input_file_id", "output_file_id"))]
    paths += [f"files/{batch['output_file_id']}/content"]
    assert (await http.get(made["one"]["response"]["body"]["data"][0]["url"])).status_code == 200
    http.headers.update(key("b"))
    for path in paths:
        assert (await http.get(f"/v1/{path}")).status_code == 404, path
    for path in paths[:3]:
        assert (await http.delete(f"/v1/{path}")).status_code == 404, path
    assert (await http.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 404
    assert (await http.post("/v1/batches", json={"input_file_id": batch["input_file_id"]})).status_code == 404
    for path in ("batches", "files"):
        assert (await http.get(f"/v1/{path}")).json()["data"] == []
    del http.headers["x-api-key"]
    for path in (*paths, "batches", "files"):
        reply = await http.get(f"/v1/{path}")
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "unauthenticated"), path
    assert (await http.get(made["one"]["response"]["body"]["data"][0]["url"], headers=key("a"))).status_code == 200


async def test_half_of_a_keys_limits_is_left(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Of four jobs in flight, a batch takes two; of six pictures at once, three."""
    http.headers.update(key("a"))
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(10)))
    await waiting_for(http, batch, "concurrent-job limit")
    for _ in range(2):
        await worker.next_job()
    own = [await http.post("/v1/jobs", json={"prompt": "now"}) for _ in range(3)]
    assert [reply.status_code for reply in own] == [202, 202, 429]
    worker.curtain.set()
    await waiting_for(http, batch, "pictures per minute")
    assert worker.played == 4, "two and two of six pictures are gone, and the batch leaves three"
    assert (await http.post("/v1/jobs", json={"prompt": "now"})).status_code == 202
    http.headers.update(key("b"))
    other = await until(http, await begin(http, drawn("a")))
    assert other["request_counts"]["completed"] == 1, "bob does not wait for alice"


async def test_limits_of_size_and_number(
    http: httpx.AsyncClient, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.headers.update(key("a"))
    large = jsonl(drawn("a", "x" * 70_000))
    for path in ("files", "batches"):
        reply = await http.post(f"/v1/{path}", content=large, headers=JSON_LINES)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "payload_too_large")
    worker.curtain.clear()
    for _ in range(connection.MAX_OPEN_BATCHES):
        await begin(http, drawn("a"))
    reply = await http.post("/v1/batches", content=jsonl(drawn("a")), headers=JSON_LINES)
    assert (reply.status_code, reply.json()["error"]["code"]) == (429, "too_many_jobs")
    http.headers.update(key("b"))
    await begin(http, drawn("a"))
