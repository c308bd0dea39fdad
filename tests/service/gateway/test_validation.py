"""Whatever bytes arrive, the response is a clear 4xx that repeats none of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from resource import RUSAGE_SELF, getrusage
from typing import Any

import httpx
import pytest

from patchforge.service.gateway.app import Gateway
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import ScriptedWorker, running

JSON = {"Content-Type": "application/json"}
SECRET = "hunter2"


def body(fields: str) -> bytes:
    return f'{{"prompt": "{SECRET}", "model": "tiny-text", {fields}}}'.encode("utf-8", "surrogatepass")


BAD_BODIES: list[tuple[str, bytes, str | None]] = [
    ("NaN", body('"guidance": NaN'), "guidance"),
    ("Infinity", body('"guidance": -Infinity'), "guidance"),
    ("1e999", body('"guidance": 1e999'), "guidance"),
    ("NaN as text", body('"guidance": "NaN"'), "guidance"),
    ("NaN in a sampler", body('"sampler": {"name": "dual_loop", "quantile": NaN}'), "sampler.quantile"),
    ("a number as text", body('"n": "2"'), "n"),
    ("a fraction as an integer", body('"n": 1.5'), "n"),
    ("true as an integer", body('"n": true'), "n"),
    ("true as a number", body('"guidance": true'), "guidance"),
    ("5000 digits", body(f'"n": {"9" * 5000}'), "n"),
    ("4000 digits", body(f'"seed": {"9" * 4000}'), "seed"),
    ("-5000 digits", body(f'"guidance": -{"9" * 5000}'), "guidance"),
    ("n of a billion", body('"n": 1000000000'), "n"),
    ("no pictures", body('"n": 0'), "n"),
    ("a million steps", body('"steps": 1000000'), "steps"),
    ("a seed below zero", body('"seed": -1'), "seed"),
    ("a seed of 2**63", body('"seed": 9223372036854775808'), "seed"),
    ("an unknown sampler", body(f'"sampler": "{SECRET}"'), "sampler"),
    ("a sampler of the wrong kind", body('"sampler": [1]'), "sampler"),
    ("a knob of another sampler", body('"sampler": {"name": "euler", "quantile": 0.5}'), "sampler.quantile"),
    ("an unknown format", body(f'"output_format": "{SECRET}"'), "output_format"),
    ("a key twice", body('"n": 1, "n": 2'), "n"),
    ("a key twice, deeper", body('"sampler": {"name": "euler", "name": "euler"}'), "name"),
    ("an unknown field", body('"strength": 1'), "strength"),
    ("an unknown field of bad text", body('"\\ud800\\u0000": 1'), None),
    ("an endless unknown field", body(f'"{"x" * 100_000}": 1'), "x" * 64 + "..."),
    ("a lone surrogate", b'{"prompt": "\\ud800"}', "prompt"),
    ("NUL", b'{"prompt": "a\\u0000b"}', "prompt"),
    ("a giant prompt", b'{"prompt": "%s"}' % (b"x" * 100_000), "prompt"),
    ("prompt and class", body('"class_label": "cat"'), "prompt"),
    ("neither prompt nor class", b"{}", "prompt"),
    ("a class for a text model", b'{"class_label": "cat", "model": "tiny-text"}', "class_label"),
    ("a prompt for a class model", b'{"prompt": "cat", "model": "tiny-class"}', "prompt"),
    ("an unknown class", b'{"class_label": "hunter2", "model": "tiny-class"}', "class_label"),
    ("a path as a model", b'{"prompt": "x", "model": "../../hunter2"}', "model"),
    ("100k nesting", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", None),
    ("100k nested objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, None),
    ("not UTF-8", b'{"prompt": "\xff\xfe"}', None),
    ("UTF-16", '{"prompt": "x"}'.encode("utf-16"), None),
    ("an encoded surrogate", b'{"prompt": "\xed\xa0\x80"}', None),
    ("a list", b'[{"prompt": "x"}]', None),
    ("NaN alone", b"NaN", None),
    ("nothing", b"", None),
    ("half of it", b'{"prompt": "hunter2', None),
    ("a raw control character", b'{"prompt": "a\x01b"}', None),
]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
async def test_bad_bodies(http: httpx.AsyncClient, worker: ScriptedWorker, path: str) -> None:
    for name, content, field in BAD_BODIES:
        reply = await http.post(path, content=content, headers=JSON)
        openai = path != "/v1/jobs"
        if openai and name == "a prompt for a class model":  # valid in this API: it may be the name of a class
            continue
        assert 400 <= reply.status_code < 500, name
        assert SECRET not in reply.text, name
        assert len(reply.content) < 1000, name
        error = reply.json()["error"] if openai else reply.json()
        assert error["param" if openai else "field"] == field, name
        if not openai:
            assert reply.headers["content-type"] == "application/problem+json"
            assert error["status"] == reply.status_code
    assert await worker.queue.waiting() == {}


async def test_bodies_of_another_type(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = await http.post("/v1/jobs", content=b'{"prompt": "x"}', headers={"Content-Type": media_type})
        assert reply.status_code == 415, media_type


@pytest.mark.parametrize(
    ("path", "mebibytes"), [("/v1/jobs", 9), ("/v1/images/edits", 9), ("/v1/images/generations", 2)]
)
async def test_a_large_body_is_refused_unread(http: httpx.AsyncClient, path: str, mebibytes: int) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"} if path.endswith("edits") else JSON
    reply = await http.post(path, content=b" " * (mebibytes << 20), headers=headers)
    assert reply.status_code == 413


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/images/generations"])
async def test_a_huge_chunked_body_is_refused_in_flat_memory(http: httpx.AsyncClient, path: str) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(60 << 4):
            yield b" " * (1 << 16)

    before = getrusage(RUSAGE_SELF).ru_maxrss
    reply = await http.post(path, content=chunks(), headers=JSON)
    assert reply.status_code == 413
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 16 << 10, "in KiB"


async def test_bodies_on_calls_that_take_none(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = (await http.post("/v1/jobs", json={"prompt": "x", "model": "tiny-text"})).json()
    for path in ("/healthz", f"/v1/jobs/{job['id']}/events"):
        reply = await http.request("GET", path, content=b"x" * (2 << 20))
        assert reply.status_code == 413
    assert (await http.get("/healthz")).status_code == 200


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Ty", b"408"),
        (b"", b"408"),
        (
            b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{",
            b"408",
        ),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 200_000, b"400"),
        (b"\x16\x03\x01 not http\r\n\r\n", b"400"),
    ],
)
async def test_slow_or_endless_heads(settings: Settings, queue: JobQueue, sent: bytes, answer: bytes) -> None:
    impatient = settings.model_copy(update={"client_timeout_seconds": 0.5 if answer == b"408" else 60})
    async with running(Gateway(impatient, queue)) as gateway:
        assert await _first_line(gateway.http_port, sent) == b"HTTP/1.1 " + answer


async def _first_line(port: int, sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    async with asyncio.timeout(PATIENCE):
        head = await reader.readline()
    writer.close()
    await writer.wait_closed()
    return head[:12]


async def test_bad_parameters(http: httpx.AsyncClient) -> None:
    for index in ("-1", "10", "x", "1e3", "9" * 5000, "%00", ""):
        reply = await http.get(f"/v1/jobs/01ARZ3NDEKTSV4RRFFQ69G5FAV/image?index={index}")
        assert reply.status_code == 422, index
        assert reply.json()["field"] == "index"


async def test_garbage_event_ids(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    job = (await http.post("/v1/jobs", json={"prompt": "x", "model": "tiny-text"})).json()
    for event_id in (b"x", b"-1", b"1-1-1", b"9" * 400, b"1-", b"$", b"\xff"):
        reply = await http.get(f"/v1/jobs/{job['id']}/events", headers=[(b"Last-Event-ID", event_id)])
        assert reply.status_code == 400, event_id
        assert reply.json()["field"] == "Last-Event-ID"


async def test_wrong_paths_and_methods(http: httpx.AsyncClient) -> None:
    wrong: list[tuple[str, str, int]] = [
        ("GET", "/v1/nothing", 404),
        ("POST", "/v1/nothing", 404),
        ("PUT", "/v1/jobs", 405),
        ("GET", "/playground/../app.py", 404),
        ("GET", "/playground/%2e%2e/app.py", 404),
        ("GET", "/playground/a%00b", 404),
        ("BREW", "/", 405),
    ]
    for method, path, status in wrong:
        reply = await http.request(method, path)
        assert reply.status_code == status, path
        problem: dict[str, Any] = json.loads(reply.content)
        assert problem["status"] == status
