"""A gateway over two queue servers, as its callers see it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.auth import make_entry
from patchforge.service.gateway.batches import feeder
from patchforge.service.queue import ShardedQueue, connect, connect_all
from patchforge.service.queue.ids import server_of
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.batches.kit import begin, drawn, results, until
from tests.service.gateway.harness import CARDS, ScriptedWorker, png, running

TENANTS = [f"tenant-{number}" for number in range(6)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[EmbeddedServer]]:
    with ExitStack() as stack:
        yield [stack.enter_context(EmbeddedServer(tmp_path_factory.mktemp("server"))) for _ in range(2)]


@pytest.fixture
def settings(servers: list[EmbeddedServer]) -> Settings:
    return Settings(
        redis_urls=[server.url for server in servers],
        http_port=0,
        grpc_port=0,
        drain_seconds=1,
        api_keys=[make_entry(name, name) for name in TENANTS],
    )


@pytest.fixture
async def whole(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ShardedQueue]:
    """The empty queue of the gateway, and a scripted worker on each server."""
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)
    queue = connect(settings)
    assert isinstance(queue, ShardedQueue)
    workers = connect_all(settings)
    playing = []
    for each in workers:
        await each._do("FLUSHALL")
        await each.announce("scripted", CARDS)
        playing.append(asyncio.create_task(ScriptedWorker(each).run()))
    yield queue
    for task in playing:
        task.cancel()
    await asyncio.gather(*playing, return_exceptions=True)
    await asyncio.gather(queue.close(), *(each.close() for each in workers))


@pytest.fixture
async def clients(settings: Settings, whole: ShardedQueue) -> AsyncIterator[list[httpx.AsyncClient]]:
    """A client of each tenant."""
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running(Gateway(settings, whole)))
        yield [
            await stack.enter_async_context(
                httpx.AsyncClient(
                    base_url=f"http://127.0.0.1:{gateway.http_port}",
                    headers={"Authorization": f"Bearer {name}"},
                    timeout=PATIENCE,
                )
            )
            for name in TENANTS
        ]


async def test_jobs_are_found_wherever_they_are(clients: list[httpx.AsyncClient]) -> None:
    http, stranger = clients[:2]
    body = {"model": "tiny-class", "class_label": "cat", "seed": 5}
    jobs = [(await http.post("/v1/jobs", json=body)).json()["id"] for _ in range(24)]  # chance chooses
    assert set(map(server_of, jobs)) == {0, 1}
    for job in jobs:
        events = (await http.get(f"/v1/jobs/{job}/events")).text
        assert events.count("event: completed") == 1
        url = f"/v1/jobs/{job}/image"
        assert (await http.get(url)).content == png(5)
        assert (await stranger.get(f"/v1/jobs/{job}")).status_code == 404
        assert (await http.delete(f"/v1/jobs/{job}")).status_code < 300
    assert (await http.get("/v1/jobs/70000000000000000000000000")).status_code == 404


async def test_a_retry_finds_its_job(clients: list[httpx.AsyncClient]) -> None:
    body = {"model": "tiny-class", "class_label": "cat"}
    for key in "abcdef":
        first, second = [
            (await clients[0].post("/v1/jobs", json=body, headers={"Idempotency-Key": key})).json()["id"] for _ in "12"
        ]
        assert first == second


async def test_each_server_feeds_its_batches(clients: list[httpx.AsyncClient]) -> None:
    begun = [await begin(http, *(drawn(f"{line}", seed=line) for line in range(3))) for http in clients]
    assert {server_of(batch["id"].removeprefix("batch_")) for batch in begun} == {0, 1}
    for http, batch in zip(clients, begun, strict=True):
        ended = await until(http, batch)
        assert ended["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
        assert list(await results(http, ended)) == ["0", "1", "2"]
        assert [each["id"] for each in (await http.get("/v1/batches")).json()["data"]] == [batch["id"]]
        assert (await http.delete(f"/v1/files/{ended['output_file_id']}")).status_code == 200


async def test_metrics_tell_servers_apart_and_count_workers_once(
    clients: list[httpx.AsyncClient], whole: ShardedQueue
) -> None:
    text = (await clients[0].get("/metrics")).text
    seen = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    up = {sample.labels["server"]: sample.value for sample in seen if sample.name == "patchforge_queue_up"}
    assert up == {"0": 1, "1": 1}
    assert [sample.value for sample in seen if sample.name == "patchforge_workers"] == [1]
