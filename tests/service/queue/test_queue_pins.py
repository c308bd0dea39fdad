"""A job pinned to a bundle is run by workers that serve this bundle, and by no other."""

from __future__ import annotations

import asyncio
import json

import pytest
from redis.asyncio import Redis

from patchforge.service.messages.events import Completed
from patchforge.service.messages.protocol import digest_need
from patchforge.service.messages.reading import written
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import Claim, JobQueue, keys, work
from tests.patience import PATIENCE
from tests.service.queue.kit import DONE, REPORT, a_card, a_request, eventually, silenced, watched

OLD, NEW = "0" * 64, "1" * 64
DRAWN = Completed(report=REPORT.model_copy(update={"model_digest": NEW}))


@pytest.fixture
def old(queue: JobQueue) -> JobQueue:
    queue.capabilities |= {digest_need(OLD)}
    return queue


@pytest.fixture
def new(other_queue: JobQueue) -> JobQueue:
    other_queue.capabilities |= {digest_need(NEW)}
    return other_queue


async def take(queue: JobQueue) -> Claim | None:
    return await queue.claim("w", ["emoji"], block_seconds=0)


async def waits(queue: JobQueue, clients: int = 1) -> bool:
    """Whether so many clients wait for a job."""
    return int((await queue._redis.info("clients"))["blocked_clients"]) >= clients


class TestAPinnedJob:
    async def test_is_claimed_by_a_worker_with_this_bundle_only(self, old: JobQueue, new: JobQueue) -> None:
        job = await old.submit(a_request(model_digest=NEW))
        assert await take(old) is None
        claim = await take(new)
        assert claim is not None
        assert (claim.job.id, claim.job.request.model_digest) == (job.id, NEW)

    async def test_wakes_a_worker_with_this_bundle(
        self, old: JobQueue, new: JobQueue, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(work, "LOOK", PATIENCE)
        other = asyncio.create_task(old.claim("waits longest", ["emoji"], block_seconds=PATIENCE))
        await eventually(lambda: waits(old))
        mine = asyncio.create_task(new.claim("w", ["emoji"], block_seconds=PATIENCE))
        await eventually(lambda: waits(new, clients=2))
        await old.submit(a_request(model_digest=NEW))
        claim = await mine
        assert claim is not None
        assert claim.job.request.model_digest == NEW
        assert not other.done()
        other.cancel()

    async def test_does_not_hold_up_the_others(self, old: JobQueue, new: JobQueue) -> None:
        for _ in range(3):
            await old.submit(a_request(model_digest=NEW))
        pinned, free = await old.submit(a_request(model_digest=OLD)), await old.submit(a_request())
        taken = [claim.job.id for _ in range(2) if (claim := await take(old)) is not None]
        assert sorted(taken) == sorted([pinned.id, free.id])
        assert await take(old) is None

    async def test_is_not_taken_over_by_another_bundle_when_its_worker_dies(self, old: JobQueue, new: JobQueue) -> None:
        job = await old.submit(a_request(model_digest=NEW))
        claim = await take(new)
        assert claim is not None
        await silenced(new, claim)
        assert await old.reclaim("w", ["emoji"]) is None
        assert (await old.get(job.id)).status is JobStatus.RUNNING
        again = await new.reclaim("v", ["emoji"])
        assert again is not None
        assert (again.job.id, again.attempt) == (job.id, 2)

    async def test_that_is_given_back_waits_for_the_bundle_again(self, old: JobQueue, new: JobQueue) -> None:
        await old.submit(a_request(model_digest=NEW))
        claim = await take(new)
        assert claim is not None
        assert await new.release(claim)
        assert await take(old) is None
        assert await take(new) is not None

    async def test_is_not_claimed_by_workers_that_tell_no_digest(self, queue: JobQueue) -> None:
        await queue.submit(a_request(model_digest=NEW))
        assert await take(queue) is None


class TestTheDigestInAReport:
    async def test_is_told_with_the_job_and_its_last_event(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await take(queue)
        assert claim is not None
        await queue.finish(claim, DRAWN)
        assert (await queue.get(job.id)).report == DRAWN.report
        assert [event for _, event in await watched(queue, job.id)][-1] == DRAWN

    async def test_lies_where_processes_of_protocol_0_do_not_read(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request())
        claim = await take(queue)
        assert claim is not None
        await queue.finish(claim, DRAWN)
        report = await redis_client.hget(keys.job(job.id), "report")
        assert json.loads(report or b"") == json.loads(written(DONE.report))
        [_, fields] = (await redis_client.xrange(keys.events(job.id)))[-1]
        assert json.loads(fields[b"event"]) == json.loads(written(DONE))

    async def test_is_left_out_if_an_older_worker_drew_the_pictures(self, queue: JobQueue) -> None:
        job = await queue.submit(a_request())
        claim = await take(queue)
        assert claim is not None
        await queue.finish(claim, DONE)
        assert (await queue.get(job.id)).report == REPORT


async def test_a_card_tells_its_bundle(queue: JobQueue) -> None:
    card = a_card("emoji").model_copy(update={"digest": NEW})
    await queue.announce("w", [card])
    assert await queue.models() == [card]
