"""What clients, browsers and proxies may expect of any server: HEAD, half-closed connections, tags, compression."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.body import MIN_BYTES_PER_SECOND
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import ScriptedWorker, ended, png, running

APPLE = {"prompt": "apple", "model": "tiny-text", "seed": 7}
JSON = {"Content-Type": "application/json"}
GENERATION = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
PAGE = "https://app.example"


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    return Settings(
        redis_url=queue_server.url,
        http_port=0,
        grpc_port=0,
        drain_seconds=1,
        sse_ping_seconds=0.2,
        cors_origins=[PAGE],
        max_body_bytes=4096,
        max_upload_bytes=1 << 20,
    )


@pytest.fixture
async def done(http: httpx.AsyncClient, worker: ScriptedWorker, queue: JobQueue) -> str:
    """The id of a completed job."""
    job = (await http.post("/v1/jobs", json=APPLE)).json()["id"]
    assert await ended(queue, job) == "completed"
    return job


async def exchange(gateway: Gateway, sent: bytes, *, half_close: bool = True) -> bytes:
    """All that comes back, until the gateway closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(sent)
    if half_close:
        writer.write_eof()
    async with asyncio.timeout(PATIENCE):
        received = await reader.read()
    writer.close()
    return received


# --- HEAD ---


async def test_head_wherever_get_is(http: httpx.AsyncClient, done: str) -> None:
    paths = ["/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/playground/app.js", "/v1/models"]
    paths += ["/v2", "/v2/health/live", f"/v1/jobs/{done}", f"/v1/jobs/{done}/maps/finish.png", "/v1/nothing"]
    for path in paths:
        got, asked = await http.get(path), await http.head(path)
        assert (asked.status_code, asked.content) == (got.status_code, b""), path
        assert asked.headers["content-type"] == got.headers["content-type"], path
    asked = await http.head(f"/v1/jobs/{done}/image")
    assert (asked.status_code, asked.headers["content-type"]) == (200, "image/png")
    assert int(asked.headers["content-length"]) == len(png(7))
    assert asked.headers["etag"]
    assert (await http.head("/v1/images/generations")).status_code == 405
    text = (await http.get("/metrics")).text
    assert 'method="HEAD",route="/v1/jobs/{job_id}/image"' in text


async def test_head_of_a_stream_ends_at_once(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    job = (await http.post("/v1/jobs", json=APPLE)).json()["id"]
    asked = await http.head(f"/v1/jobs/{job}/events")
    assert (asked.status_code, asked.content) == (200, b"")
    assert asked.headers["content-type"].startswith("text/event-stream")
    worker.curtain.set()


# --- errors that are found before any operation is ---


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations", "/v2/models/tiny-text/infer", "/v1/nothing"])
@pytest.mark.parametrize("announced", [True, False])
async def test_a_body_that_is_too_large_is_refused_in_the_shape_of_the_api(
    http: httpx.AsyncClient, worker: ScriptedWorker, path: str, announced: bool
) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 16)

    content: Any = b" " * (20 << 16) if announced else chunks()
    reply = await http.post(path, content=content, headers=JSON | {"Origin": PAGE})
    if path == "/v1/nothing" and not announced:
        assert reply.status_code == 404  # nobody reads it
    else:
        assert reply.status_code == 413
        body = reply.json()
        code = {"/v1/images/generations": lambda: body["error"]["code"], "/v2/models/tiny-text/infer": lambda: None}
        assert code.get(path, lambda: body["code"])() in ("payload_too_large", None)
        assert "bytes" in json.dumps(body)
    assert reply.headers["access-control-allow-origin"] == PAGE


async def test_so_is_what_nobody_has_foreseen(
    http: httpx.AsyncClient, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*arguments: object) -> None:
        raise ZeroDivisionError

    async def no_tick() -> None: ...

    await gateway.tick()  # the first one has begun
    monkeypatch.setattr(gateway, "tick", no_tick)  # it looks at the fleet too
    monkeypatch.setattr(gateway.service, "fleet", broken)
    reply = await http.get("/v1/models/tiny-text", headers={"Origin": PAGE})
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
    assert reply.headers["access-control-allow-origin"] == PAGE


# --- half-closed connections ---


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_closes_its_side_after_sending_gets_its_answer(
    gateway: Gateway, worker: ScriptedWorker, version: str
) -> None:
    received = await exchange(gateway, f"GET /readyz HTTP/{version}\r\nHost: x\r\n\r\n".encode())
    head, _, body = received.rpartition(b"\r\n\r\n")
    assert b" 200 OK" in head
    assert json.loads(body)["status"] == "ready"


