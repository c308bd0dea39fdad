"""Fixtures every test may use: a real queue server, started once, and an empty queue on it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.messages.schemas import Job
from patchforge.service.queue import JobQueue, connection, masters, work
from patchforge.service.results import store
from patchforge.service.settings import Settings
from tests.patience import PATIENCE

if TYPE_CHECKING:
    from patchforge.model.pipeline import Pipeline
    from tests.object_store import ObjectServer
    from tests.pretend_device import PretendDevice

# Everything that a test starts uses one thread by default, because the machine may be busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# And for the same reason, load must not change what a worker draws, unless a test is about that.
os.environ.setdefault("PATCHFORGE_DEGRADE", "false")

# Helpers contain asserts too; pytest must rewrite them to show the values.
pytest.register_assert_rewrite("tests.processes", "tests.faults", "tests.service", "tests.model", "tests.e2e")


@pytest.fixture(scope="session", autouse=True)
def unhurried() -> Iterator[None]:
    """In this process, announcements outlive every test, and a slow queue server does not count as down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(work, "ANNOUNCED", 3600)
        patch.setattr(connection, "COMMAND_TIMEOUT", PATIENCE)
        patch.setattr(masters, "SENTINEL_TIMEOUT", PATIENCE)
        patch.setattr(store, "TIMEOUT", timedelta(seconds=PATIENCE))
        patch.setattr(store, "CONNECT_TIMEOUT", timedelta(seconds=PATIENCE))
        yield


@pytest.fixture(scope="session")
def queue_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A real server for the whole test run."""
    with EmbeddedServer(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
async def redis_client(queue_server: EmbeddedServer) -> AsyncIterator[Redis]:
    """A plain client of the server, which is emptied first."""
    client = Redis.from_url(queue_server.url)
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def settings(queue_server: EmbeddedServer) -> Settings:
    """Settings that point at the server, with room for eight jobs."""
    return Settings(redis_url=queue_server.url, max_waiting=8)


@pytest.fixture
async def queue(queue_server: EmbeddedServer, redis_client: Redis, settings: Settings) -> AsyncIterator[JobQueue]:
    """An empty queue."""
    job_queue = JobQueue.connect(queue_server.url, settings)
    yield job_queue
    await job_queue.close()


@pytest.fixture
async def other_queue(queue_server: EmbeddedServer, settings: Settings, queue: JobQueue) -> AsyncIterator[JobQueue]:
    """The same queue seen from another process."""
    elsewhere = JobQueue.connect(queue_server.url, settings)
    yield elsewhere
    await elsewhere.close()


@pytest.fixture
def ended(queue: JobQueue) -> list[Job]:
    """Jobs that `queue` ended without a worker."""
    jobs: list[Job] = []
    queue.on_ended = jobs.append
    return jobs


@pytest.fixture(scope="session")
def object_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectServer]:
    """A real object store for the whole test run. A test that stops it starts it again."""
    from tests.object_store import ObjectServer

    with ObjectServer(tmp_path_factory.mktemp("objects")) as server:
        yield server


@pytest.fixture
def object_variables(object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The variables that name the object store, set here and for child processes."""
    for name, value in object_server.variables.items():
        monkeypatch.setenv(name, value)
    yield object_server.variables
    object_server.start()  # if the test stopped it and failed


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `tiny-class` (classes cat and dog) and `tiny-text`."""
    from tests.tiny_bundles import write_tiny_bundles

    root = tmp_path_factory.mktemp("bundles")
    write_tiny_bundles(root)
    return root


@pytest.fixture(scope="session")
def pipelines(bundle_dir: Path) -> dict[str, Pipeline]:
    """Both bundles, loaded on the CPU."""
    import torch

    from patchforge.model.pipeline import Pipeline

    cpu = torch.device("cpu")
    return {name: Pipeline.open(bundle_dir / name, cpu) for name in ("tiny-class", "tiny-text")}


@pytest.fixture
def pretend_device() -> Iterator[PretendDevice]:
    """A simulated second device, for one test."""
    from tests.pretend_device import PretendDevice

    with PretendDevice() as entered:
        yield entered
