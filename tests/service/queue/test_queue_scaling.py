"""What autoscalers ask: how many jobs workers hold, dead or alive, and which models were served a while ago."""

from __future__ import annotations

from redis.asyncio import Redis

from patchforge.service.messages.protocol import CAPABILITIES, FIRST, digest_need
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.records import Served
from tests.service.queue.kit import DONE, a_card, a_request, claimed, eventually, silenced

DIGEST = "0" * 64
CARD = a_card("emoji").model_copy(update={"digest": DIGEST, "examples": ["a cat"]})


class TestHeldJobs:
    async def test_are_those_that_workers_run(self, queue: JobQueue) -> None:
        assert await queue.held() == {}
        for model in ("emoji", "emoji", "emoji", "digits"):
            await queue.submit(a_request(model=model))
        assert await queue.held() == {}
        first = await claimed(queue)
        await claimed(queue)
        assert await queue.claim("w", ["digits"], block_seconds=0)
        assert await queue.held() == {"emoji": 2, "digits": 1}
        await queue.finish(first, DONE)
        assert await queue.held() == {"emoji": 1, "digits": 1}

    async def test_stay_held_when_their_worker_is_dead_and_forgotten(
        self, queue: JobQueue, other_queue: JobQueue
    ) -> None:
        for _ in range(4):
            await queue.submit(a_request())
        claims = [await claimed(other_queue) for _ in range(4)]
        await other_queue.retire("w")
        assert await queue.held() == {"emoji": 4}
        for claim in claims:
            await silenced(queue, claim)
        assert await queue.held() == {"emoji": 4}
        assert await queue.reclaim("v", ["emoji"])
        assert await queue.held() == {"emoji": 4}

    async def test_do_not_include_those_that_wait_for_a_worker_that_can_run_them(self, queue: JobQueue) -> None:
        needy = [await queue.submit(a_request(), needs={need}) for need in ("special", "special", "other")]
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert await queue.held() == {}
        queue.capabilities |= {"special"}
        assert (await claimed(queue)).job.id == needy[0].id
        assert await queue.held() == {"emoji": 1}, "though all three entries are pending"

    async def test_do_not_include_those_given_back_cancelled_or_expired(self, queue: JobQueue) -> None:
        await queue.submit(a_request())
        waits = await queue.submit(a_request())
        claim = await claimed(queue)
        await queue.release(claim)
        assert await queue.held() == {}
        await queue.cancel(waits.id)
        assert await claimed(queue)
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert await queue.held() == {"emoji": 1}

    async def test_are_counted_again_when_a_lost_group_is_back(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.submit(a_request())
        claim = await claimed(queue)
        await redis_client.xgroup_destroy(claim.stream, keys.GROUP)
        assert await queue.held() == {}
        assert await queue.claim("w", ["emoji"], block_seconds=0) is None
        assert await queue.held() == {"emoji": 1}

    async def test_are_told_by_any_name(self, queue: JobQueue) -> None:
        name = 'a:b"%-[c]'
        await queue.submit(a_request(model=name))
        assert await queue.claim("w", [name], block_seconds=0)
        assert await queue.held() == {name: 1}


class TestRememberedModels:
    async def test_are_remembered_with_all_that_their_worker_could_do(self, queue: JobQueue) -> None:
        able = CAPABILITIES | {digest_need(DIGEST)}
        await queue.remember([Served([CARD], able), Served([a_card("digits")], FIRST)], 60)
        found = {served.cards[0].name: served for served in await queue.remembered()}
        assert found == {"emoji": Served([CARD], able), "digits": Served([a_card("digits")], FIRST)}
        assert await queue.models() == [], "which does not make them served"

    async def test_are_replaced_by_what_is_served_later(self, queue: JobQueue) -> None:
        await queue.remember([Served([CARD])], 60)
        await queue.remember([Served([a_card("emoji")])], 60)
        assert await queue.remembered() == [Served([a_card("emoji")])]

    async def test_are_forgotten_in_time(self, queue: JobQueue, redis_client: Redis) -> None:
        await queue.remember([Served([CARD])], 60)
        assert 0 < await redis_client.ttl(keys.REMEMBERED_MODEL + "emoji") <= 60
        await queue.remember([Served([CARD])], 1)

        async def forgotten() -> bool:
            return await queue.remembered() == [] and await redis_client.keys("*remembered*") == []

        await eventually(forgotten)

    async def test_need_not_be_any(self, queue: JobQueue) -> None:
        await queue.remember([], 60)
        assert await queue.remembered() == []
