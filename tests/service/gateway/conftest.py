"""A real gateway on free ports over a real queue, with a scripted worker in place of a model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway import jobs
from patchforge.service.gateway.app import Gateway
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, ScriptedWorker, running


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    """Free ports, frequent pings and a short drain."""
    return Settings(
        redis_url=queue_server.url, http_port=0, grpc_port=0, max_waiting=8, sse_ping_seconds=0.2, drain_seconds=1
    )


@pytest.fixture(autouse=True)
def asks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway knows an announcement as soon as it is made, not only when it has heard the news of it."""
    monkeypatch.setattr(jobs, "FLEET_SECONDS", 0.0)


@pytest.fixture
async def gateway(settings: Settings, queue: JobQueue) -> AsyncIterator[Gateway]:
    """A gateway without any worker."""
    async with running(Gateway(settings, queue)) as started:
        yield started


@pytest.fixture
async def worker(settings: Settings, queue: JobQueue) -> AsyncIterator[ScriptedWorker]:
    """A worker that has announced both models."""
    own = JobQueue.connect(settings.redis_url or "", settings)
    await own.announce("scripted", CARDS)
    scripted = ScriptedWorker(own)
    playing = asyncio.create_task(scripted.run())
    yield scripted
    playing.cancel()
    await asyncio.gather(playing, return_exceptions=True)
    await own.close()


@pytest.fixture
def url(gateway: Gateway) -> str:
    return f"http://127.0.0.1:{gateway.http_port}"


@pytest.fixture
async def http(url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
async def channel(gateway: Gateway) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> pb_grpc.ImageServiceStub:
    return pb_grpc.ImageServiceStub(channel)
