"""No job is taken twice, lost with its worker, or run for ever."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.messages.events import TERMINAL_EVENTS, Failed
from patchforge.service.messages.schemas import Job, JobStatus, Priority
from patchforge.service.queue import Claim, Heartbeat, JobQueue, keys
from patchforge.service.queue import connection as queue_redis
from patchforge.service.queue import work as queue_module
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.queue.kit import (
    DONE,
    a_card,
    a_preview,
    a_request,
    claimed,
    eventually,
    eventually_blocked,
    silenced,
    taken_over,
    watched,
)


class TestClaim:
    async def test_urgent_jobs_come_first_across_models(self, queue: JobQueue) -> None:
        order = [Priority.LOW, Priority.HIGH, Priority.NORMAL]
        for model in ("emoji", "digits"):
            for priority in order:
                await queue.submit(a_request(model=model, priority=priority))
        taken = [await queue.claim("w", ["digits", "emoji"], block_seconds=0) for _ in range(6)]
        priorities = [claim.job.request.priority for claim in taken if claim]
        assert priorities == [Priority.HIGH] * 2 + [Priority.NORMAL] * 2 + [Priority.LOW] * 2

    async def test_knows_what_only_workers_need(self, queue: JobQueue) -> None:
        await queue.submit(a_request(), degradable=True)
        await queue.submit(a_request())
        first = await queue.claim("w", ["emoji"], block_seconds=0)
        second = await queue.claim("w", ["emoji"], block_seconds=0)
        assert first is not None
        assert second is not None
        assert (first.job.degradable, second.job.degradable) == (True, False)
        assert first.job.claimed_at == first.job.started_at
        await queue.release(first)
        again = await queue.claim("w", ["emoji"], block_seconds=0)
        assert again is not None
        assert again.job.id == first.job.id
        assert again.job.degradable
        assert again.job.started_at == first.job.started_at
        assert (again.job.claimed_at or 0) > (first.job.claimed_at or 0)
        assert not {"degradable", "claimed_at"} & again.job.model_dump().keys(), "nobody else sees them"

    async def test_takes_only_models_asked_for(self, queue: JobQueue) -> None:
        await queue.submit(a_request(model="digits"))
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert await queue.claim("w", [], block_seconds=1) is None

    async def test_one_job_goes_to_one_worker(self, queue: JobQueue, other_queue: JobQueue) -> None:
        await queue.submit(a_request())
        claims = [side.claim(f"w{i}", ["emoji"], block_seconds=0) for i in range(5) for side in (queue, other_queue)]
        assert sum(claim is not None for claim in await asyncio.gather(*claims)) == 1

    async def test_a_waiting_worker_wakes_for_a_job(self, queue: JobQueue, other_queue: JobQueue) -> None:
        waiting = asyncio.create_task(other_queue.claim("w", ["emoji", "digits"], block_seconds=3600))
        await eventually_blocked(queue)
        job = await queue.submit(a_request(model="digits"))
        claim = await asyncio.wait_for(waiting, PATIENCE)
        assert claim is not None
        assert claim.job.id == job.id

    async def test_gets_past_any_number_of_cancelled_jobs(
        self, queue: JobQueue, settings: Settings, queue_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(20):
            await queue.cancel((await queue.submit(a_request())).id)
        job = await queue.submit(a_request())
        monkeypatch.setattr(queue_redis, "SKIPS", 3)
        worker = JobQueue.connect(queue_server.url, settings)
        claim = await worker.claim("w", ["emoji"], block_seconds=5)
        await worker.close()
        assert claim is not None
        assert claim.job.id == job.id

    async def test_gives_up_after_its_block_time(self, queue: JobQueue) -> None:
        began = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            assert await queue.claim("w", ["emoji"], block_seconds=0.2) is None
        assert time.monotonic() - began > 0.15

    async def test_survives_flushall(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.submit(a_request())
        lost = await claimed(queue)
        waiting = asyncio.create_task(queue.claim("w", ["emoji"], block_seconds=3600))
        await eventually_blocked(queue)
        await redis_client.flushall()
        job = await queue.submit(a_request())
        claim = await asyncio.wait_for(waiting, PATIENCE)
        assert claim is not None
        assert claim.job.id == job.id
        assert await queue.heartbeat(lost) is Heartbeat.LOST
        assert not await queue.finish(lost, DONE)
        assert await queue.reclaim("w", ["emoji"]) is None

    async def test_a_lost_group_neither_loses_nor_repeats_jobs(self, queue: JobQueue, redis_client: Redis) -> None:
        running = await queue.submit(a_request())
        claim = await claimed(queue)
        waiting = await queue.submit(a_request())
        await redis_client.xgroup_destroy(claim.stream, keys.GROUP)
        assert await queue.heartbeat(claim) is Heartbeat.OK
        second = await claimed(queue, "w2")
        assert second.job.id == waiting.id
        assert await queue.claim("w2", ["emoji"], block_seconds=0) is None
        assert await queue.finish(claim, DONE)
        assert await queue.finish(second, DONE)
        assert (await queue.get(running.id)).status is JobStatus.COMPLETED
        assert await redis_client.xlen(claim.stream) == 0

    async def test_a_lost_group_leaves_a_dead_workers_job_to_reclaim(
        self, queue: JobQueue, redis_client: Redis
    ) -> None:
        lost = await queue.submit(a_request())
        claim = await claimed(queue)
        await redis_client.xgroup_destroy(claim.stream, keys.GROUP)
        assert await queue.claim("w2", ["emoji"], block_seconds=0) is None
        again = await taken_over(queue, claim)
        assert (again.job.id, again.attempt) == (lost.id, 2)

    async def test_a_cancelled_wait_takes_nothing(self, queue: JobQueue) -> None:
        waiting = asyncio.create_task(queue.claim("w", ["emoji"], block_seconds=3600))
        await eventually_blocked(queue)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await queue.submit(a_request())
        assert (await claimed(queue)).attempt == 1

    async def test_whenever_a_claim_is_cancelled_no_job_is_stranded(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        for turns in range(12):
            claiming = asyncio.create_task(queue.claim("w", ["emoji"], block_seconds=0))
            for _ in range(turns):
                await asyncio.sleep(0)
            claiming.cancel()
            (result,) = await asyncio.gather(claiming, return_exceptions=True)
            if isinstance(result, Claim):
                await queue.release(result)
            assert (await queue.get(job.id)).status is JobStatus.WAITING
        assert (await claimed(queue)).attempt == 1


class TestHeartbeatAndReclaim:
    async def test_a_heartbeat_keeps_a_claim(self, queue: JobQueue, other_queue: JobQueue) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        for _ in range(3):
            await silenced(queue, claim)
            assert await queue.heartbeat(claim) is Heartbeat.OK
            assert await other_queue.reclaim("w2", ["emoji"]) is None

    async def test_a_claim_lasts_as_long_as_the_settings_say(
        self, queue: JobQueue, queue_server: EmbeddedServer
    ) -> None:
        """Uses the server's own idle times, unlike the other tests."""
        await queue.submit(a_request())
        claim = await claimed(queue)
        assert await queue.reclaim("w2", ["emoji"]) is None
        hasty = JobQueue.connect(queue_server.url, Settings(claim_idle_seconds=0.2))
        fresh = await eventually(lambda: hasty.reclaim("w2", ["emoji"]))
        await hasty.close()
        assert (fresh.job.id, fresh.attempt) == (claim.job.id, 2)

    async def test_a_silent_workers_job_is_taken_over_and_the_worker_refused(
        self, queue: JobQueue, other_queue: JobQueue
    ) -> None:
        job = await queue.submit(a_request())
        stale = await claimed(queue, "w1")
        fresh = await taken_over(other_queue, stale, "w2")
        assert (fresh.job.id, fresh.attempt, fresh.job.request) == (job.id, 2, job.request)
        assert fresh.job.started_at == stale.job.started_at
        assert await queue.reclaim("w3", ["emoji"]) is None

        assert await queue.heartbeat(stale) is Heartbeat.LOST
        assert not await queue.publish(stale, a_preview(1))
        assert not await queue.store_image(stale, 0, b"late")
        assert not await queue.finish(stale, DONE)
        assert not await queue.release(stale)

        assert await other_queue.heartbeat(fresh) is Heartbeat.OK
        assert await other_queue.finish(fresh, DONE)
        terminal = [event for _, event in await watched(queue, job.id) if isinstance(event, TERMINAL_EVENTS)]
        assert terminal == [DONE]

    async def test_a_worker_taking_its_own_job_over_refuses_its_older_self(self, queue: JobQueue) -> None:
        await queue.submit(a_request())
        stale = await claimed(queue)
        fresh = await taken_over(queue, stale, stale.worker_id)
        assert not await queue.finish(stale, DONE)
        assert await queue.finish(fresh, DONE)

    async def test_a_job_that_kills_workers_is_dead_lettered(
        self, queue: JobQueue, redis_client: Redis, ended: list[Job], settings: Settings
    ) -> None:
        poison = await queue.submit(a_request())
        claim = await claimed(queue)
        for attempt in range(2, settings.max_attempts + 1):
            claim = await taken_over(queue, claim)
            assert claim.attempt == attempt

        await silenced(queue, claim)
        assert await queue.reclaim("w", ["emoji"]) is None
        job = await queue.get(poison.id)
        assert [job] == ended
        assert job.status is JobStatus.FAILED
        assert job.error is not None
        assert job.error.code == "dead_letter"
        assert "3 attempts" in job.error.message
        letters: Any = await redis_client.xrange(keys.DEAD_LETTERS)
        assert [letter[b"job"].decode() for _, letter in letters] == [poison.id]
        assert not await queue.finish(claim, DONE)
        assert (await watched(queue, poison.id))[-1][1] == Failed(error=job.error)

    async def test_a_neighbour_of_a_dead_letter_is_still_taken_over(
        self, queue: JobQueue, ended: list[Job], settings: Settings
    ) -> None:
        poison = await queue.submit(a_request())
        claim = await claimed(queue)
        for _ in range(settings.max_attempts - 1):
            claim = await taken_over(queue, claim)
        neighbour = await queue.submit(a_request())
        beside = await claimed(queue)
        await silenced(queue, claim)
        fresh = await taken_over(queue, beside)
        assert (fresh.job.id, fresh.attempt) == (neighbour.id, 2)
        assert [job.id for job in ended] == [poison.id]

    async def test_a_cancelled_job_of_a_silent_worker_ends(self, queue: JobQueue, ended: list[Job]) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        await queue.cancel(claim.job.id)
        await silenced(queue, claim)
        assert await queue.reclaim("w", ["emoji"]) is None
        assert [job.id for job in ended] == [claim.job.id]
        assert (await queue.get(claim.job.id)).status is JobStatus.CANCELLED

    async def test_a_released_job_is_next_and_charged_nothing(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request(priority=Priority.LOW))
        claim = await claimed(queue)
        await queue.submit(a_request(priority=Priority.HIGH))
        assert await queue.release(claim)
        assert (await queue.get(job.id)).status is JobStatus.WAITING
        assert await queue.waiting() == {"emoji": 2}
        assert await queue.heartbeat(claim) is Heartbeat.LOST

        again = await claimed(queue)
        assert (again.job.id, again.attempt) == (job.id, 1)
        assert await queue.heartbeat(claim) is Heartbeat.LOST, "same worker, same attempt, but an older claim"
        assert await queue.finish(again, DONE)


class TestWorkersAnnounce:
    async def test_models_are_the_union_of_live_workers(self, queue: JobQueue, redis_client: Redis) -> None:
        assert await queue.models() == []
        await queue.announce("w1", [a_card("b"), a_card("c")])
        await queue.announce("w2", [a_card("a"), a_card("b")])
        assert await queue.models() == [a_card("a"), a_card("b"), a_card("c")]
        await queue.retire("w1")
        assert await queue.models() == [a_card("a"), a_card("b")]
        await redis_client.delete(keys.worker_models("w2"))  # as if it had expired
        assert await queue.models() == []

    async def test_announcements_expire(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.announce("w1", [a_card("a")])
        assert 0 < await redis_client.ttl(keys.worker_models("w1")) <= queue_module.ANNOUNCED
        await redis_client.zadd(keys.WORKERS, {"dead": 1.0})
        await queue.announce("w1", [a_card("a")])
        assert await redis_client.zcard(keys.WORKERS) == 1

    async def test_metrics_of_live_workers(self, queue: JobQueue) -> None:
        await queue.announce("w1", [])
        await queue.announce_metrics("w2", b"text")
        assert await queue.worker_metrics() == [("w2", b"text")]
