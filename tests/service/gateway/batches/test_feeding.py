"""A batch survives everything that happens to the gateways that feed it, and no line is drawn twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from patchforge.service.errors import Unavailable
from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.batches import feeder
from patchforge.service.queue import JobQueue, batches, keys
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.gateway.batches.kit import begin, drawn, results, until
from tests.service.gateway.harness import ScriptedWorker, running
from tests.service.queue.kit import eventually


@pytest.fixture(autouse=True)
def prompt_feeder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "BUSY_SECONDS", 0.02)
    monkeypatch.setattr(feeder, "IDLE_SECONDS", 0.02)
    monkeypatch.setattr(batches, "LEAD_MS", 50)


@pytest.fixture
async def other(settings: Settings, other_queue: JobQueue) -> AsyncIterator[Gateway]:
    """A second gateway."""
    async with running(Gateway(settings, other_queue)) as started:
        yield started


async def drawn_seeds(redis_client: Redis) -> Counter[int]:
    """How many jobs there are for each seed."""
    queue = [key async for key in redis_client.scan_iter(f"{keys.JOB}*")]
    seeds: Counter[int] = Counter()
    for key in queue:
        request = (await redis_client.hget(key, "request")).decode()
        seeds[int(request.partition('"seed":')[2].partition(",")[0])] += 1
    return seeds


async def test_without_batches_nobody_leads(
    http: httpx.AsyncClient, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, look = 0, JobQueue.open_batches

    async def watched_look(self: JobQueue) -> list[str]:
        nonlocal passes
        passes += 1
        return await look(self)

    async def twice() -> bool:
        return passes > 2

    monkeypatch.setattr(JobQueue, "open_batches", watched_look)
    await eventually(twice)
    assert not await redis_client.exists(keys.BATCH_LEADER)


async def test_gateways_that_all_feed_repeat_nothing(
    http: httpx.AsyncClient,
    other: Gateway,
    worker: ScriptedWorker,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if every gateway took itself for the leader, and none heard of the other."""

    async def leads(self: JobQueue, gateway: str) -> bool:
        return True

    monkeypatch.setattr(JobQueue, "lead_batches", leads)
    batch = await until(http, await begin(http, *(drawn(str(seed), seed=seed) for seed in range(60))))
    assert batch["request_counts"] == {"total": 60, "completed": 60, "failed": 0}
    assert await drawn_seeds(redis_client) == dict.fromkeys(range(60), 1)
    assert worker.played == 60


@pytest.mark.parametrize("heard", [False, True])
async def test_answers_that_get_lost_repeat_nothing(
    http: httpx.AsyncClient,
    worker: ScriptedWorker,
    redis_client: Redis,
    monkeypatch: pytest.MonkeyPatch,
    heard: bool,
) -> None:
    """Every third call for a batch fails, before or after the queue server has done what it asks."""
    calls = 0
    run = JobQueue._run

    async def lossy(self: JobQueue, command: str, *args: Any, **options: Any) -> Any:
        nonlocal calls
        lost = False
        if command in ("feed_line", "settle_line", "step_batch"):
            calls += 1
            lost = calls % 3 == 0
        if lost and not heard:
            raise Unavailable("the queue server cannot be reached")
        answer = await run(self, command, *args, **options)
        if lost:
            raise Unavailable("the queue server cannot be reached")
        return answer

    monkeypatch.setattr(JobQueue, "_run", lossy)
    lines = [drawn(str(seed), seed=seed, **({"steps": 0} if seed % 7 == 0 else {})) for seed in range(40)]
    batch = await until(http, await begin(http, *lines))
    refused = [str(seed) for seed in range(40) if seed % 7 == 0]
    assert batch["request_counts"] == {"total": 40, "completed": 34, "failed": 6}
    assert list(await results(http, batch, "error")) == refused
    assert len(await results(http, batch)) == worker.played == 34
    assert max((await drawn_seeds(redis_client)).values()) == 1
    assert calls > 60


async def test_any_gateway_serves_a_batch(
    http: httpx.AsyncClient, gateway: Gateway, other: Gateway, worker: ScriptedWorker
) -> None:
    """The one that took it stops in the middle."""
    worker.curtain.clear()
    batch = await begin(http, *(drawn(str(seed), seed=seed) for seed in range(60)))
    await worker.next_job()
    gateway.stop()
    worker.curtain.set()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{other.http_port}", timeout=PATIENCE) as elsewhere:
        ended = await until(elsewhere, batch)
        assert ended["request_counts"]["completed"] == 60
        made = await results(elsewhere, ended)
    for seed in range(60):
        assert made[str(seed)]["response"]["body"]["data"][0]["url"].startswith(f"http://127.0.0.1:{other.http_port}")
    assert worker.played == 60


async def test_jobs_that_vanish_do_not_hold_a_batch_up(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    worker.curtain.clear()
    batch = await begin(http, drawn("a"), drawn("b"))
    gone = await worker.next_job()
    await redis_client.delete(keys.job(gone))
    worker.curtain.set()
    ended = await until(http, batch)
    assert ended["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
    [line] = (await results(http, ended, "error")).values()
    assert line["error"]["code"] == "result_expired"


async def test_a_bug_that_one_line_meets_does_not_stop_the_others(
    http: httpx.AsyncClient, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = feeder.prepare_line

    async def broken(service: Any, line: Any) -> Any:
        if line.custom_id == "odd":
            raise RuntimeError("a bug")
        return await prepare(service, line)

    monkeypatch.setattr(feeder, "prepare_line", broken)
    ended = await until(http, await begin(http, drawn("a"), drawn("odd"), drawn("b")))
    assert list(await results(http, ended)) == ["a", "b"]
    assert (await results(http, ended, "error"))["odd"]["response"]["status_code"] == 500


async def test_a_long_batch_is_finalised_in_parts(
    http: httpx.AsyncClient, worker: ScriptedWorker, redis_client: Redis
) -> None:
    """All results expire together, however many there are."""
    lines = [drawn(str(seed), seed=seed) for seed in range(700)]
    ended = await until(http, await begin(http, *lines))
    made = await results(http, ended)
    assert len(made) == 700
    for name, line in made.items():
        assert line["response"]["body"]["data"][0]["b64_json"]
        for key in (keys.job(line["response"]["request_id"]), keys.images(line["response"]["request_id"])):
            assert 0 < await redis_client.ttl(key) <= 86400, name
    assert (await http.delete(f"/v1/batches/{ended['id']}")).status_code == 200
    assert not [key async for key in redis_client.scan_iter(f"{keys.JOB}*")]
