"""What a job costs the queue server does not grow with the number of workers, or with how long it runs."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import PubSub

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import NotFound, Unavailable
from patchforge.service.messages.events import Cancelled, Completed, Started
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import Heartbeat, JobQueue, event_hub, keys, watching, work
from patchforge.service.queue import connection as queue_redis
from patchforge.service.queue.claims import finished, published, stored
from patchforge.service.queue.connection import _constants
from patchforge.service.queue.scripts import build_scripts
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.queue.kit import DONE, UNKNOWN, a_card, a_preview, a_request, claimed, eventually, silenced, watched


@pytest.fixture
def asked(queue: JobQueue, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The commands that `queue` sends outside scripts: a list for each round trip."""
    found: list[Any] = []
    do, do_together = queue._do, queue._do_together

    async def watched_do(*command: Any) -> Any:
        found.append([command])
        return await do(*command)

    async def watched_do_together(*commands: Any) -> Any:
        found.append(list(commands))
        return await do_together(*commands)

    monkeypatch.setattr(queue, "_do", watched_do)
    monkeypatch.setattr(queue, "_do_together", watched_do_together)
    return found


class TestBells:
    async def test_one_job_wakes_one_worker(
        self, queue: JobQueue, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(work, "LONGEST_BLOCK", PATIENCE)
        waiting = {asyncio.create_task(queue.wait_for_job(["emoji", "digits"], PATIENCE)) for _ in range(3)}
        await blocked(redis_client, 3)
        for left in (2, 1):
            await queue.submit(a_request())
            done, waiting = await asyncio.wait(waiting, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result() for task in done] == [keys.bell("emoji")]
            assert len(waiting) == left
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    async def test_nobody_wakes_for_a_job_that_was_taken(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.submit(a_request())
        first = await claimed(queue)
        assert first.last
        assert not await redis_client.exists(keys.bell("emoji"))
        await queue.submit(a_request())
        await queue.submit(a_request())
        assert not (await claimed(queue)).last
        assert await redis_client.exists(keys.bell("emoji"))

    async def test_a_job_given_back_wakes_a_worker(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        await queue.release(claim)
        assert await queue.wait_for_job(["emoji"], 5)
        assert await redis_client.exists(keys.bell("emoji")) <= 0

    async def test_bells_that_nobody_hears_are_few_and_expire(
        self, queue_server: EmbeddedServer, settings: Settings, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue_redis, "RINGS", 3)
        queue = JobQueue.connect(queue_server.url, settings)
        for _ in range(6):
            await queue.submit(a_request())
        await queue.close()
        assert await redis_client.llen(keys.bell("emoji")) == 3
        assert await redis_client.pttl(keys.bell("emoji")) > 0

    async def test_a_cancel_calls_the_worker_that_holds_the_job(self, queue: JobQueue, other_queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(other_queue)
        waiting = asyncio.create_task(other_queue.wait_for_call(claim.worker_id, 5))
        await queue.cancel(job.id)
        assert await waiting
        assert await other_queue.keep([claim]) == [Heartbeat.CANCELLED]


class TestLooks:
    @pytest.fixture
    async def slow_looks(
        self, queue: JobQueue, queue_server: EmbeddedServer, settings: Settings, monkeypatch: pytest.MonkeyPatch
    ) -> Any:
        monkeypatch.setattr(queue_redis, "LOOK_SECONDS", 3600)
        queue = JobQueue.connect(queue_server.url, settings)
        yield queue
        await queue.close()

    async def test_one_worker_looks_for_all(self, slow_looks: JobQueue, redis_client: Redis) -> None:
        queue = slow_looks
        job = await queue.submit(a_request())
        stale = await claimed(queue)
        assert await queue.claim("w2", ["emoji"], block_seconds=0, take_over=True) is None
        await silenced(queue, stale)
        assert await queue.claim("w3", ["emoji"], block_seconds=0, take_over=True) is None, "someone has just looked"
        await redis_client.delete(keys.LOOKED)
        assert await queue.claim("w3", ["emoji"], block_seconds=0) is None, "not asked to look"
        fresh = await queue.claim("w3", ["emoji"], block_seconds=0, take_over=True)
        assert fresh is not None
        assert (fresh.job.id, fresh.attempt, fresh.taken_over) == (job.id, 2, True)

    async def test_all_jobs_of_a_dead_worker_are_found_by_one_look(self, slow_looks: JobQueue) -> None:
        queue = slow_looks
        for _ in range(3):
            await queue.submit(a_request())
        for claim in [await claimed(queue, "dead") for _ in range(3)]:
            await silenced(queue, claim)
        taken = [await queue.claim("w", ["emoji"], block_seconds=0, take_over=True) for _ in range(4)]
        assert [claim is not None for claim in taken] == [True] * 3 + [False]

    async def test_who_cannot_run_a_special_job_does_not_look_for_those_who_can(self, slow_looks: JobQueue) -> None:
        queue = slow_looks
        await queue.submit(a_request(), needs={"later"})
        queue.capabilities |= {"later"}
        await silenced(queue, await claimed(queue))
        able, queue.capabilities = queue.capabilities, queue.capabilities - {"later"} | {"other"}
        assert await queue.claim("w", ["emoji"], block_seconds=0, take_over=True) is None
        queue.capabilities = able
        fresh = await queue.claim("w", ["emoji"], block_seconds=0, take_over=True)
        assert fresh is not None
        assert fresh.taken_over

    async def test_a_claim_with_nothing_to_claim_reads_no_stream(
        self, slow_looks: JobQueue, redis_client: Redis
    ) -> None:
        queue = slow_looks
        assert await queue.claim("w1", ["emoji"], block_seconds=0, take_over=True) is None, "this one looks for all"
        await redis_client.config_resetstat()
        assert await queue.claim("w2", ["emoji"], block_seconds=0, take_over=True) is None
        assert "cmdstat_xreadgroup" not in await redis_client.info("commandstats")
        job = await queue.submit(a_request())
        claim = await queue.claim("w2", ["emoji"], block_seconds=0, take_over=True)
        assert claim is not None
        assert claim.job.id == job.id

    async def test_a_look_makes_lost_groups_again(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        await redis_client.xgroup_destroy(claim.stream, keys.GROUP)
        await redis_client.delete(keys.LOOKED)
        assert await queue.claim("w", ["emoji"], block_seconds=0, take_over=True) is None
        assert (await redis_client.xpending(claim.stream, keys.GROUP))["pending"] == 1, "its idle time counts again"


class TestQuietJobs:
    async def test_nobody_hears_of_them_before_their_end(self, queue: JobQueue, redis_client: Redis) -> None:
        async with redis_client.pubsub() as heard:
            await heard.subscribe(keys.NEWS)
            loud, quiet = await queue.submit(a_request()), await queue.submit(a_request(), quiet=True)
            claims = [await claimed(queue) for _ in (loud, quiet)]
            assert [claim.job.quiet for claim in claims] == [False, True]
            assert "quiet" not in claims[1].job.model_dump(), "nobody else sees it"
            for claim in claims:
                await queue.publish(claim, Started(attempt=1, steps=4))
                await queue.store_image(claim, 0, b"picture")
            for claim in claims:
                await queue.finish(claim, DONE)
            assert await next_news(heard, 4) == [loud.id, loud.id, loud.id, quiet.id]
        assert [event.type for _, event in await watched(queue, quiet.id)] == [
            "queued",
            "started",
            "image",
            "completed",
        ]

    async def test_who_watches_one_hears_of_all_from_then_on(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request(), quiet=True)
        claim = await claimed(queue)
        seen = queue.watch(job.id)
        assert (await anext(seen))[1].type == "queued"
        async with redis_client.pubsub() as heard:
            await heard.subscribe(keys.NEWS)
            await queue.publish(claim, Started(attempt=1, steps=4))
            assert await next_news(heard, 1) == [job.id]
        assert (await anext(seen))[1].type == "started"
        await seen.aclose()


class TestCallsTogether:
    async def test_heartbeats_of_several_claims(self, queue: JobQueue) -> None:
        jobs = [await queue.submit(a_request()) for _ in range(3)]
        claims = [await claimed(queue) for _ in jobs]
        for claim in claims:
            await silenced(queue, claim)
        await queue.cancel(jobs[1].id)
        await queue.finish(claims[2], DONE)
        assert await queue.keep(claims) == [Heartbeat.OK, Heartbeat.CANCELLED, Heartbeat.LOST]
        assert await queue.reclaim("w2", ["emoji"]) is None, "what was heard is not idle"
        assert await queue.keep([]) == []

    async def test_deliveries_take_effect_in_order(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await claimed(queue)
        picture, end = stored(claim, 0, b"picture"), finished(claim, DONE)
        started = published(claim, Started(attempt=1, steps=4))
        assert await queue.deliver([started, picture, end, picture]) == [True, True, True, False]
        assert [event.type for _, event in await watched(queue, job.id)] == ["queued", "started", "image", "completed"]
        assert await queue.image(job.id, 0) == b"picture"

    async def test_a_caller_may_wait_for_the_end_alone(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        waiting = asyncio.create_task(queue.wait_for_end(job.id))
        claim = await claimed(queue)
        await queue.publish(claim, a_preview(1))
        await queue.finish(claim, Cancelled())
        assert await waiting == (Cancelled(), {})
        assert (await queue.get(job.id)).status is JobStatus.CANCELLED
        with pytest.raises(NotFound):
            await queue.wait_for_end(UNKNOWN)


class TestEnds:
    @pytest.mark.parametrize("wanted", [True, False])
    async def test_a_job_that_was_just_submitted_is_not_looked_at_before_it_ends(
        self,
        queue: JobQueue,
        other_queue: JobQueue,
        asked: list[Any],
        wanted: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(watching, "POLL", 3600.0)
        await listening(queue)
        began = time.monotonic()
        job = await queue.submit(a_request(), quiet=True)
        asked.clear()
        waiting = asyncio.create_task(queue.wait_for_end(job.id, began, pictures=wanted))
        claim = await claimed(other_queue)
        await other_queue.deliver([stored(claim, 0, b"picture"), finished(claim, DONE)])
        event, pictures = await waiting
        assert isinstance(event, Completed)
        assert pictures == ({0: b"picture"} if wanted else {})
        assert [len(commands) for commands in asked] == [1 + wanted], "one round trip for both"

    async def test_pictures_that_are_too_many_for_one_answer_are_left_to_be_fetched(
        self, queue: JobQueue, other_queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def breaks_off(*commands: Any) -> list[Any]:
            raise Unavailable("it took too long")

        await listening(queue)
        began = time.monotonic()
        job = await queue.submit(a_request(), quiet=True)
        monkeypatch.setattr(queue, "_do_together", breaks_off)
        waiting = asyncio.create_task(queue.wait_for_end(job.id, began, pictures=True))
        claim = await claimed(other_queue)
        await other_queue.deliver([stored(claim, 0, b"picture"), finished(claim, DONE)])
        event, pictures = await waiting
        assert isinstance(event, Completed)
        assert pictures == {}

    async def test_an_end_between_submit_and_wait_is_not_missed(
        self, queue: JobQueue, other_queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(watching, "POLL", 3600.0)
        await listening(queue)
        began = time.monotonic()
        job = await queue.submit(a_request(), quiet=True)
        await other_queue.finish(await claimed(other_queue), DONE)

        async def heard() -> bool:
            return queue._hub.may_have_rung(job.id, began)

        await eventually(heard)
        async with asyncio.timeout(PATIENCE):
            event, _ = await queue.wait_for_end(job.id, began)
        assert isinstance(event, Completed)

    async def test_bells_that_were_forgotten_may_have_rung(
        self, queue: JobQueue, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(event_hub, "REMEMBERED", 2)
        await listening(queue)
        began = time.monotonic()
        assert not queue._hub.may_have_rung("a", began)
        for name in "abc":
            await redis_client.publish(keys.NEWS, name)

        async def forgotten() -> bool:
            return queue._hub.may_have_rung("never seen", began)

        await eventually(forgotten)
        assert not queue._hub.may_have_rung("a", time.monotonic())


class TestRoster:
    async def test_only_changes_are_read(
        self, queue: JobQueue, other_queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in "abc":
            await other_queue.announce(name, [a_card(name)])
        assert sorted(await queue.known_workers()) == ["a", "b", "c"]
        ran: list[tuple[str, int]] = []
        run = queue._run

        async def watched_run(command: str, *args: Any, **options: Any) -> Any:
            answer = await run(command, *args, **options)
            ran.append((command, len(answer[1])))
            return answer

        monkeypatch.setattr(queue, "_run", watched_run)
        monkeypatch.setattr("patchforge.service.queue.roster.READ_AGAIN", PATIENCE)
        for _ in range(3):
            await other_queue.announce("a", [a_card("a")], b"its metrics")
            assert len(await queue.known_workers()) == 3
        assert ran == [], "nothing has changed"
        await other_queue.announce("b", [a_card("b"), a_card("d")])
        await other_queue.retire("c")
        served = {worker: [card.name for card in each.cards] for worker, each in (await queue.known_workers()).items()}
        assert served == {"a": ["a"], "b": ["b", "d"]}
        assert ran == [("changes", 2)]

    async def test_news_of_a_change_ends_what_was_known(
        self, queue: JobQueue, other_queue: JobQueue, asked: list[Any]
    ) -> None:
        await other_queue.announce("a", [a_card("a")])
        await listening(queue)
        assert list(await queue.known_workers(3600)) == ["a"]
        asked.clear()
        assert list(await queue.known_workers(3600)) == ["a"]
        assert asked == [], "nothing has changed, as far as was told"
        await other_queue.announce("b", [a_card("b")])

        async def known() -> bool:
            return sorted(await queue.known_workers(3600)) == ["a", "b"]

        await eventually(known)

    async def test_who_does_not_hear_of_changes_asks(
        self, queue: JobQueue, other_queue: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(queue._hub, "_begin", lambda: None)
        await other_queue.announce("a", [a_card("a")])
        assert list(await queue.known_workers(3600)) == ["a"]
        await other_queue.announce("b", [a_card("b")])
        assert sorted(await queue.known_workers(3600)) == ["a", "b"]

    async def test_a_flushed_server_is_read_again(
        self, queue: JobQueue, other_queue: JobQueue, redis_client: Redis
    ) -> None:
        await other_queue.announce("a", [a_card("a")])
        assert list(await queue.known_workers()) == ["a"]
        await redis_client.flushall()
        assert list(await queue.known_workers()) == []
        await other_queue.announce("b", [a_card("b")])
        assert list(await queue.known_workers()) == ["b"]

    async def test_a_worker_that_died_is_forgotten(
        self, queue: JobQueue, redis_client: Redis, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await queue.announce("a", [a_card("a")])
        assert list(await queue.known_workers()) == ["a"]
        await redis_client.delete(keys.worker_models("a"))  # as if it had expired
        monkeypatch.setattr("patchforge.service.queue.roster.READ_AGAIN", 0.0)
        assert list(await queue.known_workers()) == []


def test_a_script_defines_only_what_its_command_needs() -> None:
    scripts = build_scripts(_constants(Settings()))
    assert {"submit", "claim", "reclaim", "keep", "deliver", "news"} <= scripts.keys()
    assert "function take_over" in scripts["claim"]
    assert "function take_over" not in scripts["read"]
    assert "function finish_owned" in scripts["deliver"]
    assert {name for name, text in scripts.items() if text.count("function commands.") > 1} == {"step_batch"}
    assert scripts["feed_line"].index("local HALF =") < scripts["feed_line"].index("function commands.feed_line")
    assert scripts["step_batch"].index("function commands.cancel(") < scripts["step_batch"].index(
        "function collect_ended"
    )
    assert "local HALF =" not in scripts["submit"]
    assert not any("COMMAND" in text or "--" in text for text in scripts.values())


async def listening(queue: JobQueue) -> None:
    """Waits until a queue hears all news."""

    async def subscribed() -> bool:
        return queue._hub.fleet_known_since() < math.inf

    await eventually(subscribed)


async def next_news(subscription: PubSub, count: int) -> list[str]:
    """Returns the next jobs of which watchers hear."""
    found: list[str] = []
    async with asyncio.timeout(PATIENCE):
        async for message in subscription.listen():
            if message["type"] == "message":
                found.append(message["data"].decode())
            if len(found) == count:
                break
    return found


async def blocked(redis_client: Redis, clients: int) -> None:
    async def enough() -> bool:
        return int((await redis_client.info("clients"))["blocked_clients"]) >= clients

    await eventually(enough)
