"""A gateway under a path of a proxy, and the names of requests."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest
import structlog
from openai import AsyncOpenAI

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.auth import make_entry
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import ScriptedWorker, ended, running
from tests.service.gateway.nginx import nginx

APPLE = {"prompt": "apple", "model": "tiny-text", "seed": 7}
LOCATIONS = """
location /images/ {{
    proxy_pass {url}/;
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Prefix /images;
}}
location /kept/ {{
    proxy_pass {url};
    proxy_set_header Host $http_host;
    proxy_set_header X-Forwarded-Prefix /kept/;
}}
"""
BAD_PREFIXES = ["//evil.example", "https://evil.example", "/a?b", "/a b", "/../x", "images", "/" + "a" * 300, "/%2f"]


async def behind(http: httpx.AsyncClient, root: str, queue: JobQueue) -> None:
    """All that must hold at `root`, seen through `http`."""
    page = await http.get(f"{root}/")
    assert page.status_code == 200
    for link in re.findall(r'(?:src|href)="([a-z/.]+)"', page.text):
        assert (await http.get(page.url.join(link))).status_code == 200, link

    accepted = await http.post(f"{root}/v1/jobs", json=APPLE)
    job = accepted.json()["id"]
    assert accepted.headers["location"] == f"{root}/v1/jobs/{job}"
    assert await ended(queue, job) == "completed"
    assert (await http.get(accepted.headers["location"])).json()["status"] == "completed"
    events = await http.get(f"{root}/v1/jobs/{job}/events")
    assert "event: completed" in events.text

    async with AsyncOpenAI(base_url=f"{http.base_url}{root}/v1", api_key="unused", max_retries=0) as client:
        [image] = (await client.images.generate(prompt="apple", model="tiny-text", response_format="url")).data or []
    assert image.url is not None
    assert image.url.startswith(f"{str(http.base_url).rstrip('/')}{root}/v1/jobs/")
    assert (await http.get(image.url)).headers["content-type"] == "image/png"

    docs = (await http.get(f"{root}/docs")).text
    for link in re.findall(rf"['\"]({root}/[^'\"]+)['\"]", docs):
        assert (await http.get(link)).status_code == 200, link
    assert f"{root}/openapi.json" in docs
    document = (await http.get(f"{root}/openapi.json")).json()
    assert document["servers"] == [{"url": root}]
    missing = await http.get(f"{root}/v1/images/x")
    assert missing.json()["error"]["code"] == "not_found", "errors have the shape of their API"


async def test_behind_nginx(
    gateway: Gateway, url: str, worker: ScriptedWorker, queue: JobQueue, tmp_path: Path
) -> None:
    with nginx(tmp_path, LOCATIONS.format(url=url)) as outside:
        async with httpx.AsyncClient(base_url=outside, timeout=PATIENCE) as http:
            await behind(http, "/images", queue)  # which nginx takes off the path
            await behind(http, "/kept", queue)


def opened(gateway: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{gateway.http_port}", timeout=PATIENCE)


@pytest.fixture
async def set_up(queue_server: EmbeddedServer, queue: JobQueue) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(redis_url=queue_server.url, http_port=0, grpc_port=0, drain_seconds=1, root_path="/a/b/")
    async with running(Gateway(settings, queue)) as gateway, opened(gateway) as http:
        yield http


async def test_a_path_from_the_settings(set_up: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue) -> None:
    await behind(set_up, "/a/b", queue)
    accepted = await set_up.post("/v1/jobs", json=APPLE)  # the proxy has taken it off
    assert accepted.headers["location"].startswith("/a/b/v1/jobs/")
    bare = await set_up.get("/a/b")
    assert (bare.status_code, bare.headers["location"]) == (307, "/a/b/"), "the links of the page are relative"


async def test_several_proxies_each_add_their_part(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for headers in ([("X-Forwarded-Prefix", "/a, /b")], [("X-Forwarded-Prefix", "/a"), ("X-Forwarded-Prefix", "/b")]):
        accepted = await http.post("/v1/jobs", json=APPLE, headers=headers)
        assert accepted.headers["location"].startswith("/a/b/v1/jobs/")


@pytest.mark.parametrize("prefix", BAD_PREFIXES)
async def test_a_header_that_is_no_path_changes_nothing(
    http: httpx.AsyncClient, worker: ScriptedWorker, prefix: str
) -> None:
    accepted = await http.post("/v1/jobs", json=APPLE, headers={"X-Forwarded-Prefix": prefix})
    assert accepted.status_code == 202
    assert accepted.headers["location"].startswith("/v1/jobs/")


async def test_a_prefix_opens_nothing(queue_server: EmbeddedServer, queue: JobQueue) -> None:
    settings = Settings(
        redis_url=queue_server.url, http_port=0, grpc_port=0, drain_seconds=1, api_keys=[make_entry("alice", "a")]
    )
    async with running(Gateway(settings, queue)) as gateway, opened(gateway) as http:
        for prefix, path, status in [
            ("/images", "/healthz", 200),
            ("/images", "/images/healthz", 200),
            ("/images", "/images/v1/models", 401),
            ("/images", "/v1/models", 401),
            ("/v1", "/v1/models", 401),
            ("/playground", "/playground/v1/models", 401),
            ("/playground", "/v1/models", 401),
            ("/healthz", "/healthz/v1/models", 401),
        ]:
            reply = await http.get(path, headers={"X-Forwarded-Prefix": prefix})
            assert reply.status_code == status, (prefix, path)


# --- the names of requests ---


async def test_a_request_keeps_its_name(
    http: httpx.AsyncClient, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the answer, in errors, and in the log."""
    named = await http.get("/healthz", headers={"X-Request-Id": "abc-123"})
    assert named.headers["x-request-id"] == "abc-123"
    other = (await http.get("/healthz")).headers["x-request-id"]
    assert len(other) == 32
    for bad in ("a b", "x" * 129, "", "a\tb"):
        assert len((await http.get("/healthz", headers={"X-Request-Id": bad})).headers["x-request-id"]) == 32
    missing = await http.get("/v1/jobs/x", headers={"X-Request-Id": "abc"})
    assert missing.json()["request_id"] == missing.headers["x-request-id"] == "abc"

    async def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    async def no_tick() -> None: ...

    await gateway.tick()  # the first one has begun
    monkeypatch.setattr(gateway, "tick", no_tick)  # it looks at the fleet too
    monkeypatch.setattr(gateway.service, "fleet", broken)
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        reply = await http.get("/v1/models/x", headers={"X-Request-Id": "find-me"})
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "find-me")
    assert [line["request_id"] for line in logged if line["event"] == "unexpected error"] == ["find-me"]


async def test_so_does_a_call_of_grpc(stub: ImageServiceStub, worker: ScriptedWorker) -> None:
    call = stub.ListModels(pb.ListModelsRequest(), metadata=(("x-request-id", "abc"),))
    await call
    assert dict(await call.trailing_metadata())["x-request-id"] == "abc"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetJob(pb.GetJobRequest(job_id="x"), metadata=(("x-request-id", "abd"),))
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "abd"
