"""Whatever a stranger sends, the answer is a clear refusal, and the gateway is unharmed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults import http2
from tests.faults.gateway_kit import (
    APPLE,
    JSON,
    NO_JOB,
    Stage,
    answer_to,
    post,
    problem_of,
    raw,
    refusal,
    status_of,
    unharmed,
    until_closed,
)
from tests.faults.gateways import Gateway
from tests.patience import PATIENCE
from tests.processes import eventually
from tests.service.gateway.rpc.test_server import BAD_FIELDS, generate
from tests.service.gateway.test_validation import BAD_BODIES

SERVICE = "/patchforge.v1.ImageService"
SUBMITS = ("/v1/jobs", "/v1/images/generations")


# --- row 22 ---


def test_row_22_nonsense_in_requests(stage: Stage) -> None:
    """NaN, 1e999, surrogates, NUL, repeated keys, 5,000 digits, 100k nesting, bad UTF-8 …: 4xx, and never 500."""
    with unharmed(stage, refused=len(BAD_BODIES)) as gateway:
        for path in SUBMITS:
            for name, body, _ in BAD_BODIES:
                if path != SUBMITS[0] and name in ("null", "a prompt for a class model"):
                    continue  # valid in OpenAI's API
                answer = gateway.http.post(path, content=body, headers=JSON)
                assert 400 <= answer.status_code < 500, (path, name)
                assert len(answer.content) < 1000, (path, name)
        for headers, query in ODD_HEADERS_AND_QUERIES:
            answer = gateway.http.get(f"/v1/jobs/{NO_JOB}/image{query}", headers=headers)
            assert 400 <= answer.status_code < 500, (headers, query)
            answer = gateway.http.post(f"/v1/jobs{query}", content=b"{}", headers=headers)
            assert 400 <= answer.status_code < 500, (headers, query)
        for request in NO_HTTP:
            assert status_of(answer_to(gateway, request)) == 400, request[:60]
        with raw(gateway) as connection:
            connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
            assert status_of(connection.recv(1 << 16)) == 415
            connection.sendall(b"no chunk\r\n")
            until_closed(connection)


ODD_HEADERS_AND_QUERIES: list[tuple[list[tuple[bytes, bytes]], str]] = [
    ([(b"Idempotency-Key", b"\xff\xfe" * 200)], ""),
    ([(b"Content-Type", b"application/json; charset=\xff")], ""),
    ([(b"Content-Type", b"application/json"), (b"Content-Type", b"text/plain")], ""),
    ([(b"Content-Encoding", b"gzip"), (b"Content-Type", b"application/json")], ""),
    ([(b"If-None-Match", b'"' + b"x" * 10_000)], ""),
    ([(b"Accept", b"*/*;q=NaN")], ""),
    ([], "?index=" + "9" * 5000),
    ([], "?index=%00&index=%ff"),
    ([], "?index=1e999"),
    ([], "?" + "&".join(f"a{number}=1" for number in range(2000))),
    ([], "?index=NaN&%FF%FE=%80"),
]
NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no Host
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFFFFFFFFF\r\n",
    b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
]


def test_row_22_nonsense_in_grpc_requests(stage: Stage) -> None:
    with (
        unharmed(stage, refused=2 * len(BAD_FIELDS)) as gateway,
        gateway.grpc() as stub,
        grpc.insecure_channel(gateway.grpc_address) as channel,
    ):
        for fields, field in BAD_FIELDS:
            request = generate(**fields)
            calls = (
                lambda request: list(stub.GenerateImage(request)),
                lambda request: stub.SubmitJob(pb.SubmitJobRequest(generation=request.generation)),
            )
            for call in calls:
                assert refusal(call, request) == (grpc.StatusCode.INVALID_ARGUMENT, field)
        for method in ("SubmitJob", "GetJob", "CancelJob", "GetImage", "GenerateImage", "WatchJob"):
            for garbage in (b"\x0a\x02\xff\xfe", b"\x0a\x7f", b"\xff" * 100, b"\x0a" * 10_000, b"\x0b" * 50_000):
                code, _ = refusal(channel.unary_unary(f"{SERVICE}/{method}"), garbage)
                assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND), (method, garbage[:4])


# --- row 23 ---


@pytest.mark.parametrize("path", SUBMITS)
def test_row_23_sixty_megabytes(stage: Stage, path: str) -> None:
    """Large bodies, with a length or in chunks, for calls with and without a body: refused, and never stored."""

    def chunks() -> Iterator[bytes]:
        for _ in range(60 << 4):
            yield b" " * (1 << 16)

    with unharmed(stage, memory=16, refused=4) as gateway:
        for content in (b" " * (60 << 20), chunks()):
            assert gateway.http.post(path, content=content, headers=JSON).status_code == 413
        for content in (b" " * (60 << 20), chunks()):
            answer = gateway.http.request("GET", f"/v1/jobs/{NO_JOB}", content=content)
            assert answer.status_code in (404, 413)


HEAD = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
STALLED = [
    b"",
    b"POST /v1/jobs HT",
    HEAD[:-2],
    HEAD + b"Content-Length: 99\r\n\r\n{",
    HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
]
TRICKLING = [
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ",
    HEAD + b"Content-Length: 9999\r\n\r\n",
    b"GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n",  # a body that nobody reads
    b"POST /v1/nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 9999\r\n\r\n",
]


def test_row_23_slow_requests(stage: Stage) -> None:
    """Each slow client gets its 408, whichever part is slow. Single bytes gain no time. 300 clients disturb nobody."""
    with (
        stage.another_gateway(client_timeout_seconds=3) as hasty,
        unharmed(stage, hasty, refused=1) as gateway,
        ThreadPoolExecutor(10) as pool,
        ExitStack() as connections,
    ):
        crowd = []
        for _ in range(300):
            crowd.append(connections.enter_context(raw(gateway)))
            crowd[-1].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-")
        stalled = pool.map(lambda sent: status_of(answer_to(gateway, sent)), STALLED)
        trickling = [pool.submit(trickle_until_hung_up_on, gateway, request) for request in TRICKLING]
        assert gateway.http.get("/readyz").status_code == 200
        assert {status_of(until_closed(slow)) for slow in crowd} == {408}
        assert list(stalled) == [408] * len(STALLED)
        for ended in trickling:
            ended.result()


def trickle_until_hung_up_on(gateway: Gateway, request: bytes) -> None:
    with raw(gateway) as connection:
        connection.sendall(request)
        connection.settimeout(0.1)
        give_up = time.monotonic() + PATIENCE
        with suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < give_up:
                connection.sendall(b"x")
                with suppress(TimeoutError):
                    if not connection.recv(1 << 16):
                        return
            raise AssertionError(f"it still listens to {request!r}")


# --- row 24 ---

HUGE: list[tuple[dict[str, Any], str]] = [
    ({"n": 10**9}, "n"),
    ({"n": 2**31 - 1}, "n"),
    ({"steps": 10**9}, "steps"),
    ({"steps": 201}, "steps"),
    ({"prompt": "x" * 900_000}, "prompt"),
    ({"sampler": {"name": "dual_loop", "inner_steps": 10**9}}, "sampler.inner_steps"),
    ({"seed": 2**64}, "seed"),
    ({"guidance": 1e300}, "guidance"),
    ({"deadline_seconds": 1e300}, "deadline_seconds"),
]
HUGE_SIZES = ["1000000x1000000", "4096x4096", "99999999999999999999x1", "99999x1"]


def test_row_24_giant_requests(stage: Stage) -> None:
    """These fail before anything is allocated or queued: with 422, or with 400 in OpenAI's API."""
    with unharmed(stage, memory=16, refused=2 * len(HUGE) + len(HUGE_SIZES)) as gateway:
        for fields, field in HUGE:
            answer = gateway.post(APPLE | fields)
            assert (answer.status_code, answer.json()["field"]) == (422, field), field
            answer = gateway.http.post("/v1/images/generations", json=APPLE | fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), field
        for size in HUGE_SIZES:
            assert gateway.post(APPLE | {"size": size}).json()["field"] == "size", "there is no such field"
            answer = gateway.http.post("/v1/images/generations", json=APPLE | {"size": size})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "size"), size
        with gateway.grpc() as stub:
            for fields in ({"n": 10**9}, {"steps": 10**9}, {"prompt": "x" * 900_000}):
                request = pb.SubmitJobRequest(generation=generate(**fields).generation)
                assert refusal(stub.SubmitJob, request) == (grpc.StatusCode.INVALID_ARGUMENT, *fields)


