"""The limits of one API key: on the queue server's clock, and separate from other keys."""

from __future__ import annotations

import asyncio

import pytest
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import NotFound, RateLimited, TooManyJobs
from patchforge.service.messages.source import Source
from patchforge.service.queue import JobQueue, keys
from patchforge.service.settings import Settings
from tests.service.queue.kit import DONE, UNKNOWN, a_request, claimed


@pytest.fixture
def settings(queue_server: EmbeddedServer, request: pytest.FixtureRequest) -> Settings:
    """Makes a queue with the limits that a test needs."""
    return Settings(redis_url=queue_server.url, max_waiting=100, **getattr(request, "param", {}))


def limits(**knobs: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("settings", [knobs], indirect=True, ids=[str(knobs)])


@limits(rate_limit=1, rate_burst=3)
async def test_pictures_are_counted_for_each_key_by_itself(queue: JobQueue) -> None:
    await queue.submit(a_request(n=2), tenant="alice")
    with pytest.raises(RateLimited) as caught:
        await queue.submit(a_request(n=2), tenant="alice")
    assert 30 < caught.value.retry_after <= 60, "one picture a minute, and one is missing"
    await queue.submit(a_request(n=1), tenant="alice")
    for tenant in ("bob", None):
        await queue.submit(a_request(n=3), tenant=tenant)
    assert await queue.waiting() == {"emoji": 4}


@limits(rate_limit=1, rate_burst=3)
async def test_a_request_for_more_than_the_bucket_holds_is_paid_for_later(queue: JobQueue) -> None:
    await queue.submit(a_request(n=10), tenant="alice")
    with pytest.raises(RateLimited) as caught:
        await queue.submit(a_request(), tenant="alice")
    assert 450 < caught.value.retry_after <= 480


@limits(rate_limit=1, rate_burst=3)
async def test_the_bucket_fills_with_time_up_to_its_brim(queue: JobQueue, redis_client: Redis) -> None:
    await queue.submit(a_request(n=3), tenant="alice")
    bucket = f"{keys.RATE}alice"
    assert 0 < await redis_client.ttl(bucket) <= 180, "a full bucket need not be remembered"
    seconds, _ = await redis_client.time()
    await redis_client.hset(bucket, mapping={"left": 0, "at": seconds - 120})
    await queue.submit(a_request(n=2), tenant="alice")
    await redis_client.hset(bucket, mapping={"left": 0, "at": seconds - 10_000})
    await queue.submit(a_request(n=3), tenant="alice")
    with pytest.raises(RateLimited):
        await queue.submit(a_request(n=3), tenant="alice")
    await redis_client.hset(bucket, mapping={"left": 0, "at": seconds + 1000})
    with pytest.raises(RateLimited) as caught:
        await queue.submit(a_request(), tenant="alice")
    assert caught.value.retry_after == 60, "a clock set back costs nobody anything"


@limits(rate_limit=1, rate_burst=1)
async def test_a_refused_or_repeated_request_costs_nothing(queue: JobQueue) -> None:
    first = await queue.submit(a_request(), tenant="alice", idempotency_key="k")
    assert (await queue.submit(a_request(), tenant="alice", idempotency_key="k")).id == first.id
    waits = set()
    for _ in range(5):
        with pytest.raises(RateLimited) as caught:
            await queue.submit(a_request(), tenant="alice")
        waits.add(caught.value.retry_after)
    assert max(waits) <= 60, "no refusal adds to the debt"


@limits(max_in_flight=2)
async def test_jobs_in_flight_are_counted_until_they_end_however_they_end(queue: JobQueue) -> None:
    first = await queue.submit(a_request(), tenant="alice")
    second = await queue.submit(a_request(), tenant="alice")
    with pytest.raises(TooManyJobs) as caught:
        await queue.submit(a_request(), tenant="alice")
    assert caught.value.retry_after
    await queue.submit(a_request(), tenant="bob")

    claim = await claimed(queue)
    assert claim.job.id == first.id
    with pytest.raises(TooManyJobs):  # a running job is in flight as well
        await queue.submit(a_request(), tenant="alice")
    await queue.finish(claim, DONE)
    third = await queue.submit(a_request(), tenant="alice")
    await queue.cancel(second.id)
    await queue.submit(a_request(), tenant="alice")
    with pytest.raises(TooManyJobs):
        await queue.submit(a_request(), tenant="alice")
    await queue.cancel(third.id)
    await queue.submit(a_request(), tenant="alice")


@limits(max_in_flight=1)
async def test_a_job_deleted_by_hand_is_not_counted_for_ever(queue: JobQueue, redis_client: Redis) -> None:
    job = await queue.submit(a_request(), tenant="alice")
    await redis_client.delete(keys.job(job.id))
    await queue.submit(a_request(), tenant="alice")


@limits(max_in_flight=5)
async def test_parallel_submits_never_exceed_the_limit(queue: JobQueue, other_queue: JobQueue) -> None:
    submits = [each.submit(a_request(), tenant="alice") for _ in range(10) for each in (queue, other_queue)]
    outcomes = await asyncio.gather(*submits, return_exceptions=True)
    assert sum(isinstance(outcome, TooManyJobs) for outcome in outcomes) == 15
    assert await queue.waiting() == {"emoji": 5}


async def test_what_a_job_starts_from_lies_beside_it_and_goes_with_it(queue: JobQueue, redis_client: Redis) -> None:
    source = Source(b"\x89PNG\x00", b"\x89mask\xff")
    job = await queue.submit(a_request(), source=source)
    unmasked = await queue.submit(a_request(), source=Source(b"x"))
    assert await queue.source(job.id) == source
    assert await queue.source(unmasked.id) == Source(b"x", None)
    assert await redis_client.ttl(keys.sources(job.id)) == -1
    await queue.cancel(job.id)
    assert await redis_client.ttl(keys.sources(job.id)) > 0
    plain = await queue.submit(a_request())
    for job_id in (plain.id, UNKNOWN):
        with pytest.raises(NotFound):
            await queue.source(job_id)


async def test_a_repeated_submit_keeps_no_second_picture(queue: JobQueue, redis_client: Redis) -> None:
    for _ in range(2):
        await queue.submit(a_request(), idempotency_key="k", source=Source(b"x"))
    assert len(await redis_client.keys(f"{keys.SOURCES}*")) == 1
