"""Files of batches in a real object store: what clients send, and results. Everything else is as without a store."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.batches import feeder
from patchforge.service.gateway.batches.results import BatchResults
from patchforge.service.queue import GatewayQueue, JobQueue, batch_results, chunks, connect, connect_all, keys
from patchforge.service.queue.batch_records import StoredBatch
from patchforge.service.queue.ids import server_of
from patchforge.service.settings import Settings
from tests.object_store import ObjectServer
from tests.service.gateway.batches.kit import JSON_LINES, begin, drawn, jsonl, native, results, until, waiting_for
from tests.service.gateway.harness import CARDS, ScriptedWorker, png, running
from tests.service.queue.kit import eventually


@pytest.fixture
def settings(settings: Settings, object_variables: dict[str, str]) -> Settings:
    return settings.model_copy(update={"results": object_variables["PATCHFORGE_RESULTS"]})


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many objects for few lines, and feeders that look often and soon try again."""
    monkeypatch.setattr(chunks, "CHUNK_LINES", 4)
    monkeypatch.setattr(batch_results, "MOVED_LINES", 3)
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "PAUSE_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "RESTART_SECONDS", 0)


def objects_of(server: ObjectServer, name: str) -> list[str]:
    """The objects of a file, `file-…`, or of a batch, `batch_…`."""
    return [each for each in server.names() if f"s/{name[-26:]}" in each]


async def ended(queue: GatewayQueue, batch_id: str, tenant: str) -> StoredBatch:
    async def look() -> StoredBatch | None:
        stored = await queue.batch(batch_id, tenant)
        return stored if stored.batch.ended else None

    return await eventually(look)


async def test_files_and_results_are_in_the_store(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis, object_server: ObjectServer
) -> None:
    lines = [native("0", seed=0), drawn("refused", steps=0), *(drawn(str(seed), seed=seed) for seed in range(1, 9))]
    lines.append(drawn("fails", "fail"))
    worker.curtain.clear()
    batch = await begin(http, *lines)
    file = batch["input_file_id"]
    assert await redis_client.type(keys.FILE_LINES + file[5:]) == b"hash"
    assert len(objects_of(object_server, file)) == 3, "twelve lines, the empty last one included"
    assert (await http.get(f"/v1/files/{file}/content")).content == jsonl(*lines)
    worker.curtain.set()
    over = await until(http, batch)
    assert over["request_counts"] == {"total": 11, "completed": 9, "failed": 2}

    key = batch["id"].removeprefix("batch_")
    said = await redis_client.hvals(keys.BATCH_RESULTS + key)
    assert sum(map(len, said)) < 60 * len(said), "no more than outcomes and jobs"
    assert not await redis_client.exists(keys.BATCH_INPUT + key)
    made = await results(http, over)
    assert list(made) == [str(seed) for seed in range(9)], "in the order of the file"
    errors = await results(http, over, "error")
    assert list(errors) == ["refused", "fails"]
    assert errors["refused"]["response"]["body"]["error"]["param"] == "steps"
    assert errors["fails"]["response"]["body"]["error"]["code"] == "out_of_memory"
    for name in made:
        job = made[name]["response"]["request_id"]
        assert not await redis_client.hexists(keys.job(job), "report")
        assert (await http.get(f"/v1/jobs/{job}/image")).content == png(int(name)), "as long as the batch is kept"
    job = (await http.get(f"/v1/jobs/{made['0']['response']['request_id']}")).json()
    body = made["0"]["response"]["body"]
    assert {name: body[name] for name in job} == job, "the record is whole, wherever it is"

    left = objects_of(object_server, batch["id"])
    assert {name.split("/")[-1].partition("-")[0] for name in left} == {"output", "error"}
    assert (await http.delete(f"/v1/files/{over['output_file_id']}")).json()["deleted"] is True
    assert all("/error-" in name for name in objects_of(object_server, batch["id"]))
    assert (await http.get(f"/v1/jobs/{job['id']}")).status_code == 404, "it was in that file"
    assert (await http.delete(f"/v1/batches/{batch['id']}")).json()["deleted"] is True
    assert objects_of(object_server, batch["id"]) == []
    assert len(objects_of(object_server, file)) == 3, "another batch may use it"
    assert (await http.delete(f"/v1/files/{file}")).json()["deleted"] is True
    assert objects_of(object_server, file) == []
    names = {name.decode() async for name in redis_client.scan_iter()}
    assert not [name for name in names if ":file:" in name or ":file-" in name or "job:" in name or key in name]


