"""A gateway says which of its accepted jobs a failover lost."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import httpx
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from patchforge.service.errors import Unavailable
from patchforge.service.gateway.app import Gateway
from patchforge.service.queue import JobQueue, keys
from patchforge.service.settings import Settings
from tests.service.gateway.harness import ScriptedWorker


async def test_a_job_that_the_next_master_lacks_is_told(
    gateway: Gateway,
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    redis_client: Redis,
) -> None:
    await gateway.tick()
    kept, lost = [(await http.post("/v1/jobs", json={"prompt": "apple"})).json()["id"] for _ in range(2)]
    await gateway.tick()
    assert "patchforge_jobs_lost_total 0.0" in (await http.get("/metrics")).text
    await redis_client.delete(keys.job(lost))
    # For a moment a replica of nobody, so that it becomes the master again, with another history.
    with capture_logs() as logs:
        await redis_client.replicaof("127.0.0.1", "1")
        await redis_client.replicaof("NO", "ONE")
        for _ in range(2):
            await gateway.tick()
    assert "patchforge_jobs_lost_total 1.0" in (await http.get("/metrics")).text
    assert [line for line in logs if line["log_level"] == "error"] == [
        {"job": lost, "event": "a failover lost an accepted job", "log_level": "error"}
    ]
    assert (await http.get(f"/v1/jobs/{kept}")).status_code == 200


async def test_a_tick_waits_once_for_an_absent_server(
    settings: Settings, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it asks first waits together."""
    gateway = Gateway(settings, queue)  # not started: it would tick beside this
    await gateway.tick()
    asked: list[object] = []
    waiting: set[int] = set()
    together: set[int] = set()

    async def silent(*command: object, **options: object) -> NoReturn:
        asked.append(command)
        waiting.add(number := len(asked))
        together.add(len(waiting))
        for _ in range(100):
            await asyncio.sleep(0)
        waiting.remove(number)
        raise Unavailable("the queue server cannot be reached")

    for call in ("_do", "_run"):
        monkeypatch.setattr(gateway.service.queue, call, silent)
    with capture_logs() as logs:
        await gateway.tick()
    assert max(together) == len(asked)
    assert [(line["event"], line["reason"]) for line in logs] == [("not ready", "the queue server cannot be reached")]
