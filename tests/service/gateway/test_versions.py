"""A gateway among other versions: it shows what it can read, reports the rest, and keeps running."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import httpx
import pytest
from redis.asyncio import Redis

from patchforge.service.gateway import jobs
from patchforge.service.gateway.app import Gateway
from patchforge.service.messages.protocol import CAPABILITIES, PROTOCOL
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue, keys
from tests.service.gateway.harness import CARDS, ScriptedWorker
from tests.service.queue.kit import DONE, a_request, claimed

SECRET = "the caller's own words"
LATER = json.dumps(json.loads(written(a_request(prompt=SECRET))) | {"sampler": {"name": SECRET}})


@pytest.fixture
async def later_job(queue: JobQueue, redis_client: Redis) -> str:
    """The id of a waiting job with a sampler of a later version."""
    job = await queue.submit(a_request(prompt=SECRET))
    await redis_client.hset(keys.job(job.id), "request", LATER)
    return job.id


async def announced(redis_client: Redis, worker: str, *cards: dict[str, Any], **told: Any) -> None:
    """Writes it as another version might."""
    await redis_client.zadd(keys.WORKERS, {worker: 9e9})
    await redis_client.set(keys.worker_models(worker), json.dumps(cards))
    if told:
        await redis_client.set(keys.announcement(worker), json.dumps(told))


class TestJobsOfALaterVersion:
    async def test_are_not_shown_as_something_else(self, http: httpx.AsyncClient, later_job: str) -> None:
        for path in ("", "/image", "/maps/finish.png"):
            answer = await http.get(f"/v1/jobs/{later_job}{path}")
            assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")
            assert "request.sampler: is of an unknown kind" in answer.json()["detail"]
            assert SECRET not in answer.text

    async def test_nor_over_grpc(self, stub: pb_grpc.ImageServiceStub, later_job: str) -> None:
        for call, request in (
            (stub.GetJob, pb.GetJobRequest(job_id=later_job)),
            (stub.GetImage, pb.GetImageRequest(job_id=later_job)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                await call(request)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
            assert SECRET not in (caught.value.details() or "")

    async def test_can_be_followed_to_their_end(self, http: httpx.AsyncClient, queue: JobQueue, later_job: str) -> None:
        await queue.finish(await claimed(queue), DONE)
        answer = await http.get(f"/v1/jobs/{later_job}/events")
        assert [line for line in answer.text.splitlines() if line.startswith("event:")] == [
            "event: queued",
            "event: completed",
        ]

    async def test_can_be_cancelled(self, http: httpx.AsyncClient, queue: JobQueue, later_job: str) -> None:
        assert (await http.delete(f"/v1/jobs/{later_job}")).status_code == 501
        assert (await queue.get(later_job)).status is JobStatus.CANCELLED

    async def test_are_not_there_for_others(
        self, http: httpx.AsyncClient, queue: JobQueue, redis_client: Redis, later_job: str
    ) -> None:
        await redis_client.hset(keys.job(later_job), "tenant", "somebody else")
        assert (await http.get(f"/v1/jobs/{later_job}")).status_code == 404
        assert (await http.delete(f"/v1/jobs/{later_job}")).status_code == 404
        assert (await http.get(f"/v1/jobs/{later_job}/events")).status_code == 404
        assert (await queue.get(later_job)).status is JobStatus.WAITING

    async def test_expire_in_a_gateways_hands(
        self, gateway: Gateway, http: httpx.AsyncClient, redis_client: Redis, later_job: str
    ) -> None:
        await redis_client.zadd(keys.WAITING, {f"{later_job}:emoji": 1})
        await gateway.tick()
        text = (await http.get("/metrics")).text
        assert 'patchforge_requests_total{model="emoji",sampler="other",status="expired"} 1.0' in text

    async def test_a_retry_of_their_submit_is_told(
        self, http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
    ) -> None:
        retry: dict[str, Any] = {"json": {"prompt": "apple"}, "headers": {"Idempotency-Key": "k"}}
        job_id = (await http.post("/v1/jobs", **retry)).json()["id"]
        await redis_client.hset(keys.job(job_id), "request", LATER)
        answer = await http.post("/v1/jobs", **retry)
        assert (answer.status_code, answer.json()["code"]) == (501, "unsupported")


async def test_an_outcome_of_a_later_version_is_an_error_to_whoever_waits(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    worker.curtain.clear()
    waiting = asyncio.create_task(http.post("/v1/images/generations", json={"prompt": "apple"}))
    job_id = await worker.next_job()
    ended = {"status": "completed", "report": json.dumps({"later": SECRET}), "last_event": "99999999999999-0"}
    event = {"event": json.dumps({"type": "later", "words": SECRET})}
    async with redis_client.pipeline(transaction=True) as together:
        together.hset(keys.job(job_id), mapping=dict(ended))
        together.xadd(keys.events(job_id), dict(event), id=ended["last_event"])
        together.publish(keys.NEWS, job_id)
        await together.execute()
    answer = await waiting
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "unsupported"
    assert answer.headers["x-should-retry"] == "false"
    assert SECRET not in answer.text


class TestWorkersOfALaterVersion:
    async def test_hide_no_other_and_end_no_gateway(
        self, gateway: Gateway, http: httpx.AsyncClient, queue: JobQueue, redis_client: Redis
    ) -> None:
        card = json.loads(written(CARDS[0]))
        odd = [card | {"name": "later", "sampler": {"name": SECRET}}, card | {"name": "newer", "later": 1}]
        await announced(redis_client, "new", *odd, protocol=PROTOCOL, capabilities=[*CAPABILITIES, "later"])
        await announced(redis_client, "newest", card | {"name": "afar"}, protocol=PROTOCOL + 1, capabilities=[])
        await queue.announce_metrics("odd", b"{{{")
        await gateway.tick()
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["newer"]
        assert (await http.get("/readyz")).json() == {"status": "ready", "models": ["newer"]}
        assert (await http.get("/metrics")).status_code == 200
        for name in ("later", "afar"):
            answer = await http.post("/v1/jobs", json={"prompt": "apple", "model": name})
            assert (answer.status_code, answer.json()["field"]) == (501, "model")
            assert (await http.get(f"/v1/models/{name}")).status_code == 501
            assert (await http.get(f"/v2/models/{name}/ready")).status_code == 501
        answer = await http.post("/v1/images/generations", json={"prompt": "apple", "model": "later"})
        assert answer.status_code == 501
        assert answer.headers["x-should-retry"] == "false"

    async def test_are_given_what_only_they_can_do(
        self,
        http: httpx.AsyncClient,
        worker: ScriptedWorker,
        queue: JobQueue,
        other_queue: JobQueue,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(jobs, "needs_of", lambda request: {"format.png", "sampler.later"})
        refused = await http.post("/v1/jobs", json={"prompt": "apple"})
        assert (refused.status_code, refused.json()["code"]) == (501, "unsupported")
        assert "sampler.later" in refused.json()["detail"]
        assert await queue.waiting() == {}

        other_queue.capabilities = CAPABILITIES | {"sampler.later"}
        await other_queue.announce("new", CARDS)
        job_id = (await http.post("/v1/jobs", json={"prompt": "apple"})).json()["id"]
        monkeypatch.undo()
        plain = (await http.post("/v1/jobs", json={"prompt": "apple"})).json()["id"]
        assert await worker.next_job() == plain
        claim = await other_queue.claim("new", ["tiny-text"], block_seconds=0)
        assert claim is not None
        assert claim.job.id == job_id
