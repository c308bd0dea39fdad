"""Event streams: slow readers, idle streams, and streams whose gateway dies."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median

import grpc
import httpx
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults import http2
from tests.faults.gateway_kit import APPLE, NO_JOB, Stage, flat_memory, post, raw, refusals, until_closed
from tests.faults.gateways import Gateway, Seen
from tests.patience import PATIENCE
from tests.processes import eventually

WATCH = "/patchforge.v1.ImageService/WatchJob"
DROPPED = "disconnected a client that did not read its response"


# --- row 15 ---


def test_row_15_slow_readers(stage: Stage) -> None:
    """40 MB of previews do not pile up: fast readers see all, stopped ones are disconnected, late ones skip some."""
    with (
        ExitStack() as clients,
        stage.another_gateway(client_timeout_seconds=1) as hasty,
        stage.another_gateway(client_timeout_seconds=3600) as patient,
        flat_memory(hasty, 48),
        flat_memory(patient, 24),
    ):
        job = patient.submit(APPLE | {"prompt": "flood 400 100000 4"})
        for _ in range(10):
            clients.enter_context(stuck_sse_reader(hasty, job))
            clients.enter_context(stuck_grpc_reader(hasty, job))
        late = clients.enter_context(stuck_sse_reader(patient, job))
        healthy = stage.read_attentively(hasty, job)
        eventually(lambda: len(hasty.lines(DROPPED)) >= 20, "the stuck to be dropped")
        eventually(lambda: connections(hasty) == 1, "only our own connection to be left")
        text = until_closed(late).decode()

    assert [event.type for event in healthy] == ["queued", "started", *["preview"] * 400, "image", "completed"]
    assert [event.data["evaluation"] for event in healthy[2:-2]] == list(range(1, 401)), "undisturbed by the others"
    assert in_order(healthy)
    assert text.count("event: preview") < 200, "what the kernel holds on the way, and the newest"
    assert text.count("event: image") == text.count("event: completed") == 1


def test_row_15_a_dropped_grpc_reader_is_told(stage: Stage) -> None:
    """The official client, used in the wrong way: it learns why, and may return."""
    gateway = stage.gateway
    with (
        stage.another_gateway(client_timeout_seconds=1) as hasty,
        hasty.grpc() as stub,
        gateway.grpc() as elsewhere,
    ):
        watch = pb.WatchJobRequest(job_id=gateway.submit(APPLE | {"prompt": "flood 300 100000"}))
        call = stub.WatchJob(watch)
        hasty.wait_for(DROPPED, method=WATCH)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.ABORTED
        assert "too slow" in caught.value.details()
        assert [reply.event for reply in elsewhere.WatchJob(watch)][-1].WhichOneof("event") == "completed"
        hasty.await_metric(1, "patchforge_grpc_requests_total", method=WATCH, status="ABORTED")


def stuck_sse_reader(gateway: Gateway, job: str) -> socket.socket:
    """A client that requests the events, has almost no room for them, and does not read."""
    connection = raw(gateway, receive_buffer=4096)
    connection.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return connection


def stuck_grpc_reader(gateway: Gateway, job: str) -> http2.Connection:
    """A client that opens no window for the answer. It would still answer pings."""
    connection = http2.Connection(gateway.grpc_address, PATIENCE)
    connection.call(WATCH, pb.WatchJobRequest(job_id=job).SerializeToString())
    return connection


def connections(gateway: Gateway) -> int:
    """Returns the HTTP connections that the gateway has open."""
    port, established = f":{int(gateway.url.rpartition(':')[2]):04X}", "01"
    sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return sum(fields[1].endswith(port) and fields[3] == established for fields in sockets)


def in_order(events: list[Seen]) -> bool:
    places = [tuple(map(int, event.id.split("-"))) for event in events]
    return places == sorted(set(places))


# --- row 16 ---


def test_row_16_gateway_dies_mid_stream(own_stage: Stage) -> None:
    """All watchers continue at another gateway, miss no event, and see none twice."""
    dying, other = own_stage.gateway, own_stage.start_gateway()
    with other.grpc() as there, dying.grpc() as here:
        with own_stage.curtain_down():
            job = dying.submit(APPLE)
            over_sse, over_grpc = dying.follow(job), here.WatchJob(pb.WatchJobRequest(job_id=job))
            seen = [next(over_sse).id for _ in range(3)]
            heard = [next(over_grpc).event.id for _ in range(3)]
            dying.kill()
            with pytest.raises(httpx.TransportError):
                list(over_sse)
            with pytest.raises(grpc.RpcError) as caught:
                list(over_grpc)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        seen += [event.id for event in other.follow(job, seen[-1])]
        rest = there.WatchJob(pb.WatchJobRequest(job_id=job, after_event_id=heard[-1]))
        heard += [reply.event.id for reply in rest]
    whole = other.events(job)
    assert [event.type for event in whole][:3] == ["queued", "started", "preview"]
    assert whole[-1].type == "completed"
    assert seen == heard == [event.id for event in whole]
    assert list(other.follow(job, whole[-1].id)) == [], "after the end there is nothing"
    # An operator sees the streams that moved.
    streams = {"method": "GET", "route": "/v1/jobs/{job_id}/events", "status": "2xx"}
    other.await_metric(3, "patchforge_http_requests_total", **streams)
    other.await_metric(1, "patchforge_grpc_requests_total", method=WATCH, status="OK")


def test_row_16_a_trimmed_id_resumes_with_the_present_state(stage: Stage) -> None:
    """Of the missing events, previews are replaced by newer ones; all others are still there."""
    gateway = stage.gateway
    job = gateway.submit(APPLE | {"prompt": "flood 200 50000 1"})
    first = gateway.until(job, "preview")
    assert first.data["evaluation"] == 1
    stage.read_attentively(gateway, job)
    assert not [event for event in gateway.follow(job) if event.id == first.id], "its place was trimmed away"
    rest = list(gateway.follow(job, first.id))
    assert [event.type for event in rest] == ["preview", "image", "completed"]
    assert rest[0].data["evaluation"] == 200
    whole = list(gateway.follow(job))
    assert [event.type for event in whole] == ["queued", "started", "preview", "image", "completed"]


def test_row_16_garbage_ids_are_refused(stage: Stage) -> None:
    gateway = stage.gateway
    job = gateway.submit(APPLE)
    refused = refusals(gateway)
    garbage = [b"x", b"-1", b"1-", b"1-1-1", b"$", b"(1", b"9" * 400, b"\xff", b"0x1", b"1e3", b"latest", b"1 1"]
    for event_id in garbage:
        answer = gateway.http.get(f"/v1/jobs/{job}/events", headers=[(b"Last-Event-ID", event_id)])
        assert answer.status_code == 400, event_id
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["field"] == "Last-Event-ID"
    with gateway.grpc() as stub:
        for event_id in garbage:
            watch = pb.WatchJobRequest(job_id=job, after_event_id=event_id.decode("latin-1"))
            with pytest.raises(grpc.RpcError) as caught:
                list(stub.WatchJob(watch))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, event_id
            assert caught.value.details().startswith("after_event_id: ")
    assert gateway.http.get(f"/v1/jobs/{NO_JOB}/events", headers={"Last-Event-ID": "1-1"}).status_code == 404
    eventually(lambda: refusals(gateway) == refused + 2 * len(garbage) + 1, "all to be counted")


# --- row 17 ---


def test_row_17_idle_streams_have_heartbeats(stage: Stage) -> None:
    """Pings come every second here, or every one and a half; on a busy machine, some may be late."""
    for name, gaps in silences(stage, stage.gateway, beats=5).items():
        assert median(gaps) < DEFAULT, (name, gaps)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_row_17_idle_for_a_minute(stage: Stage) -> None:
    """With the default settings, no stream is silent for 15 seconds."""
    with stage.another_gateway(sse_ping_seconds=DEFAULT) as gateway:
        gaps = silences(stage, gateway, beats=6)
    assert max(max(each) for each in gaps.values()) < 15, gaps


DEFAULT = 10  # seconds between pings if nobody requests more


def silences(stage: Stage, gateway: Gateway, beats: int) -> dict[str, list[float]]:
    """Returns, for each kind of stream, the pauses in seconds before as many heartbeats, while its job is paused."""
    gaps: dict[str, list[float]] = {}

    def measure(name: str, arrivals: Iterator[object]) -> None:
        times = [time.monotonic()]
        for _ in range(beats):
            next(arrivals)
            times.append(time.monotonic())
        gaps[name] = [late - early for early, late in pairwise(times)]

    with stage.curtain_down(), ExitStack() as open_streams:
        job = gateway.submit(APPLE)
        gateway.until(job, "preview")
        streams: dict[str, Iterator[object]] = {
            "sse": sse_pings(open_streams, gateway, f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode()),
            "openai": sse_pings(
                open_streams,
                gateway,
                post("/v1/images/generations", b'{"prompt": "x", "model": "tiny-text", "stream": true}'),
            ),
            "grpc": grpc_pings(open_streams, gateway, job),
        }
        threads = [threading.Thread(target=measure, args=stream) for stream in streams.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert gaps.keys() == streams.keys(), "each had its heartbeats"
    assert not gateway.lines(DROPPED, path=f"/v1/jobs/{job}/events"), "an idle reader is not a slow one"
    return gaps


def sse_pings(stack: ExitStack, gateway: Gateway, request: bytes) -> Iterator[bytes]:
    """Yields the comments of an event stream."""
    connection = stack.enter_context(raw(gateway))
    connection.sendall(request)
    while chunk := connection.recv(1 << 16):
        if b": ping" in chunk:
            yield chunk


def grpc_pings(stack: ExitStack, gateway: Gateway, job: str) -> Iterator[http2.Frame]:
    connection = stack.enter_context(stuck_grpc_reader(gateway, job))
    for frame in connection.frames():
        if frame.kind == http2.PING and not frame.flags & http2.ACK:
            connection.send(http2.PING, http2.ACK, payload=frame.payload)
            yield frame