async def test_so_does_one_that_waits_for_a_picture(gateway: Gateway, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    body = json.dumps(APPLE).encode()
    asking = asyncio.create_task(exchange(gateway, GENERATION + b"%d\r\n\r\n" % len(body) + body))
    await worker.next_job()
    await asyncio.sleep(0.2)  # some probes are written meanwhile
    worker.curtain.set()
    received = await asking
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert b"HTTP/1.1 200 OK" in received
    assert b"b64_json" in received


async def test_and_one_that_follows_a_job(gateway: Gateway, worker: ScriptedWorker, http: httpx.AsyncClient) -> None:
    worker.curtain.clear()
    job = (await http.post("/v1/jobs", json=APPLE)).json()["id"]
    await worker.next_job()
    asking = asyncio.create_task(exchange(gateway, f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
    await asyncio.sleep(0.2)
    worker.curtain.set()
    received = await asking
    assert b"event: completed" in received
    assert received.endswith(b"0\r\n\r\n"), "as a proper end"


async def test_one_that_has_gone_altogether_is_noticed(
    gateway: Gateway, worker: ScriptedWorker, queue: JobQueue
) -> None:
    """Although both look the same at first: its job is cancelled."""
    worker.curtain.clear()
    body = json.dumps(APPLE).encode()
    _, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
    writer.write(GENERATION + b"%d\r\n\r\n" % len(body) + body)
    job = await worker.next_job()
    writer.close()
    assert await ended(queue, job) == "cancelled"


async def test_a_half_sent_request_gets_none(gateway: Gateway) -> None:
    received = await exchange(gateway, b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{")
    assert not received.startswith(b"HTTP/1.1 2")


# --- streams and tags ---


async def test_an_event_source_stops_after_the_last_event(http: httpx.AsyncClient, done: str) -> None:
    """A browser connects again after every end of a stream, and only a 204 stops it."""
    replay = await http.get(f"/v1/jobs/{done}/events")
    ids = [line.partition(": ")[2] for line in replay.text.splitlines() if line.startswith("id: ")]
    again = await http.get(f"/v1/jobs/{done}/events", headers={"Last-Event-ID": ids[-1]})
    assert (again.status_code, again.content) == (204, b"")
    rest = await http.get(f"/v1/jobs/{done}/events", headers={"Last-Event-ID": ids[-3]})
    assert rest.status_code == 200
    assert [line.partition(": ")[2] for line in rest.text.splitlines() if line.startswith("id: ")] == ids[-2:]


async def test_tags_of_all_kinds(http: httpx.AsyncClient, done: str) -> None:
    path = f"/v1/jobs/{done}/image"
    tag = (await http.get(path)).headers["etag"]
    for sent in (tag, f"W/{tag}", f'"other", {tag}', f'W/"other",W/{tag}', "*", f'{tag} , "x"'):
        assert (await http.get(path, headers={"If-None-Match": sent})).status_code == 304, sent
    for sent in ('"other"', tag.strip('"'), '"', "", f'"x{tag[1:]}'):
        assert (await http.get(path, headers={"If-None-Match": sent})).status_code == 200, sent
    twice = [("If-None-Match", '"other"'), ("If-None-Match", tag)]
    assert (await http.get(path, headers=twice)).status_code == 304


# --- bodies ---


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP", "deflate", "identity"])
async def test_a_compressed_body(http: httpx.AsyncClient, worker: ScriptedWorker, encoding: str) -> None:
    body = json.dumps(APPLE).encode()
    packed = {"deflate": zlib.compress(body), "identity": body}.get(encoding, gzip.compress(body))
    reply = await http.post("/v1/jobs", content=packed, headers=JSON | {"Content-Encoding": encoding})
    assert reply.status_code == 202
    members = gzip.compress(body[:10]) + gzip.compress(body[10:])
    reply = await http.post("/v1/jobs", content=members, headers=JSON | {"Content-Encoding": "gzip"})
    assert reply.status_code == 202


async def test_a_compressed_body_that_is_wrong(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    body = gzip.compress(json.dumps(APPLE).encode())
    for sent in (b"{}", body[:-9], body + b"x", b""):
        reply = await http.post("/v1/jobs", content=sent, headers=JSON | {"Content-Encoding": "gzip"})
        assert (reply.status_code, reply.json()["code"]) == (422, "invalid_request"), sent
    for encoding in ("br", "zstd", "gzip, gzip", "nonsense"):
        reply = await http.post("/v1/jobs", content=body, headers=JSON | {"Content-Encoding": encoding})
        assert reply.status_code == 415
        assert "gzip" in reply.json()["detail"]
        assert reply.headers["accept-encoding"] == "gzip, deflate, identity"


async def test_a_small_body_that_unpacks_to_a_huge_one(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    bomb = gzip.compress(b" " * (64 << 20))
    assert len(bomb) < 1 << 20
    reply = await http.post("/v1/jobs", content=bomb, headers=JSON | {"Content-Encoding": "gzip"})
    assert (reply.status_code, reply.json()["code"]) == (413, "payload_too_large")


async def test_a_byte_order_mark(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for path in ("/v1/jobs", "/v1/images/generations"):
        body = b"\xef\xbb\xbf" + json.dumps(APPLE).encode()
        assert (await http.post(path, content=body, headers=JSON)).status_code in (200, 202)


async def test_a_slow_line_passes_and_one_that_trickles_does_not(
    queue_server: EmbeddedServer, queue: JobQueue, worker: ScriptedWorker
) -> None:
    """Time is counted from the last byte, and for each byte: here, 12 pieces in more than the time for silence."""
    settings = Settings(redis_url=queue_server.url, http_port=0, grpc_port=0, drain_seconds=1, client_timeout_seconds=2)
    async with running(Gateway(settings, queue)) as gateway:
        piece = MIN_BYTES_PER_SECOND

        async def answer(size: int, pause: float) -> bytes:
            head = "POST /v1/jobs HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json"
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.http_port)
            writer.write(f"{head}\r\nContent-Length: {12 * size}\r\n\r\n".encode())
            body = json.dumps(APPLE).encode().ljust(12 * size)
            answered = asyncio.create_task(reader.read())
            for at in range(0, len(body), size):
                if not answered.done():
                    writer.write(body[at : at + size])
                    await asyncio.wait({answered}, timeout=pause)
            async with asyncio.timeout(PATIENCE):
                received = await answered
            writer.close()
            return received

        assert b" 202 " in await answer(piece, 0.3)
        assert b" 408 " in await answer(10, 0.3)
