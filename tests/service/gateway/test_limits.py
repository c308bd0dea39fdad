"""Limits of an API key, and calls from pages of other origins."""

from __future__ import annotations

import grpc
import httpx
import openai
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.auth import make_entry
from patchforge.service.pb.inference import grpc_inference_service_pb2 as inference_pb
from patchforge.service.pb.inference import grpc_inference_service_pb2_grpc as inference_pb_grpc
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.settings import Settings
from tests.service.gateway.harness import ScriptedWorker

APPLE = {"prompt": "apple", "model": "tiny-text"}
PAGE = "https://app.example"


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    return Settings(
        redis_url=queue_server.url,
        http_port=0,
        grpc_port=0,
        drain_seconds=1,
        api_keys=[make_entry("alice", "a"), make_entry("bob", "b")],
        rate_limit=1,
        rate_burst=2,
        max_in_flight=1,
        cors_origins=[PAGE],
    )


def key(name: str) -> dict[str, str]:
    return {"x-api-key": name}


async def test_too_many_pictures(http: httpx.AsyncClient, url: str, gateway: Gateway, worker: ScriptedWorker) -> None:
    job = await http.post("/v1/jobs", json=APPLE | {"n": 10}, headers=key("a"))  # and in debt by eight
    async with http.stream("GET", f"/v1/jobs/{job.json()['id']}/events", headers=key("a")) as events:
        await events.aread()

    reply = await http.post("/v1/jobs", json=APPLE, headers=key("a"))
    assert (reply.status_code, reply.json()["code"]) == (429, "rate_limited")
    assert 60 < int(reply.headers["retry-after"]) <= 540

    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="a", max_retries=0) as client:
        with pytest.raises(openai.RateLimitError) as caught:
            await client.images.generate(prompt="apple", model="tiny-text")
        assert (caught.value.code, caught.value.type) == ("rate_limited", "rate_limit_error")
        with pytest.raises(openai.RateLimitError):
            await client.images.generate(prompt="apple", model="tiny-text", stream=True)

    tensors = {"inputs": [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["apple"]}]}
    reply = await http.post("/v2/models/tiny-text/infer", json=tensors, headers=key("a"))
    assert (reply.status_code, reply.json().keys()) == (429, {"error"})

    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        submit = pb.SubmitJobRequest(generation=pb.Generation(**APPLE))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pb_grpc.ImageServiceStub(channel).SubmitJob(submit, metadata=(("x-api-key", "a"),))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(refused.value.trailing_metadata() or ())["retry-after"]) > 0

    assert (await http.post("/v1/jobs", json=APPLE, headers=key("b"))).status_code == 202, "bob has his own"


async def test_too_many_jobs(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    job = (await http.post("/v1/jobs", json=APPLE, headers=key("a"))).json()
    reply = await http.post("/v1/jobs", json=APPLE, headers=key("a"))
    assert (reply.status_code, reply.json()["code"]) == (429, "too_many_jobs")
    assert reply.headers["retry-after"]
    assert (await http.get(f"/v1/jobs/{job['id']}", headers=key("a"))).status_code == 200, "looking is free"


async def test_probes_of_open_inference_need_no_key(
    http: httpx.AsyncClient, gateway: Gateway, worker: ScriptedWorker
) -> None:
    """Server and model metadata do need one."""
    for path in ("live", "ready"):
        assert (await http.get(f"/v2/health/{path}")).json() == {path: True}
    for path in ("/v2", "/v2/models/tiny-text", "/v2/models/tiny-text/ready"):
        assert (await http.get(path)).status_code == 401, path
        assert (await http.get(path, headers=key("a"))).status_code == 200, path
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        stub = inference_pb_grpc.GRPCInferenceServiceStub(channel)
        assert (await stub.ServerLive(inference_pb.ServerLiveRequest())).live
        assert (await stub.ServerReady(inference_pb.ServerReadyRequest())).ready
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelReady(inference_pb.ModelReadyRequest(name="tiny-text"))
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_pages_of_the_origins_allowed_may_call(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    asking = {"Origin": PAGE, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    allowed = await http.options("/v1/jobs", headers=asking)
    assert allowed.status_code == 200, "a browser asks without a key"
    assert allowed.headers["access-control-allow-origin"] == PAGE
    refused = await http.options("/v1/jobs", headers=asking | {"Origin": "https://elsewhere.example"})
    assert "access-control-allow-origin" not in refused.headers
    for headers, status in [(key("a"), 200), (key("?"), 401)]:
        reply = await http.get("/v1/models", headers=headers | {"Origin": PAGE})
        assert reply.status_code == status
        assert reply.headers["access-control-allow-origin"] == PAGE, "or the page could not read the error"


def test_origins_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_CORS_ORIGINS", f"{PAGE}, https://other.example")
    assert Settings().cors_origins == [PAGE, "https://other.example"]
