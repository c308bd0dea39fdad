"""A gateway whose pictures are in an object store: links without a key, and answers when the store is away."""

from __future__ import annotations

from base64 import b64decode
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from redis.asyncio import Redis

from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.batches import feeder
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue, keys
from patchforge.service.settings import Settings
from tests.object_store import ObjectServer, browse
from tests.service.gateway.batches.kit import begin, drawn, native, results, until
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, png, running
from tests.service.gateway.pictures import base64, encoded, gradient


@pytest.fixture
def settings(settings: Settings, object_variables: dict[str, str]) -> Settings:
    return settings.model_copy(update={"results": object_variables["PATCHFORGE_RESULTS"], "result_ttl_seconds": 600})


@pytest.fixture
async def queue(settings: Settings, redis_client: Redis) -> AsyncIterator[JobQueue]:
    apart = JobQueue.connect(settings.redis_url or "", settings)
    yield apart
    await apart.close()


async def drawn_job(http: httpx.AsyncClient, queue: JobQueue, **fields: object) -> str:
    reply = await http.post("/v1/jobs", json={"model": "tiny-text", "prompt": "a cat", "seed": 5} | fields)
    job_id: str = reply.json()["id"]
    assert await ended(queue, job_id) == "completed"
    return job_id


async def test_pictures_reach_every_protocol_and_not_the_queue_server(
    http: httpx.AsyncClient,
    stub: pb_grpc.ImageServiceStub,
    queue: JobQueue,
    worker: ScriptedWorker,
    redis_client: Redis,
    object_server: ObjectServer,
) -> None:
    job = await drawn_job(http, queue, n=2)
    held = await redis_client.hgetall(keys.images(job))
    assert set(held) == {b"@0", b"@1"}
    assert [name for name in object_server.names() if job in name] == [
        value.decode().removeprefix("s3://pictures/") for _, value in sorted(held.items())
    ]
    reply = await http.get(f"/v1/jobs/{job}/image", params={"index": 1})
    assert (reply.content, reply.headers["content-type"]) == (png(6), "image/png")
    assert (await stub.GetImage(pb.GetImageRequest(job_id=job, index=1))).data == png(6)
    tensor = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a cat"]}]}
    outputs = (await http.post("/v2/models/tiny-text/infer", json=tensor)).json()["outputs"]
    assert "image" in {output["name"] for output in outputs}
    metrics = (await http.get("/metrics")).text
    assert 'patchforge_results_bytes_total{operation="get"}' in metrics
    assert 'patchforge_results_failures_total{operation="get"} 0.0' in metrics


async def test_links_need_no_key_and_end_with_the_job(
    http: httpx.AsyncClient, queue: JobQueue, worker: ScriptedWorker, redis_client: Redis
) -> None:
    body = {"model": "tiny-text", "prompt": "a cat", "seed": 5, "n": 2}
    for response_format, named in ({}, {"url", "b64_json"}), ({"response_format": "url"}, {"url"}):
        reply = (await http.post("/v1/images/generations", json=body | response_format)).json()
        for index, image in enumerate(reply["data"]):
            assert set(image) == named
            assert image["url"].startswith("http://127.0.0.1:")
            assert "/v1/jobs/" not in image["url"]
            answer = browse(image["url"])
            assert (answer.content, answer.headers["content-type"]) == (png(5 + index), "image/png")
            assert browse(image["url"].partition("?")[0]).status_code == 403
            assert "b64_json" not in image or b64decode(image["b64_json"]) == png(5 + index)
    job = reply["patchforge"]["job_id"]
    await redis_client.expire(keys.images(job), 77)
    links = await queue.picture_links(job)
    assert all("X-Amz-Expires=77&" in link for link in links.values())


