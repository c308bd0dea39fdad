"""A call whose answer is lost: repeating it gives the same result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import chain

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import Unavailable
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import Claim, Heartbeat, JobQueue, keys
from patchforge.service.queue.records import job_from
from patchforge.service.settings import Settings
from tests.faults.tap import Tap, tapped
from tests.service.queue.kit import DONE, a_request, claimed, silenced, taken_over


async def unanswered(wire: tuple[JobQueue, Tap], command: str) -> None:
    """Makes this call and loses its answer."""
    queue, tap = wire

    def cut() -> None:
        raise ConnectionAbortedError

    tap.once_answered(f"\r\n{command}\r\n".encode(), cut)
    with pytest.raises(Unavailable):
        await (queue.reclaim("w1", ["emoji"]) if command == "reclaim" else claimed(queue))


async def hidden_claim(queue: JobQueue) -> Claim:
    """Returns the claim for the only running job, which no worker knows of."""
    [key] = await queue._redis.keys(keys.JOB + "*")
    record = await queue._redis.hgetall(key)
    return Claim(job_from([*chain(*record.items())]), "w1", 1, record[b"stream"].decode(), record[b"entry"].decode())


@pytest.fixture
async def lossy(queue_server: EmbeddedServer, settings: Settings) -> AsyncIterator[tuple[JobQueue, Tap]]:
    """A worker's connection to the queue that tests can cut. It has been used before."""
    with tapped(queue_server.url) as tap:
        queue = JobQueue.connect(tap.url, settings)
        await queue.waiting()
        yield queue, tap
        await queue.close()


class TestUnansweredCalls:
    async def test_a_repeated_claim_gets_the_job_whose_answer_was_lost(
        self, queue: JobQueue, lossy: tuple[JobQueue, Tap]
    ) -> None:
        worker, _ = lossy
        jobs = [await queue.submit(a_request()) for _ in range(2)]
        await unanswered(lossy, "claim")
        assert (await queue.get(jobs[0].id)).status is JobStatus.RUNNING
        claims = [await claimed(worker) for _ in range(2)]
        assert [(claim.job.id, claim.attempt) for claim in claims] == [(job.id, 1) for job in jobs]
        assert await worker.claim("w1", ["emoji"], block_seconds=0) is None
        assert await worker.finish(claims[0], DONE)

    async def test_so_does_a_repeated_reclaim(self, queue: JobQueue, lossy: tuple[JobQueue, Tap]) -> None:
        worker, _ = lossy
        await queue.submit(a_request())
        stale = await claimed(queue, "silent")
        await silenced(queue, stale)
        await unanswered(lossy, "reclaim")
        fresh = await claimed(worker)
        assert (fresh.job.id, fresh.attempt) == (stale.job.id, 2)

    async def test_it_keeps_the_job_it_gets(self, queue: JobQueue, lossy: tuple[JobQueue, Tap]) -> None:
        await queue.submit(a_request())
        await unanswered(lossy, "claim")
        await silenced(queue, await hidden_claim(queue))
        assert await claimed(lossy[0])
        assert await queue.reclaim("w2", ["emoji"]) is None

    async def test_what_another_has_taken_over_meanwhile_is_not_given(
        self, queue: JobQueue, lossy: tuple[JobQueue, Tap]
    ) -> None:
        await queue.submit(a_request())
        await unanswered(lossy, "claim")
        fresh = await taken_over(queue, await hidden_claim(queue), "w2")
        assert await lossy[0].claim("w1", ["emoji"], block_seconds=0) is None
        assert await queue.heartbeat(fresh) is Heartbeat.OK

    async def test_what_a_worker_took_lapses(self, queue: JobQueue, redis_client: Redis, settings: Settings) -> None:
        await queue.submit(a_request())
        await claimed(queue)
        assert 0 < await redis_client.ttl(keys.TAKEN + "w1") <= settings.result_ttl_seconds
