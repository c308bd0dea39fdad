"""Addresses that a gateway listens on, and how it tells them."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
import structlog

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.addresses import reachable
from patchforge.service.gateway.app import Gateway
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import ScriptedWorker, running


def _has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture
async def everywhere(queue_server: EmbeddedServer, queue: JobQueue) -> AsyncIterator[tuple[Gateway, dict[str, str]]]:
    """A gateway on `::`, and the line that it logs."""
    settings = Settings(redis_url=queue_server.url, host="::", http_port=0, grpc_port=0, drain_seconds=1)
    with structlog.testing.capture_logs() as logged:
        async with running(Gateway(settings, queue)) as gateway:
            yield gateway, next(line for line in logged if line["event"] == "gateway is listening")


@pytest.mark.skipif(not _has_ipv6(), reason="there is no IPv6")
async def test_both_families(everywhere: tuple[Gateway, dict[str, str]], worker: ScriptedWorker) -> None:
    gateway, line = everywhere
    for host in ("127.0.0.1", "[::1]"):
        async with httpx.AsyncClient(timeout=PATIENCE) as http:
            assert (await http.get(f"http://{host}:{gateway.http_port}/healthz")).status_code == 200
        async with grpc.aio.insecure_channel(f"{host}:{gateway.grpc_port}") as channel:
            assert (await ImageServiceStub(channel).ListModels(pb.ListModelsRequest())).models
    assert line["http"] == f"http://localhost:{gateway.http_port}"
    assert line["grpc"] == f"localhost:{gateway.grpc_port}"
    async with httpx.AsyncClient(timeout=PATIENCE) as http:
        assert (await http.get(f"{line['http']}/healthz")).status_code == 200, "it can be clicked"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", "127.0.0.1:1"),
        ("0.0.0.0", "localhost:1"),
        ("::", "localhost:1"),
        ("::1", "[::1]:1"),
        ("fe80::1", "[fe80::1]:1"),
        ("example.org", "example.org:1"),
    ],
)
def test_addresses_for_a_client(host: str, expected: str) -> None:
    assert reachable(host, 1) == expected
