"""Metrics of the queue and the workers in a scrape of the gateway."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.harness import CARDS, ScriptedWorker, running
from tests.service.queue.kit import a_request

WORKERS_OWN = (
    b"# HELP patchforge_patch_evaluations_total .\n# TYPE patchforge_patch_evaluations_total counter\n"
    b"patchforge_patch_evaluations_total 32.0\n"
)


async def scraped(http: httpx.AsyncClient, **params: str) -> dict[tuple[str, ...], float]:
    """The value of each sample by its name and label values."""
    reply = await http.get("/metrics", params=params)
    assert reply.status_code == 200
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


async def test_the_queue_and_its_workers(http: httpx.AsyncClient, queue: JobQueue, settings: Settings) -> None:
    await queue.announce("one", CARDS)
    await queue.announce("two", CARDS[:1])
    await queue.submit(a_request(model="tiny-text"))
    await queue.submit(a_request(model="nobody's"))
    seen = await scraped(http)
    assert seen["patchforge_queue_up", "0"] == 1
    assert seen["patchforge_queue_capacity",] == settings.max_waiting
    assert seen["patchforge_queue_memory_bytes", "0"] > 100_000
    assert seen["patchforge_queue_memory_limit_bytes", "0"] >= seen["patchforge_queue_memory_bytes", "0"]
    assert seen["patchforge_workers",] == 2
    for model, waiting, workers in (("tiny-text", 1, 2), ("tiny-class", 0, 1), ("nobody's", 1, 0)):
        assert seen["patchforge_requests_waiting", model] == waiting
        assert seen["patchforge_model_workers", model] == workers
        assert (seen["patchforge_queue_oldest_seconds", model] > 0) == (waiting > 0)


async def test_the_age_is_of_the_longest_waiting_job(queue: JobQueue, redis_client: Redis) -> None:
    first, _ = [await queue.submit(a_request()) for _ in range(2)]
    await redis_client.hset(f"{{patchforge}}:job:{first.id}", "created_at", first.created_at - 1000)
    assert 1000 <= (await queue.oldest_waiting())["emoji"] < 2000
    await queue.cancel(first.id)
    assert 0 <= (await queue.oldest_waiting())["emoji"] < 1000


async def test_a_job_deleted_by_hand_has_no_age(queue: JobQueue, redis_client: Redis) -> None:
    job = await queue.submit(a_request())
    await redis_client.delete(f"{{patchforge}}:job:{job.id}")
    assert await queue.oldest_waiting() == {}


async def test_workers_are_left_to_a_scrape_of_their_own(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    await worker.queue.announce_metrics("scripted", WORKERS_OWN)
    assert (await scraped(http, workers="true"))["patchforge_patch_evaluations_total",] == 32
    for alone in (await scraped(http), await scraped(http, workers="false")):
        assert ("patchforge_patch_evaluations_total",) not in alone
        assert alone["patchforge_workers",] == 1
    assert (await http.get("/metrics", params={"workers": "some"})).status_code == 422


async def test_a_long_scrape_keeps_nobody_waiting(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def slow(*_: object) -> bytes:
        begun.set()
        may_end.wait(PATIENCE)
        return b""

    monkeypatch.setattr(GatewayMetrics, "exposition", slow)
    scraping = asyncio.create_task(http.get("/metrics"))
    assert await asyncio.to_thread(begun.wait, PATIENCE)
    try:
        assert (await http.get("/healthz")).status_code == 200
        assert not scraping.done()
    finally:
        may_end.set()
    assert (await scraping).status_code == 200


async def test_a_queue_that_is_away(settings: Settings, tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    with server:
        queue = JobQueue.connect(server.url, settings)
    async with running(Gateway(settings, queue)) as gateway, httpx.AsyncClient(timeout=PATIENCE) as http:
        http.base_url = f"http://127.0.0.1:{gateway.http_port}"
        seen = await scraped(http)
    await queue.close()
    assert seen["patchforge_queue_up", "0"] == 0
    assert math.isnan(seen["patchforge_workers",])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_gateways_own_memory(http: httpx.AsyncClient) -> None:
    assert (await scraped(http))["process_resident_memory_bytes",] > 10e6
