"""Files of requests, from their upload to their results."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode

import httpx
import pytest
from redis.asyncio import Redis

from patchforge.service.gateway.batches import feeder
from patchforge.service.queue import JobQueue, keys
from tests.patience import PATIENCE
from tests.service.gateway.batches.kit import (
    GENERATIONS,
    JSON_LINES,
    begin,
    drawn,
    jsonl,
    native,
    results,
    until,
    waiting_for,
)
from tests.service.gateway.harness import CARDS, ScriptedWorker, png
from tests.service.gateway.pictures import base64, encoded, gradient


@pytest.fixture(autouse=True)
def prompt_feeder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feeders look often, and no missing worker is waited for."""
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "RESTART_SECONDS", 0)


async def test_a_batch_from_file_to_results(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    """Lines of both endpoints, more than may wait at once, each with a result of its own."""
    lines = [drawn(f"apple-{seed}", seed=seed, n=2) for seed in range(10)]
    batch = await begin(http, *lines, native("pear", seed=77, n=2), b"")
    assert batch["object"] == "batch"
    assert batch["status"] == "in_progress"
    assert batch["request_counts"] == {"total": 11, "completed": 0, "failed": 0}
    ended = await until(http, batch)
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": 11, "completed": 11, "failed": 0}
    assert ended["error_file_id"] is None
    assert ended["completed_at"] >= ended["finalizing_at"] >= ended["in_progress_at"] >= ended["created_at"]
    made = await results(http, ended)
    assert list(made) == [f"apple-{seed}" for seed in range(10)] + ["pear"], "in the order of the file"
    for seed in range(10):
        response = made[f"apple-{seed}"]["response"]
        assert response["status_code"] == 200
        data = response["body"]["data"]
        assert [b64decode(image["b64_json"]) for image in data] == [png(seed), png(seed + 1)]
        assert (await http.get(data[1]["url"])).content == png(seed + 1)
        assert response["body"]["size"] == "48x32"
        assert response["body"]["usage"]["output_tokens"] == 64
        assert response["body"]["patchforge"]["expires_at"] == ended["patchforge"]["kept_until"]
    job = made["pear"]["response"]["body"]
    assert job["request"]["priority"] == "low"
    assert job["request"]["previews"] is False
    assert not (await worker.queue.get(job["id"])).degradable, "load lowers no quality: nobody waits"
    assert job["report"]["savings_ratio"] == pytest.approx(1 / 3)
    assert (await http.get(job["urls"][0])).content == png(77)
    assert worker.played == 11


async def test_wrong_lines_end_in_the_error_file(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    batch = await begin(
        http,
        drawn("good"),
        b"{not json",
        b"[1]",
        {"url": GENERATIONS, "body": {}},
        drawn("good", "a second one"),
        drawn("steps", steps=0),
        native("field", stepz=3),
        drawn("fails", "fail"),
        {"custom_id": "where", "url": "/v1/chat/completions", "body": {}},
        {"custom_id": "no-url", "body": {"prompt": "apple"}},
        drawn("stream", stream=True),
        drawn("urgent", priority="high"),
        drawn("nobody", model="no-such-model"),
        b'{"custom_id": "\\ud800", "url": "/v1/jobs", "body": {}}',
        native("no-subject", prompt=None),
    )
    ended = await until(http, batch)
    assert ended["status"] == "completed"
    assert ended["request_counts"] == {"total": 15, "completed": 1, "failed": 14}
    assert list(await results(http, ended)) == ["good"]
    reply = await http.get(f"/v1/files/{ended['error_file_id']}/content")
    lines = [json.loads(line) for line in reply.text.splitlines()]
    assert len(lines) == len({line["id"] for line in lines}) == 14
    said = {}
    for line in lines:
        error = line["error"] or line["response"]["body"].get("error") or line["response"]["body"]
        status = line["response"] and line["response"]["status_code"]
        said.setdefault(line["custom_id"], []).append(
            (status, error["code"], error.get("message", error.get("detail")))
        )
    assert said.pop(None) == [
        (None, "invalid_request", "the body is not valid JSON"),
        (None, "invalid_request", "the line must be a JSON object"),
        (None, "invalid_request", "custom_id: Field required"),
    ]
    assert said.pop("good") == [(None, "invalid_request", "custom_id: an earlier line has the same one")]
    assert said.pop("fails") == [(500, "out_of_memory", "the picture is too big")]
    assert said.pop("nobody")[0][:2] == (404, "not_found")
    assert said.pop("steps")[0][:2] == (400, "invalid_request")
    assert said.pop("field")[0][:2] == (422, "invalid_request")
    assert said.pop("no-subject")[0][:2] == (422, "invalid_request")
    for name in ("stream", "urgent"):
        assert said.pop(name)[0][0] == 400
    for name in ("where", "no-url"):
        assert said.pop(name)[0][2].startswith("url: ")
    assert [name.encode("unicode_escape") for name in said] == [b"?"]


async def test_files_that_are_no_requests(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for content, message in [
        (b"", "has no requests"),
        (b"\n\n", "has no requests"),
        (b"\x89PNG\r\n", "is not UTF-8 text"),
        (b"custom_id,prompt\na,b\n", "has no requests"),
        (b"{}\n" * 50_001, "at most 50000"),
    ]:
        for reply in (
            await http.post("/v1/batches", content=content, headers=JSON_LINES),
            await http.post("/v1/files", files={"file": ("a.jsonl", content)}, data={"purpose": "batch"}),
        ):
            assert reply.status_code == 400, reply.text
            assert reply.json()["error"]["param"] == "file"
            assert message in reply.json()["error"]["message"]
    assert (await http.post("/v1/batches", content=b"{}", headers={"Content-Type": "text/csv"})).status_code == 415
    reply = await http.post("/v1/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "purpose")
    reply = await http.post("/v1/files", files={"other": ("a.jsonl", b"{}")}, data={"purpose": "batch"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "other")
    for changes, param in [
        ({"completion_window": "1d"}, "completion_window"),
        ({"endpoint": "/v1/chat/completions"}, "endpoint"),
        ({"output_expires_after": {}}, "output_expires_after"),
    ]:
        reply = await http.post("/v1/batches", json={"input_file_id": "file-x"} | changes)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    for path in ("files/file-x", "files/file-x/content", f"files/file-{'0' * 26}", f"batches/batch_{'0' * 26}"):
        assert (await http.get(f"/v1/{path}")).status_code == 404
    assert (await http.get("/v1/batches?limit=0")).status_code == 400
    assert (await http.get("/v1/batches?after=x")).status_code == 404


async def test_a_form_makes_a_batch_too(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    reply = await http.post(
        "/v1/batches",
        files={"file": ("mine.jsonl", jsonl({"custom_id": "a", "body": {"prompt": "apple"}}))},
        data={"endpoint": "/v1/jobs", "completion_window": "2h", "metadata": '{"order": "7"}'},
    )
    assert reply.status_code == 200, reply.text
    batch = reply.json()
    assert batch["metadata"] == {"order": "7"}
    assert batch["expires_at"] - batch["created_at"] == 7200
    assert list(await results(http, await until(http, batch))) == ["a"]
    assert (await http.get(f"/v1/files/{batch['input_file_id']}")).json()["filename"] == "mine.jsonl"


async def test_half_of_the_queue_is_left_to_others(
    http: httpx.AsyncClient, queue: JobQueue, redis_client: Redis
) -> None:
    """The queue has room for eight jobs here. Two batches share their half."""
    await queue.announce("busy", CARDS)
    batches = [await begin(http, *(drawn(f"{name}-{i}") for i in range(30))) for name in "ab"]
    for batch in batches:
        await waiting_for(http, batch, "too many jobs are waiting")
    assert await redis_client.zcard(keys.WAITING) == 4
    assert await queue.waiting() == {"tiny-text": 4}
    assert await queue.waiting(batches=False) == await queue.oldest_waiting() == {}, "workers do not hurry"
    job = (await http.post("/v1/jobs", json={"prompt": "now"})).json()
    scripted = ScriptedWorker(queue)
    playing = asyncio.create_task(scripted.run())
    for batch in batches:
        assert (await until(http, batch))["request_counts"]["completed"] == 30
    assert scripted.played == 61
    names = [key.decode().removeprefix(keys.JOB) async for key in redis_client.scan_iter(f"{keys.JOB}*")]
    started = {name: (await queue.get(name)).started_at for name in names}
    assert min(started, key=lambda name: started[name] or 0) == job["id"], "others come first"
    playing.cancel()


async def test_few_jobs_of_batches_run_at_a_time(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(60)))
    for _ in range(8):
        await worker.next_job()
    await asyncio.sleep(0.2)  # it must stay so
    assert await redis_client.scard(keys.BATCH_JOBS) == worker.played == 8
    worker.curtain.set()
    assert (await until(http, batch))["request_counts"]["completed"] == 60
    assert worker.played == 60


async def test_a_cancelled_batch_keeps_what_is_finished(
    http: httpx.AsyncClient, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch, redis_client: Redis
) -> None:
    """A request for a model whose worker may be restarting holds the others back."""
    monkeypatch.setattr(feeder, "RESTART_SECONDS", 3600)
    many = [drawn(f"x{i}") for i in range(40)]
    batch = await begin(http, drawn("0"), drawn("refused", steps=0), drawn("1"), drawn("x", model="restarting"), *many)
    await until(http, batch, request_counts={"total": 44, "completed": 2, "failed": 1})
    await waiting_for(http, batch, "no such model")
    async for key in redis_client.scan_iter(f"{keys.JOB}*"):
        assert await redis_client.ttl(key) > 86400, "the batch may take a day, and its results are kept for another"
    assert (await http.delete(f"/v1/batches/{batch['id']}")).status_code == 409
    assert (await http.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
    ended = await until(http, batch)
    assert ended["status"] == "cancelled"
    assert ended["cancelled_at"] >= ended["cancelling_at"]
    assert ended["request_counts"] == {"total": 44, "completed": 2, "failed": 1}
    errors = await results(http, ended, "error")
    assert list(await results(http, ended)) == ["0", "1"]
    assert list(errors) == ["refused", "x", *(f"x{i}" for i in range(40))]
    assert errors.pop("refused")["response"]["status_code"] == 400
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert (await http.post(f"/v1/batches/{batch['id']}/cancel")).json() == ended


async def test_cancelling_stops_the_jobs_that_run(
    http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue, redis_client: Redis
) -> None:
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(40)))
    job = await worker.next_job()
    await http.post(f"/v1/batches/{batch['id']}/cancel")
    ended = await until(http, batch)
    assert ended["status"] == "cancelled"
    assert ended["output_file_id"] is None
    errors = await results(http, ended, "error")
    assert len(errors) == 40
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert (await queue.get(job)).status == "cancelled"
    assert await redis_client.scard(keys.BATCH_JOBS) == 0


async def test_a_batch_expires(http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis) -> None:
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(40)))
    await worker.next_job()
    await redis_client.hset(keys.BATCH + batch["id"].removeprefix("batch_"), "expires_at", "1")
    ended = await until(http, batch)
    assert ended["status"] == "expired"
    assert ended["output_file_id"] is None
    errors = await results(http, ended, "error")
    assert len(errors) == 40
    assert {line["error"]["code"] for line in errors.values()} == {"batch_expired"}


async def test_results_outlive_other_jobs_and_can_be_deleted(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    batch = await until(http, await begin(http, drawn("a"), drawn("b", "fail")))
    made = await results(http, batch)
    job = made["a"]["response"]["request_id"]
    for key in (keys.job(job), keys.images(job)):
        assert 86400 - PATIENCE < await redis_client.ttl(key) <= 86400, key
    assert not await redis_client.exists(keys.events(job)), "nobody watches"
    reply = await http.delete(f"/v1/files/{batch['output_file_id']}")
    assert reply.json() == {"id": batch["output_file_id"], "object": "file", "deleted": True}
    assert not await redis_client.exists(keys.images(job))
    assert (await http.get(f"/v1/files/{batch['output_file_id']}/content")).status_code == 404
    assert (await http.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200
    assert (await http.delete(f"/v1/batches/{batch['id']}")).json()["deleted"] is True
    assert (await http.get(f"/v1/batches/{batch['id']}")).status_code == 404
    assert (await http.get("/v1/batches")).json()["data"] == []
    assert (await http.get("/v1/files")).json()["data"] == []
    left = {key.decode() async for key in redis_client.scan_iter()}
    assert not [key for key in left if ("batch" in key and key != keys.BATCH_LEADER) or ":file" in key or "job:" in key]


async def test_a_file_that_is_deleted_does_not_stop_its_batch(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(20)))
    assert (await http.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200
    worker.curtain.set()
    assert len(await results(http, await until(http, batch))) == 20


async def test_lists_have_pages(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    begun = [(await begin(http, drawn("a")))["id"] for _ in range(5)]
    first = (await http.get("/v1/batches?limit=3")).json()
    assert [each["id"] for each in first["data"]] == begun[:1:-1]
    assert first["has_more"]
    rest = (await http.get("/v1/batches", params={"limit": 3, "after": first["last_id"]})).json()
    assert [each["id"] for each in rest["data"]] == begun[1::-1]
    assert not rest["has_more"]
    for each in begun:
        await until(http, {"id": each})
    files = (await http.get("/v1/files", params={"purpose": "batch_output"})).json()
    assert len(files["data"]) == 5


async def test_a_key_makes_one_batch(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    headers = JSON_LINES | {"Idempotency-Key": "order-1"}
    first, second = [
        (await http.post("/v1/batches", content=jsonl(drawn("a")), headers=headers)).json()["id"] for _ in range(2)
    ]
    assert first == second
    other = await http.post("/v1/batches", content=jsonl(drawn("b")), headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_conflict")
    await until(http, {"id": first})
    assert (await http.delete(f"/v1/batches/{first}")).status_code == 200
    third = (await http.post("/v1/batches", content=jsonl(drawn("a")), headers=headers)).json()["id"]
    assert third != first


async def test_a_full_server_takes_no_batches_and_pauses_those_it_has(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(i)) for i in range(60)))
    for _ in range(8):
        await worker.next_job()
    limit = (await redis_client.config_get("maxmemory"))["maxmemory"]
    used = (await redis_client.info("memory"))["used_memory"]
    await redis_client.config_set("maxmemory", int(used / 0.8))  # more than three quarters are used
    worker.curtain.set()
    reply = await http.post("/v1/batches", content=jsonl(drawn("a")), headers=JSON_LINES)
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "queue_full")
    await waiting_for(http, batch, "the queue server has no room")
    await redis_client.config_set("maxmemory", limit)
    ended = await until(http, batch)
    assert ended["request_counts"]["completed"] == 60
    assert ended["patchforge"]["waiting_for"] is None


async def test_edits_in_a_batch(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    url = f"data:image/png;base64,{base64(encoded(gradient()))}"
    body = {"prompt": "green apple", "images": [{"image_url": url}], "response_format": "b64_json", "seed": 5}
    batch = await begin(http, {"custom_id": "edit", "url": "/v1/images/edits", "body": body})
    made = await results(http, await until(http, batch))
    [image] = made["edit"]["response"]["body"]["data"]
    assert image.keys() == {"b64_json"}
    assert b64decode(image["b64_json"]) == png(5)


async def test_metrics_tell_of_batches(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    batch = await begin(http, drawn("a"), drawn("b", "fail"), drawn("c", steps=0))
    await worker.next_job()
    text = (await http.get("/metrics?workers=false")).text
    assert 'patchforge_batches_open{status="in_progress"} 1.0' in text
    worker.curtain.set()
    await until(http, batch)
    async with asyncio.timeout(PATIENCE):
        while 'patchforge_batches_total{status="completed"} 1.0' not in text:
            text = (await http.get("/metrics?workers=false")).text
    for outcome in ("completed", "failed", "refused"):
        assert f'patchforge_batch_lines_total{{outcome="{outcome}"}} 1.0' in text
