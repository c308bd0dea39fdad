"""The queue's promises to its callers, on a real server: one terminal event for each accepted job."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import IdempotencyConflict, NotFound, NotReady, QueueFull, Unavailable
from patchforge.service.messages.events import Cancelled, Failed, ImageReady, Queued, Started
from patchforge.service.messages.schemas import Job, JobError, JobStatus, Priority
from patchforge.service.queue import Heartbeat, JobQueue, connection, keys
from patchforge.service.settings import Settings
from tests.service.queue.kit import (
    DONE,
    REPORT,
    UNKNOWN,
    a_preview,
    a_request,
    claimed,
    eventually,
    overdue,
    watched,
)


class TestLifeOfAJob:
    async def test_runs_from_submit_to_completed(self, queue: JobQueue, ended: list[Job]) -> None:
        request = a_request(n=2)
        job = await queue.submit(request)
        assert (job.status, job.request, job.attempt) == (JobStatus.WAITING, request, 0)
        assert await queue.waiting() == {"emoji": 1}
        with pytest.raises(NotReady):
            await queue.image(job.id, 0)

        claim = await claimed(queue)
        assert (claim.job.id, claim.job.status, claim.attempt) == (job.id, JobStatus.RUNNING, 1)
        assert claim.job.started_at is not None
        assert claim.job.started_at >= job.created_at
        assert await queue.waiting() == {}
        assert await queue.publish(claim, Started(attempt=1, steps=4))
        assert await queue.store_image(claim, 0, b"\x89PNG\x00")
        assert await queue.image(job.id, 0) == b"\x89PNG\x00"
        assert await queue.heartbeat(claim) is Heartbeat.OK
        assert await queue.finish(claim, DONE)

        job = await queue.get(job.id)
        assert (job.status, job.report) == (JobStatus.COMPLETED, REPORT)
        assert job.finished_at is not None
        events = [event for _, event in await watched(queue, job.id)]
        assert events == [Queued(), Started(attempt=1, steps=4), ImageReady(index=0), DONE]
        assert ended == [], "the worker itself knows of jobs it finished"

    async def test_ends_only_once(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        failed = Failed(error=JobError(code="nan", message="not a number"))
        assert await queue.finish(claim, failed)
        assert not await queue.finish(claim, DONE)
        assert not await queue.publish(claim, a_preview(1))
        assert not await queue.store_image(claim, 0, b"late")
        assert not await queue.release(claim)
        assert await queue.heartbeat(claim) is Heartbeat.LOST
        assert (await queue.get(job.id)).error == failed.error
        assert [event for _, event in await watched(queue, job.id)] == [Queued(), failed]

    async def test_no_event_but_the_end_itself_may_say_that_it_ended(self, queue: JobQueue) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        with pytest.raises(TypeError, match="use finish"):
            await queue.publish(claim, DONE)
        assert await queue.heartbeat(claim) is Heartbeat.OK

    async def test_leaves_nothing_without_an_expiry(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request(), idempotency_key="k")
        claim = await claimed(queue)
        await queue.store_image(claim, 0, b"x")
        await queue.finish(claim, DONE)
        assert await redis_client.xlen(claim.stream) == 0
        assert (await redis_client.xpending(claim.stream, keys.GROUP))["pending"] == 0
        for key in (keys.job(job.id), keys.events(job.id), keys.images(job.id), keys.idempotency("k")):
            assert await redis_client.ttl(key) > 0
        left = {key.decode() async for key in redis_client.scan_iter()}
        assert all(key.startswith(keys.TAG) for key in left)
        lasting = {*queue._list_streams(["emoji"]), keys.STREAMS}
        assert {key for key in left if await redis_client.ttl(key) < 0} <= lasting

    async def test_unknown_jobs_and_pictures(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        for job_id in (UNKNOWN, "", "../x", "\ud800", UNKNOWN.lower() + "\n"):
            for call in (queue.get(job_id), queue.cancel(job_id), queue.image(job_id, 0), watched(queue, job_id)):
                with pytest.raises(NotFound):
                    await call
        for index in (-1, 1, 10**9):
            with pytest.raises(NotFound):
                await queue.image(job.id, index)


class TestSubmit:
    async def test_parallel_submits_with_one_key_are_one_job(self, queue: JobQueue, redis_client: Redis) -> None:
        jobs = await asyncio.gather(*(queue.submit(a_request(), idempotency_key="k") for _ in range(20)))
        assert len({job.id for job in jobs}) == 1
        assert await redis_client.xlen(keys.queue("emoji", Priority.NORMAL)) == 1

    async def test_a_repeated_call_of_the_script_queues_once(self, queue: JobQueue, redis_client: Redis) -> None:
        body = a_request().model_dump_json()
        for _ in range(2):
            await queue._run(
                "submit", UNKNOWN, "emoji", Priority.NORMAL.value, body, "", "", "fingerprint", "", 1, "", 1, "", 0, ""
            )
        assert await redis_client.xlen(keys.queue("emoji", Priority.NORMAL)) == 1
        assert await redis_client.xlen(keys.events(UNKNOWN)) == 1

    async def test_a_key_used_for_another_request_is_refused(self, queue: JobQueue) -> None:
        await queue.submit(a_request(), idempotency_key="k")
        with pytest.raises(IdempotencyConflict):
            await queue.submit(a_request(seed=2), idempotency_key="k")
        assert await queue.waiting() == {"emoji": 1}

    async def test_the_fingerprint_decides_what_is_another_request(self, queue: JobQueue) -> None:
        first = await queue.submit(a_request(seed=1), idempotency_key="k", fingerprint="no seed given")
        again = await queue.submit(a_request(seed=2), idempotency_key="k", fingerprint="no seed given")
        assert again == first

    async def test_the_place_in_a_trace_travels_with_the_job_unseen_and_makes_no_other_request(
        self, queue: JobQueue
    ) -> None:
        here = {"traceparent": f"00-{1:032x}-{2:016x}-01", "tracestate": "vendor=1"}
        job = await queue.submit(a_request(), idempotency_key="k", trace=here)
        again = await queue.submit(a_request(), idempotency_key="k", trace={"traceparent": f"00-{3:032x}-{4:016x}-01"})
        assert (again.id, again.trace) == (job.id, here)
        assert (await claimed(queue)).job.trace == here
        assert "trace" not in (await queue.get(job.id)).model_dump_json()
        assert (await queue.submit(a_request())).trace == {}

    async def test_a_key_outlives_the_end_of_its_job(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request(), idempotency_key="k")
        await queue.finish(await claimed(queue), DONE)
        again = await queue.submit(a_request(), idempotency_key="k")
        assert (again.id, again.status) == (job.id, JobStatus.COMPLETED)

    async def test_the_cap_holds_under_parallel_submits(
        self, queue: JobQueue, other_queue: JobQueue, settings: Settings
    ) -> None:
        calls = [side.submit(a_request(model=f"m{i % 3}")) for i in range(50) for side in (queue, other_queue)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        accepted = [result for result in results if isinstance(result, Job)]
        refused = [result for result in results if isinstance(result, QueueFull)]
        assert (len(accepted), len(refused)) == (settings.max_waiting, 100 - settings.max_waiting)
        assert sum((await queue.waiting()).values()) == settings.max_waiting
        assert all(error.retry_after for error in refused)

    async def test_a_place_is_freed_once_by_each_way_out(self, queue: JobQueue, settings: Settings) -> None:
        jobs = [await queue.submit(a_request()) for _ in range(settings.max_waiting)]
        for _ in range(3):
            await queue.cancel(jobs[0].id)
        claim = await claimed(queue)
        await queue.finish(claim, DONE)
        await queue.finish(claim, DONE)
        for _ in range(2):
            await queue.submit(a_request())
        with pytest.raises(QueueFull):
            await queue.submit(a_request())

    async def test_overdue_jobs_hold_no_place(self, queue: JobQueue, settings: Settings) -> None:
        for _ in range(settings.max_waiting):
            await queue.submit(a_request(deadline_seconds=600))
        with pytest.raises(QueueFull):
            await queue.submit(a_request())
        await overdue(queue)
        await queue.submit(a_request())
        assert await queue.waiting() == {"emoji": 1}

    async def test_a_paused_server_gives_503_and_one_job_after_the_retry(
        self,
        queue_server: EmbeddedServer,
        queue: JobQueue,
        settings: Settings,
        redis_client: Redis,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(connection, "COMMAND_TIMEOUT", 0.5)
        hasty = JobQueue.connect(queue_server.url, settings)
        await redis_client.config_resetstat()
        os.kill(queue_server.pid, signal.SIGSTOP)
        try:
            tries = (hasty.submit(a_request(), idempotency_key="k") for _ in range(40))  # more than connections
            results = await asyncio.gather(*tries, return_exceptions=True)
            assert {type(result) for result in results} == {Unavailable}
        finally:
            os.kill(queue_server.pid, signal.SIGCONT)
            await hasty.close()
        await queue.submit(a_request(), idempotency_key="k")
        assert await redis_client.xlen(keys.queue("emoji", Priority.NORMAL)) == 1
        sent = (await redis_client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        assert sent <= 40 + 2, "they were tried again and again"  # the last one may have had to send the script too

    async def test_a_full_server_refuses_new_work_and_finishes_the_old(
        self, queue: JobQueue, redis_client: Redis
    ) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        await redis_client.config_set("maxmemory", "1mb")
        try:
            with pytest.raises(Unavailable):
                await queue.submit(a_request())
            assert await queue.heartbeat(claim) is Heartbeat.OK
            assert await queue.store_image(claim, 0, b"x" * 100_000)
            assert await queue.finish(claim, DONE)
        finally:
            await redis_client.config_set("maxmemory", "1gb")
        assert (await queue.get(job.id)).status is JobStatus.COMPLETED


class TestCancelAndDeadline:
    async def test_a_waiting_job_ends_at_once(self, queue: JobQueue, ended: list[Job], redis_client: Redis) -> None:
        job = await queue.submit(a_request())
        cancelled = await queue.cancel(job.id)
        assert cancelled.status is JobStatus.CANCELLED
        assert await queue.cancel(job.id) == cancelled
        assert ended == [cancelled]
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert await redis_client.xlen(keys.queue("emoji", Priority.NORMAL)) == 0
        assert [event for _, event in await watched(queue, job.id)] == [Queued(), Cancelled()]

    async def test_a_running_job_hears_of_it_by_heartbeat(self, queue: JobQueue, ended: list[Job]) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        assert (await queue.cancel(job.id)).status is JobStatus.RUNNING
        assert await queue.heartbeat(claim) is Heartbeat.CANCELLED
        assert await queue.finish(claim, Cancelled())
        assert (await queue.cancel(job.id)).status is JobStatus.CANCELLED
        assert ended == []

    async def test_a_cancelled_job_that_is_released_ends(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        await queue.cancel(job.id)
        assert await queue.release(claim)
        assert (await queue.get(job.id)).status is JobStatus.CANCELLED

    async def test_cancel_racing_completion_ends_the_job_once(self, queue: JobQueue, other_queue: JobQueue) -> None:
        for _ in range(20):
            job = await queue.submit(a_request())
            claim = await claimed(queue)
            await asyncio.gather(queue.finish(claim, DONE), other_queue.cancel(job.id), other_queue.cancel(job.id))
            events = [event for _, event in await watched(queue, job.id)]
            assert events == [Queued(), DONE]

    async def test_an_overdue_job_expires_at_the_next_look_at_the_server(
        self, queue: JobQueue, redis_client: Redis
    ) -> None:
        """Without workers, nobody runs a script."""
        job = await queue.submit(a_request(deadline_seconds=0.05))
        later = await queue.submit(a_request(deadline_seconds=3600))

        async def expired() -> bool:
            await queue.check_server()
            return await redis_client.hget(keys.job(job.id), "status") == b"expired"

        await eventually(expired)
        assert await redis_client.hget(keys.job(later.id), "status") == b"waiting"

    async def test_an_overdue_job_expires_and_never_runs(self, queue: JobQueue, ended: list[Job]) -> None:
        job = await queue.submit(a_request(deadline_seconds=0.1))
        events = [event async for _, event in queue.watch(job.id)]
        assert [event.type for event in events] == ["queued", "expired"]
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert [job.status for job in ended] == [JobStatus.EXPIRED]
        assert await queue.waiting() == {}

    async def test_the_deadline_is_for_the_start_only(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request(deadline_seconds=600))
        claim = await claimed(queue)
        await overdue(queue)
        assert await queue.heartbeat(claim) is Heartbeat.OK
        assert await queue.release(claim)
        assert await queue._do("ZSCORE", keys.WAITING, f"{job.id}:emoji") == float("inf")
        again = await claimed(queue)
        assert again.job.id == job.id


class TestServer:
    async def test_a_server_that_evicts_is_refused(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.check_server()
        await redis_client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            with pytest.raises(Unavailable, match="noeviction"):
                await queue.check_server()
        finally:
            await redis_client.config_set("maxmemory-policy", "noeviction")

    async def test_a_server_too_old_for_the_script_is_refused(
        self, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def info(*commands: tuple[str, ...]) -> list[Any]:
            about = {"redis_version": "6.0.16", "maxmemory_policy": "noeviction", "master_replid": "a"}
            return [about, [None, None], 0]

        monkeypatch.setattr(queue, "_do_together", info)
        with pytest.raises(Unavailable, match=r"not Redis 6\.0\.16"):
            await queue.check_server()

    async def test_no_server(self, settings: Settings) -> None:
        queue = JobQueue.connect("redis://127.0.0.1:1/0", settings)
        for call in (queue.ping(), queue.models(), queue.get(UNKNOWN), queue.claim("w", ["m"], block_seconds=1)):
            with pytest.raises(Unavailable):
                await call
        await queue.close()