async def test_a_batch_has_links_and_takes_its_pictures_with_it(
    http: httpx.AsyncClient, worker: ScriptedWorker, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BUSY_SECONDS", "IDLE_SECONDS"):
        monkeypatch.setattr(feeder, name, 0.02)
    batch = await until(http, await begin(http, drawn("a", seed=3, n=2), native("b", seed=9), drawn("c", "fail")))
    made = await results(http, batch)
    data = made["a"]["response"]["body"]["data"]
    assert [browse(image["url"]).content for image in data] == [png(3), png(4)]
    assert [b64decode(image["b64_json"]) for image in data] == [png(3), png(4)]
    [link] = made["b"]["response"]["body"]["urls"]
    assert browse(link).content == png(9)
    jobs = [made[line]["response"]["request_id"] for line in "ab"]
    assert all(any(job in name for name in object_server.names()) for job in jobs)

    object_server.stop()
    refused = await http.delete(f"/v1/batches/{batch['id']}")
    assert refused.status_code == 503
    object_server.start()
    assert (await http.get(f"/v1/batches/{batch['id']}")).status_code == 200, "it can be deleted later"
    assert (await http.delete(f"/v1/files/{batch['output_file_id']}")).json()["deleted"] is True
    assert not any(job in name for name in object_server.names() for job in jobs)
    assert browse(link).status_code == 404
    assert (await http.delete(f"/v1/batches/{batch['id']}")).json()["deleted"] is True


async def test_a_store_that_is_away_is_a_typed_error_and_nothing_else(
    http: httpx.AsyncClient,
    stub: pb_grpc.ImageServiceStub,
    queue: JobQueue,
    worker: ScriptedWorker,
    object_server: ObjectServer,
) -> None:
    job = await drawn_job(http, queue)
    object_server.stop()
    reply = await http.get(f"/v1/jobs/{job}/image")
    assert (reply.status_code, reply.json()["code"]) == (503, "results_unavailable")
    assert reply.json()["detail"] == "the object store s3://pictures/results cannot be reached"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await stub.GetImage(pb.GetImageRequest(job_id=job))
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "completed"
    assert (await http.get("/readyz")).status_code == 200, "all gateways have the same store"
    assert 'patchforge_results_failures_total{operation="get"} 2.0' in (await http.get("/metrics")).text
    object_server.start()
    assert (await http.get(f"/v1/jobs/{job}/image")).content == png(5)


async def test_a_deleted_object_is_not_found(
    http: httpx.AsyncClient, queue: JobQueue, worker: ScriptedWorker, redis_client: Redis
) -> None:
    job = await drawn_job(http, queue)
    assert queue.objects is not None
    await queue.objects.delete([(await redis_client.hget(keys.images(job), "@0")).decode()])
    assert (await http.get(f"/v1/jobs/{job}/image")).status_code == 404


async def test_a_gateway_without_the_setting_says_what_it_lacks(
    http: httpx.AsyncClient, queue: JobQueue, worker: ScriptedWorker, settings: Settings
) -> None:
    job = await drawn_job(http, queue)
    plain = settings.model_copy(update={"results": "redis"})
    elsewhere = JobQueue.connect(plain.redis_url or "", plain)
    async with running(Gateway(plain, elsewhere)) as other, httpx.AsyncClient() as there:
        address = f"http://127.0.0.1:{other.http_port}"
        reply = await there.get(f"{address}/v1/jobs/{job}/image")
        metrics = (await there.get(f"{address}/metrics", params={"workers": "false"})).text
    await elsewhere.close()
    assert reply.status_code == 503
    assert "set PATCHFORGE_RESULTS here too" in reply.json()["detail"]
    assert "patchforge_results" not in metrics


async def test_pictures_to_edit_wait_in_the_store_too(
    http: httpx.AsyncClient, queue: JobQueue, worker: ScriptedWorker, object_server: ObjectServer
) -> None:
    body = {"model": "tiny-text", "prompt": "a cat", "seed": 5, "image": base64(encoded(gradient()))}
    job = (await http.post("/v1/jobs", json=body)).json()["id"]
    assert f"results/{job}/image.png" in object_server.names()
    assert (await queue.source(job)).image.startswith(b"\x89PNG")
    assert await ended(queue, job) == "completed"
    object_server.stop()
    refused = await http.post("/v1/jobs", json=body)
    object_server.start()
    assert (refused.status_code, refused.json()["code"]) == (503, "results_unavailable")
    assert (await http.post("/v1/jobs", json=body)).status_code == 202


async def test_a_picture_to_edit_needs_a_worker_with_the_store(
    http: httpx.AsyncClient, queue: JobQueue, settings: Settings
) -> None:
    plain = settings.model_copy(update={"results": "redis"})
    without = JobQueue.connect(plain.redis_url or "", plain)
    await without.announce("without", CARDS)
    await without.close()
    body = {"model": "tiny-text", "prompt": "a cat"}
    refused = await http.post("/v1/jobs", json=body | {"image": base64(encoded(gradient()))})
    assert (refused.status_code, refused.json()["code"]) == (501, "unsupported")
    assert (await http.post("/v1/jobs", json=body)).status_code == 202


async def test_the_pictures_to_edit_of_a_batch_are_in_the_store_and_go_with_it(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    object_server: ObjectServer,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("BUSY_SECONDS", "IDLE_SECONDS"):
        monkeypatch.setattr(feeder, name, 0.02)
    worker.curtain.clear()
    batch = await begin(http, native("a", image=base64(encoded(gradient()))))
    job = await worker.next_job()
    assert set(await redis_client.hgetall(keys.sources(job))) == {b"@image"}
    assert f"results/{job}/image.png" in object_server.names()
    worker.curtain.set()
    ended = await until(http, batch)
    assert ended["request_counts"]["completed"] == 1
    assert f"results/{job}/image.png" in object_server.names()
    assert await redis_client.ttl(keys.sources(job)) > 600
    assert (await http.delete(f"/v1/batches/{batch['id']}")).json()["deleted"] is True
    assert not any(job in name for name in object_server.names())
    assert not await redis_client.exists(keys.sources(job))
