"""A watcher sees every event once, in order, and never misses the last one."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import InvalidRequest, NotFound
from patchforge.service.messages.events import Event, ImageReady, Preview, Queued, Started
from patchforge.service.queue import Claim, JobQueue, keys
from patchforge.service.queue import watching as queue_module
from patchforge.service.queue.watching import BATCH
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.queue.kit import (
    DONE,
    UNKNOWN,
    a_preview,
    a_request,
    claimed,
    watched,
)


class TestWatch:
    async def test_replays_then_follows(
        self, queue: JobQueue, other_queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue_module, "POLL", 3600)  # so that only its bell wakes it
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        await queue.publish(claim, Started(attempt=1, steps=4))
        async with aclosing(other_queue.watch(job.id)) as events:
            assert (await anext(events))[1] == Queued()
            assert (await anext(events))[1] == Started(attempt=1, steps=4)
            for evaluation in range(3):
                following = asyncio.ensure_future(anext(events))
                await asyncio.sleep(0.02)  # time to find nothing and wait for its bell
                await queue.publish(claim, a_preview(evaluation))
                assert (await asyncio.wait_for(following, PATIENCE))[1] == a_preview(evaluation)
            await queue.finish(claim, DONE)
            assert (await anext(events))[1] == DONE
            with pytest.raises(StopAsyncIteration):
                await anext(events)

    async def test_resumes_anywhere_without_gap_or_duplicate(self, queue: JobQueue, other_queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        for evaluation in range(10):
            await queue.publish(claim, a_preview(evaluation))
        await queue.finish(claim, DONE)
        whole = await watched(queue, job.id)
        assert len(whole) == 12
        for place, (event_id, _) in enumerate(whole):
            assert await watched(other_queue, job.id, event_id) == whole[place + 1 :]

    @pytest.mark.parametrize("after", ["", "x", "-1", "1-", "1-2-3", "$", "(1", "٣", "1 ", "9" * 40, "0-0\n", "\ud800"])
    async def test_a_garbage_id_is_refused_at_once(self, queue: JobQueue, after: str) -> None:
        with pytest.raises(InvalidRequest) as refusal:
            queue.watch(UNKNOWN, after)
        assert refusal.value.field == "Last-Event-ID"

    @pytest.mark.parametrize("after", ["0", "1-1", "999999999999999"])
    async def test_the_terminal_event_comes_even_if_events_are_gone(
        self, queue: JobQueue, redis_client: Redis, after: str
    ) -> None:
        job = await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        await redis_client.delete(keys.events(job.id))
        ((event_id, event),) = await watched(queue, job.id, after)
        assert event == DONE
        assert await watched(queue, job.id, event_id) == []

    async def test_a_trimmed_place_goes_on_with_what_is_left(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        for evaluation in range(40):
            await queue.publish(claim, a_preview(evaluation, size=100_000))
        assert await redis_client.xlen(keys.events(job.id)) < 25
        await queue.finish(claim, DONE)
        events = [event for _, event in await watched(queue, job.id, "1-0")]
        assert events[-2:] == [a_preview(39, size=100_000), DONE]

    async def test_only_previews_are_ever_trimmed(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request(n=10))
        claim = await claimed(queue)
        await queue.publish(claim, Started(attempt=1, steps=4))
        for index in range(10):
            for evaluation in range(30):
                await queue.publish(claim, a_preview(evaluation, index=index, size=100_000))
            await queue.store_image(claim, index, b"x")
        assert await redis_client.xlen(keys.events(job.id)) < 25
        await queue.finish(claim, DONE)
        events = [event for _, event in await watched(queue, job.id)]
        images = [ImageReady(index=index) for index in range(10)]
        assert [e for e in events if not isinstance(e, Preview)] == [
            Queued(),
            Started(attempt=1, steps=4),
            *images,
            DONE,
        ]
        assert a_preview(29, index=9, size=100_000) in events

    async def test_a_reader_of_large_previews_gets_only_the_newest(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request(n=2))
        claim = await claimed(queue)
        for evaluation in range(12):
            await queue.publish(claim, a_preview(evaluation, index=evaluation % 2, size=60_000))
        await queue.finish(claim, DONE)
        newest = [a_preview(evaluation, index=evaluation % 2, size=60_000) for evaluation in (10, 11)]
        assert [event for _, event in await watched(queue, job.id)] == [Queued(), *newest, DONE]

    async def test_a_slow_reader_skips_stale_previews_only(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request(n=2))
        claim = await claimed(queue)
        async with aclosing(queue.watch(job.id)) as events:
            await anext(events)
            for evaluation in range(BATCH):
                await queue.publish(claim, a_preview(evaluation, index=evaluation % 2))
                if evaluation == 10:
                    await queue.store_image(claim, 0, b"x")
            rest = [event async for _, event in events if not await _finished_at(queue, claim, event)]
        assert rest[0] == ImageReady(index=0)
        assert sum(isinstance(event, Preview) for event in rest) < 5
        assert a_preview(BATCH - 1, index=1) in rest

    async def test_many_watchers_share_few_connections(
        self, queue: JobQueue, other_queue: JobQueue, redis_client: Redis
    ) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        watchers = [asyncio.create_task(watched(other_queue, job.id)) for _ in range(200)]
        for evaluation in range(5):
            await queue.publish(claim, a_preview(evaluation))
            await asyncio.sleep(0)
        assert (await redis_client.info("clients"))["connected_clients"] < 50
        await queue.finish(claim, DONE)
        whole = await watched(queue, job.id)
        assert all(seen == whole for seen in await asyncio.wait_for(asyncio.gather(*watchers), PATIENCE))

    async def test_a_lost_subscription_loses_no_event(
        self, queue: JobQueue, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue_module, "POLL", 0.1)
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        async with aclosing(queue.watch(job.id)) as events:
            await anext(events)
            await redis_client.client_kill_filter(_type="pubsub")
            await queue.finish(claim, DONE)
            assert (await asyncio.wait_for(anext(events), PATIENCE))[1] == DONE

    async def test_closing_at_any_moment_ends_the_listener(
        self, queue: JobQueue, queue_server: EmbeddedServer, settings: Settings
    ) -> None:
        job = await queue.submit(a_request())
        for turns in range(25):
            closing = JobQueue.connect(queue_server.url, settings)
            watching = asyncio.create_task(watched(closing, job.id))
            for _ in range(turns):
                await asyncio.sleep(0)
            watching.cancel()
            await asyncio.wait_for(asyncio.gather(watching, return_exceptions=True), PATIENCE)
            await asyncio.wait_for(closing.close(), PATIENCE)

    async def test_a_job_that_vanishes_is_reported(
        self, queue: JobQueue, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue_module, "POLL", 0.1)
        job = await queue.submit(a_request())
        async with aclosing(queue.watch(job.id)) as events:
            await anext(events)
            await redis_client.flushall()
            with pytest.raises(NotFound):
                await asyncio.wait_for(anext(events), PATIENCE)


async def _finished_at(queue: JobQueue, claim: Claim, event: Event) -> bool:
    """Ends the job after its last preview was seen. Returns False, so that the event counts."""
    if isinstance(event, Preview) and event.evaluation == BATCH - 1:
        await queue.finish(claim, DONE)
    return False