# --- row 25 ---

ODD_NAMES = [
    "../../etc/passwd",
    "..%2f..%2fetc%2fpasswd",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cboot.ini",
    "tiny-text%00.png",
    "tiny-text%2f..%2ftiny-class",
    "%c0%ae%c0%ae%c0%af",
    "tiny-text%0d%0aX-Injected:%201",
    "TINY-TEXT",
    ".",
    "*",
    "%F0%9F%98%80",
]


def test_row_25_names_that_are_paths(stage: Stage) -> None:
    """Names come from a list. Other names are not found, in paths, bodies and over gRPC."""
    job = stage.gateway.submit(APPLE)
    stage.gateway.ended(job)
    with unharmed(stage, refused=2 * len(ODD_NAMES)) as gateway, gateway.grpc() as stub:
        for name in ODD_NAMES:
            for path in (
                f"/v1/models/{name}",
                f"/v1/jobs/{name}/image",
                f"/v1/jobs/{name}/events",
                f"/v1/jobs/{job}/{name}",
                f"/playground/{name}",
            ):
                answer = answer_to(gateway, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                assert status_of(answer) in (404, 405), path
                assert b"root:" not in answer
                assert b"X-Injected" not in answer.partition(b"\r\n\r\n")[0]
        plain = [httpx.URL(f"http://x/{name}").path[1:] for name in ODD_NAMES] + ["a\0b", "../tiny-text"]
        for name in plain:
            for path in SUBMITS:
                body = json.dumps(APPLE | {"model": name}).encode()
                if name or path == SUBMITS[0]:  # to OpenAI's API, an empty name is none
                    assert status_of(answer_to(gateway, post(path, body))) == 404, name
            request = pb.SubmitJobRequest(generation=generate(model=name).generation)
            if name:  # without a name, the request goes to the default model
                assert refusal(stub.SubmitJob, request)[0] is grpc.StatusCode.NOT_FOUND, name
            assert refusal(stub.GetJob, pb.GetJobRequest(job_id=name))[0] is grpc.StatusCode.NOT_FOUND, name
        for index in ("-1", "10", "../0", "%00", "0%00"):
            target = f"GET /v1/jobs/{job}/image?index={index} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            assert status_of(answer_to(gateway, target.encode())) == 422, index
        assert gateway.http.get(f"/v1/jobs/{job}/image?index=9").status_code == 404
        assert problem_of(answer_to(gateway, post("/v1/jobs", b'{"prompt": "x", "model": "../x"}')))["field"] == "model"


# --- row 26 ---


def test_row_26_oversize_messages_and_metadata(stage: Stage) -> None:
    with unharmed(stage) as gateway, gateway.grpc() as stub:
        large = pb.SubmitJobRequest(idempotency_key="x" * (9 << 20))
        assert refusal(stub.SubmitJob, large)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        metadata = [("x-padding", "x" * (20 << 10))]
        code, _ = refusal(stub.ListModels, pb.ListModelsRequest(), metadata=metadata)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.ListModels(pb.ListModelsRequest()).models


def test_row_26_compression_bombs(stage: Stage) -> None:
    """A hundred kilobytes that unpack to a hundred megabytes."""
    with unharmed(stage, memory=32) as gateway, gateway.grpc() as stub:
        bomb = pb.SubmitJobRequest(idempotency_key="0" * (100 << 20))
        code, _ = refusal(stub.SubmitJob, bomb, compression=grpc.Compression.Gzip)
        assert code in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED)


def test_row_26_ping_flood(stage: Stage) -> None:
    """The flooding client is told to stop and is disconnected. Other clients notice nothing."""
    with unharmed(stage) as gateway:
        assert eventually(lambda: goodbye_to_a_flood(gateway)) == http2.ENHANCE_YOUR_CALM


def goodbye_to_a_flood(gateway: Gateway) -> int | None:
    """Returns the given reason; None if it was lost, for example because another ping made the kernel reset."""
    with (
        http2.Connection(gateway.grpc_address, PATIENCE) as client,
        ThreadPoolExecutor(1) as pool,
        suppress(ConnectionError),
    ):
        client.call(f"{SERVICE}/ListModels", b"")
        pool.submit(flood, client)
        goodbye = next((frame for frame in client.frames() if frame.kind == http2.GOAWAY), None)
        assert gateway.http.get("/readyz").status_code == 200
        client.close()
        return goodbye and int.from_bytes(goodbye.payload[4:8], "big")
    return None


def flood(client: http2.Connection) -> None:
    with suppress(OSError):  # until either side has closed
        while True:
            client.ping()