async def test_lines_go_with_the_last_that_needs_them(
    http: httpx.AsyncClient, worker: ScriptedWorker, object_server: ObjectServer
) -> None:
    worker.curtain.clear()
    first = await begin(http, *(drawn(str(seed), seed=seed) for seed in range(30)))
    file = first["input_file_id"]
    second = (await http.post("/v1/batches", json={"input_file_id": file})).json()
    assert (await http.delete(f"/v1/files/{file}")).json()["deleted"] is True
    assert (await http.get(f"/v1/files/{file}")).status_code == 404
    assert len(objects_of(object_server, file)) == 8
    await http.post(f"/v1/batches/{first['id']}/cancel")
    cancelled = await until(http, first)
    assert len(objects_of(object_server, file)) == 8
    errors = await results(http, cancelled, "error")
    assert list(errors) == [str(seed) for seed in range(30)], "those that were never queued are in the store too"
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    worker.curtain.set()
    assert len(await results(http, await until(http, second))) == 30
    assert objects_of(object_server, file) == []


async def test_a_store_that_is_away_loses_nothing(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis, object_server: ObjectServer
) -> None:
    await redis_client.set(keys.BATCH_LEADER, "nobody", px=600_000)
    batch = await begin(http, *(drawn(str(seed), seed=seed) for seed in range(30)))
    object_server.stop()
    files = (await http.get("/v1/files")).json()["data"]
    refused = await http.post("/v1/batches", content=jsonl(drawn("x")), headers=JSON_LINES)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "results_unavailable")
    assert (await http.get("/v1/files")).json()["data"] == files
    content = await http.get(f"/v1/files/{batch['input_file_id']}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (503, "results_unavailable")
    assert int(await redis_client.hget(keys.RESERVED, "total") or 0) < 100_000, "the upload's room was given back"
    await redis_client.delete(keys.BATCH_LEADER)
    await waiting_for(http, batch, "the object store s3://pictures/results cannot be reached")
    assert (await until(http, batch, status="in_progress"))["request_counts"]["failed"] == 0
    object_server.start()
    over = await until(http, batch)
    assert over["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert len(await results(http, over)) == 30

    object_server.stop()
    away = await http.get(f"/v1/files/{over['output_file_id']}/content")
    assert (away.status_code, away.json()["error"]["code"]) == (503, "results_unavailable")
    for path in (f"files/{over['output_file_id']}", f"batches/{batch['id']}", f"files/{batch['input_file_id']}"):
        assert (await http.delete(f"/v1/{path}")).status_code == 503, path
    object_server.start()
    for path in (f"files/{over['output_file_id']}", f"batches/{batch['id']}", f"files/{batch['input_file_id']}"):
        assert (await http.delete(f"/v1/{path}")).status_code == 200, "it can be deleted later"
    assert not objects_of(object_server, batch["id"]) + objects_of(object_server, batch["input_file_id"])


async def test_every_batch_says_that_its_end_waits_for_the_store(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    settings: Settings,
    queue: JobQueue,
    redis_client: Redis,
    object_server: ObjectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also those whose turn comes in the pause after a failure."""
    monkeypatch.setattr(feeder, "PAUSE_SECONDS", 600)
    worker.curtain.clear()
    going = await begin(http, *map(drawn, "ab"))

    async def said(batch_id: str, status: str, reason: str) -> bool:
        stored = await queue.batch(batch_id, None)
        said = stored.batch.patchforge.waiting_for or ""
        return stored.next == stored.length and stored.batch.status == status and said.startswith(reason)

    await eventually(lambda: said(going["id"], "in_progress", ""))
    await queue.note_waiting(await queue.batch(going["id"], None), "the store was away")

    async def cleared() -> bool:
        return (await queue.batch(going["id"], None)).batch.patchforge.waiting_for is None

    await eventually(cleared)
    plain = settings.model_copy(update={"results": "redis"})
    without = JobQueue.connect(plain.redis_url or "", plain)
    file = await without.add_file(jsonl(drawn("refused", steps=0)).split(b"\n"), "here", None, 3600)
    await without.close()
    object_server.stop()
    for _ in range(2):
        batch = await queue.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
        away = "the object store s3://pictures/results cannot be reached"
        await eventually(lambda batch=batch, away=away: said(batch.id, "finalizing", away))  # type: ignore[misc]


async def test_what_is_gone_is_a_typed_error_of_its_lines(
    http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue, redis_client: Redis
) -> None:
    assert queue.objects is not None
    lines = [json.dumps(drawn(str(seed))).encode() for seed in range(7)] + [b"", b""]
    file = await queue.add_file(lines, "gone", None, 3600)
    _, second, _ = await queue._chunks(keys.FILE_LINES + file.id.removeprefix("file-"))
    await queue.objects.delete([second.reference])
    batch = (await http.post("/v1/batches", json={"input_file_id": file.id})).json()
    over = await until(http, batch)
    assert over["request_counts"] == {"total": 8, "completed": 4, "failed": 4}, "nobody knows that one was empty"
    assert list(await results(http, over)) == list("0123")
    reply = await http.get(f"/v1/files/{over['error_file_id']}/content")
    assert [json.loads(line)["error"]["code"] for line in reply.text.splitlines()] == ["line_expired"] * 4
    with pytest.raises(httpx.RemoteProtocolError):  # nobody takes the half for the whole
        await http.get(f"/v1/files/{file.id}/content")

    for kind in ("output", "error"):
        found = await queue._chunks(f"{keys.FILE_LINES}{kind}-{batch['id'].removeprefix('batch_')}")
        await queue.objects.delete([chunk.reference for chunk in found])
        reply = await http.get(f"/v1/files/{over[f'{kind}_file_id']}/content")
        assert [json.loads(line)["error"]["code"] for line in reply.text.splitlines()] == ["result_expired"] * 4


async def test_what_was_begun_without_the_store_goes_on(
    http: httpx.AsyncClient, worker: ScriptedWorker, settings: Settings, redis_client: Redis
) -> None:
    """Files and batches of before the setting, or of an earlier version, are on the queue server."""
    plain = settings.model_copy(update={"results": "redis"})
    before = JobQueue.connect(plain.redis_url or "", plain)
    content = jsonl(*(drawn(str(seed), seed=seed) for seed in range(7)))
    file = await before.add_file(content.split(b"\n"), "old.jsonl", None, 3600)
    old = await before.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
    await before.close()
    assert await redis_client.type(keys.FILE_LINES + file.id.removeprefix("file-")) == b"list"
    assert (await http.get(f"/v1/files/{file.id}/content")).content == content
    new = (await http.post("/v1/batches", json={"input_file_id": file.id})).json()
    for batch in ({"id": old.id}, new):
        made = await results(http, await until(http, batch))
        assert list(made) == [str(seed) for seed in range(7)]
    assert len(await redis_client.hgetall(keys.BATCH_RESULTS + old.id.removeprefix("batch_"))) == 7
    assert (await http.delete(f"/v1/files/{file.id}")).status_code == 200


async def test_on_several_queue_servers(
    settings: Settings, redis_client: Redis, tmp_path: Path, object_server: ObjectServer
) -> None:
    with EmbeddedServer(tmp_path) as second:
        urls = [settings.redis_url or "", second.url]
        several = settings.model_copy(update={"redis_url": None, "redis_urls": urls})
        queue, workers = connect(several), connect_all(several)
        for each in workers:
            await each.announce("scripted", CARDS)
        playing = [asyncio.create_task(ScriptedWorker(each).run()) for each in workers]
        async with running(Gateway(several, queue)) as gateway:
            homes = set()
            for tenant in map(str, range(6)):
                lines = [json.dumps(native(name)).encode() for name in "abcde"]
                file = await queue.add_file(lines, "lines.jsonl", tenant, 600)
                assert [line async for line in queue.file_lines(file.id)] == lines
                batch = await queue.create_batch(file.id, tenant, endpoint=None, window="1h", metadata=None)
                homes.add(server_of(batch.id[-26:]))
                stored = await ended(queue, batch.id, tenant)
                made = BatchResults(queue, stored, lambda job, index: "").output()
                assert [json.loads(line)["custom_id"] async for line in made] == list("abcde")
                await queue.delete_batch(batch.id, tenant)
                await queue.delete_file(file.id, tenant)
                assert not objects_of(object_server, batch.id) + objects_of(object_server, file.id)
            assert homes == {0, 1}
            gateway.stop()
        for task in playing:
            task.cancel()
        await asyncio.gather(*playing, return_exceptions=True)
        await asyncio.gather(queue.close(), *(each.close() for each in workers))


async def test_two_gateways_move_results_once(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    queue: JobQueue,
    other_queue: JobQueue,
    object_server: ObjectServer,
) -> None:
    """Each believes that it feeds. What the slower one stored is deleted."""
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(seed), seed=seed) for seed in range(6)))
    await worker.next_job()
    stored = replace(await queue.batch(batch["id"], None), next=6)
    worker.curtain.set()
    over = await until(http, batch)
    left = objects_of(object_server, batch["id"])
    await asyncio.gather(*(each.move_results(stored, lambda text: None) for each in (queue, other_queue)))
    assert objects_of(object_server, batch["id"]) == left
    assert list(await results(http, over)) == [str(seed) for seed in range(6)]


async def test_lines_in_another_store_hold_nobody_up(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    queue: JobQueue,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a change of the bucket. Such a batch waits, because the bucket may be changed back; it can be cancelled."""
    monkeypatch.setattr(feeder, "PAUSE_SECONDS", 600)
    file = await queue.add_file(jsonl(*map(drawn, "abc")).split(b"\n"), "elsewhere", None, 3600)
    key = keys.FILE_LINES + file.id.removeprefix("file-")
    places: Any = await redis_client.hgetall(key)
    for first, place in places.items():
        await redis_client.hset(key, first, place.replace(b"s3://pictures/", b"s3://elsewhere/"))
    elsewhere = (await http.post("/v1/batches", json={"input_file_id": file.id})).json()
    await waiting_for(http, elsewhere, "this is in another object store than s3://pictures/results")
    assert len(await results(http, await until(http, await begin(http, *map(drawn, "abcdefg"))))) == 7
    await http.post(f"/v1/batches/{elsewhere['id']}/cancel")
    over = await until(http, elsewhere)
    assert over["request_counts"] == {"total": 3, "completed": 0, "failed": 0}
    errors = (await http.get(f"/v1/files/{over['error_file_id']}/content")).text.splitlines()
    assert {json.loads(line)["error"]["code"] for line in errors} == {"batch_cancelled"}


async def test_batches_end_without_the_setting(
    settings: Settings, worker: ScriptedWorker, queue: JobQueue, redis_client: Redis
) -> None:
    """What was moved stays in the store, the rest stays here, and a gateway with the setting reads both."""
    plain = settings.model_copy(update={"results": "redis"})
    without = JobQueue.connect(plain.redis_url or "", plain)
    refused = [drawn(name, steps=0) for name in "abc"]
    begun = {}
    worker.curtain.clear()
    for name, lines, sender in (
        ("moved", [*refused, *map(drawn, "de")], without),
        ("fresh", list(map(drawn, "de")), without),
        ("apart", [*refused, *map(drawn, "de")], queue),
    ):
        file = await sender.add_file(jsonl(*lines).split(b"\n"), name, None, 3600)
        batch = await queue.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
        begun[name] = batch.id
        if name == "moved":

            async def moved(batch_id: str = batch.id) -> bool:
                stored = await queue.batch(batch_id, None)
                return stored.archived == 3 and stored.next == stored.length

            async with running(Gateway(settings, queue)) as first:
                await eventually(moved)
                first.stop()
            key = batch.id.removeprefix("batch_")
            older = "HSCAN", keys.BATCH_RESULTS + key, await redis_client.hget(keys.BATCH + key, "cursor")
            with pytest.raises(ResponseError, match="invalid cursor"):  # so an earlier version does not end the batch
                await redis_client.execute_command(*older)
    async with running(Gateway(plain, without)) as second:
        worker.curtain.set()
        await ended(queue, begun["fresh"], "")
        await ended(queue, begun["moved"], "")
        await queue.cancel_batch(begun["apart"], None)
        await ended(queue, begun["apart"], "")
        second.stop()
    found = {}
    for name, batch_id in begun.items():
        reading = BatchResults(queue, await queue.batch(batch_id, None), lambda job, index: "")
        for kind, texts in (("output", reading.output()), ("error", reading.errors())):
            found[f"{name} {kind}"] = "".join([json.loads(text)["custom_id"] async for text in texts])
    assert found == {
        "moved output": "de",
        "moved error": "abc",
        "fresh output": "de",
        "fresh error": "",
        "apart output": "",
        "apart error": "abcde",
    }
    assert await queue.open_batches() == []
    assert int(await redis_client.hget(keys.RESERVED, "total") or 0) == 0
    await without.close()


async def test_lines_go_although_a_gateway_without_the_setting_began_the_batch(
    http: httpx.AsyncClient, worker: ScriptedWorker, settings: Settings, queue: JobQueue, object_server: ObjectServer
) -> None:
    plain = settings.model_copy(update={"results": "redis"})
    without = JobQueue.connect(plain.redis_url or "", plain)
    file = await queue.add_file(jsonl(*map(drawn, "abc")).split(b"\n"), "apart", None, 3600)
    batch = await without.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
    await without.close()
    assert len(await results(http, await until(http, {"id": batch.id}))) == 3
    assert (await http.delete(f"/v1/files/{file.id}")).status_code == 200
    assert objects_of(object_server, file.id) == []
