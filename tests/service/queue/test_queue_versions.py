"""Processes of other versions use the same queue: their records end no process, and their jobs end properly."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from redis.asyncio import Redis

from patchforge.service.messages.endings import unsupported
from patchforge.service.messages.events import Cancelled, Completed, Event, Expired, Failed, Queued, Started
from patchforge.service.messages.protocol import CAPABILITIES, FIRST, PROTOCOL
from patchforge.service.messages.reading import written
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.messages.schemas import Job, JobStatus, Priority
from patchforge.service.queue import Claim, JobQueue, keys
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.service.queue.kit import (
    DONE,
    a_card,
    a_preview,
    a_request,
    claimed,
    eventually_blocked,
    overdue,
    silenced,
    watched,
)

SECRET = "the caller's own words"
LATER = PROTOCOL + 1


def plus(text: str, **fields: Any) -> bytes:
    return json.dumps(json.loads(text) | fields).encode()


PLAIN = written(a_request(prompt=SECRET))
UNREADABLE: dict[str, dict[str, Any]] = {
    "no JSON": {"request": b"\xff\xfe\x00"},
    "empty": {"request": b""},
    "a list": {"request": json.dumps([SECRET]).encode()},
    "a sampler of later": {"request": plus(PLAIN, sampler={"name": "later", "words": SECRET})},
    "a format of later": {"request": plus(PLAIN, output_format="avif")},
    "more steps than here": {"request": plus(PLAIN, steps=10_000)},
    "a prompt of another kind": {"request": plus(PLAIN, prompt=[SECRET])},
    "a protocol of later": {"protocol": LATER},
    "no number": {"created_at": b"now"},
    "endless": {"created_at": b"inf"},
}


@pytest.fixture(params=UNREADABLE)
async def unreadable(queue: JobQueue, redis_client: Redis, request: pytest.FixtureRequest) -> str:
    """Submits a job that another version may have written, and returns its id."""
    job = await queue.submit(a_request(prompt=SECRET), tenant="somebody", trace={"traceparent": "00"})
    await redis_client.hset(keys.job(job.id), mapping=UNREADABLE[request.param])
    return job.id


async def ended_as(queue: JobQueue, job_id: str) -> tuple[JobStatus, Event]:
    job, events = await queue.get(job_id), await watched(queue, job_id)
    assert job.unreadable
    assert SECRET not in job.unreadable
    return job.status, events[-1][1]


class TestJobsThatCannotBeRead:
    async def test_are_claimed_and_finished_with_the_reason(self, queue: JobQueue, unreadable: str) -> None:
        claim = await claimed(queue)
        assert (claim.job.id, claim.job.tenant) == (unreadable, "somebody")
        assert claim.job.unreadable is not None
        assert SECRET not in claim.job.unreadable
        failed = Failed(error=unsupported(claim.job.unreadable))
        assert await queue.finish(claim, failed)
        assert await ended_as(queue, unreadable) == (JobStatus.FAILED, failed)

    async def test_stand_in_no_ones_way(self, queue: JobQueue, unreadable: str) -> None:
        after = await queue.submit(a_request())
        assert await queue.release(await claimed(queue))
        assert (await claimed(queue)).job.id == unreadable
        assert (await claimed(queue)).job.id == after.id

    async def test_expire(self, queue: JobQueue, unreadable: str, ended: list[Job]) -> None:
        await overdue(queue)
        assert await queue.waiting() == {}
        assert [(job.id, job.status, job.request.model) for job in ended] == [(unreadable, JobStatus.EXPIRED, "emoji")]
        assert await ended_as(queue, unreadable) == (JobStatus.EXPIRED, Expired())

    async def test_are_cancelled(self, queue: JobQueue, unreadable: str, ended: list[Job]) -> None:
        assert (await queue.cancel(unreadable)).unreadable
        assert [job.id for job in ended] == [unreadable]
        assert await ended_as(queue, unreadable) == (JobStatus.CANCELLED, Cancelled())

    async def test_are_given_up(self, queue: JobQueue, unreadable: str, ended: list[Job], settings: Settings) -> None:
        for _ in range(settings.max_attempts):
            claim = await queue.claim("w", ["emoji"], block_seconds=0) or await queue.reclaim("w", ["emoji"])
            assert claim is not None
            await silenced(queue, claim)
        assert await queue.reclaim("w", ["emoji"]) is None
        [job] = ended
        assert job.error is not None
        assert job.error.code == "dead_letter"
        status, event = await ended_as(queue, unreadable)
        assert status is JobStatus.FAILED
        assert isinstance(event, Failed)


class TestJobs:
    async def test_of_later_versions_are_read_without_what_is_new(self, queue: JobQueue, redis_client: Redis) -> None:
        request = a_request(sampler=Adaptive())
        job = await queue.submit(request)
        sampler = json.loads(written(Adaptive())) | {"later": 1}
        newer = {"request": plus(written(request), sampler=sampler, later={"a": SECRET}), "later": b"\xff"}
        await redis_client.hset(keys.job(job.id), mapping=newer)
        claim = await claimed(queue)
        assert claim.job.unreadable is None
        assert claim.job.request == request

    async def test_of_the_version_before_are_read(self, queue: JobQueue, redis_client: Redis) -> None:
        """Protocol 0 wrote every field, and no protocol number."""
        job = await queue.submit(a_request())
        await redis_client.hset(keys.job(job.id), "request", a_request().model_dump_json())
        await redis_client.hdel(keys.job(job.id), "protocol")
        claim = await claimed(queue)
        assert (claim.job.unreadable, claim.job.request) == (None, a_request())

    @pytest.mark.parametrize("trace", [b"\xff", b"[]", b'{"traceparent": 1}', b"[" * 100_000])
    async def test_run_without_a_trace_that_cannot_be_read(
        self, queue: JobQueue, redis_client: Redis, trace: bytes
    ) -> None:
        job = await queue.submit(a_request())
        await redis_client.hset(keys.job(job.id), "trace", trace)
        claim = await claimed(queue)
        assert (claim.job.unreadable, claim.job.trace) == (None, {})

    @pytest.mark.parametrize("gone", ["request", "created_at", "id", "status"])
    async def test_with_a_part_missing_can_still_be_looked_at(
        self, queue: JobQueue, redis_client: Redis, gone: str
    ) -> None:
        job = await queue.submit(a_request())
        await redis_client.hdel(keys.job(job.id), gone)
        found = await queue.get(job.id)
        assert found.unreadable is None if gone in ("created_at", "id") else found.unreadable

    async def test_of_which_the_model_is_gone_expire_all_the_same(self, queue: JobQueue, redis_client: Redis) -> None:
        job = await queue.submit(a_request())
        await redis_client.hdel(keys.job(job.id), "model")
        await overdue(queue)
        for _ in range(2):
            await queue.ping()
            await queue.waiting()
        assert await queue.waiting() == {}
        assert (await queue.get(job.id)).status is JobStatus.EXPIRED

    @pytest.mark.parametrize("status", ["paused", ""])
    async def test_in_a_state_of_later_are_not_taken_for_ended(
        self, queue: JobQueue, redis_client: Redis, status: str
    ) -> None:
        job = await queue.submit(a_request())
        await redis_client.hset(keys.job(job.id), "status", status)
        found = await queue.get(job.id)
        assert found.unreadable == "status: is of an unknown kind"
        assert not found.status.terminal


async def published(queue: JobQueue, redis_client: Redis, *texts: bytes) -> str:
    """Returns the id of a job whose stream got these events after `queued`."""
    job = await queue.submit(a_request())
    for text in texts:
        await redis_client.xadd(keys.events(job.id), {"event": text})
    return job.id


ODD_EVENTS = [
    b"\xff",
    b"",
    b"[]",
    b'{"type":"later","words":"' + SECRET.encode() + b'"}',
    b'{"type":"preview","index":"no number"}',
    b'{"type":"started"}',
]


class TestEvents:
    async def test_that_cannot_be_read_are_passed_over(self, queue: JobQueue, redis_client: Redis) -> None:
        job_id = await published(queue, redis_client, *ODD_EVENTS)
        claim = await claimed(queue)
        await queue.publish(claim, Started(attempt=1, steps=4))
        await queue.finish(claim, DONE)
        assert [event for _, event in await watched(queue, job_id)] == [Queued(), Started(attempt=1, steps=4), DONE]

    async def test_are_read_without_what_is_new(self, queue: JobQueue, redis_client: Redis) -> None:
        job_id = await published(queue, redis_client, plus(written(a_preview(1)), later=[SECRET]))
        fields: Any = {"event": plus(written(a_preview(2)), later=None), "later": b"\xff"}
        await redis_client.xadd(keys.events(job_id), fields)
        await queue.cancel(job_id)
        assert [event for _, event in await watched(queue, job_id)] == [
            Queued(),
            a_preview(1),
            a_preview(2),
            Cancelled(),
        ]

    @pytest.mark.parametrize("odd", ODD_EVENTS)
    async def test_a_last_one_that_cannot_be_read_is_told_by_the_record(
        self, queue: JobQueue, redis_client: Redis, odd: bytes
    ) -> None:
        job = await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        last = await redis_client.xadd(keys.events(job.id), {"event": odd})
        await redis_client.hset(keys.job(job.id), "last_event", last)
        await redis_client.xdel(keys.events(job.id), (await redis_client.xrange(keys.events(job.id)))[1][0])
        assert [event for _, event in await watched(queue, job.id)] == [Queued(), DONE]
        assert await watched(queue, job.id, last.decode()) == []

    async def test_an_outcome_that_cannot_be_read_is_a_failure_to_its_watchers(
        self, queue: JobQueue, redis_client: Redis
    ) -> None:
        job = await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        [last, _] = (await redis_client.xrange(keys.events(job.id)))[-1]
        report = plus(written(DONE.report), patches=SECRET)
        await redis_client.xdel(keys.events(job.id), last)
        fields: Any = {"event": plus(written(DONE), report=json.loads(report))}
        again = await redis_client.xadd(keys.events(job.id), fields)
        await redis_client.hset(keys.job(job.id), mapping={"report": report, "last_event": again})
        [_, (_, event)] = await watched(queue, job.id)
        assert isinstance(event, Failed)
        assert event.error.code == "unsupported"
        assert SECRET not in event.error.message
        assert (await queue.get(job.id)).status is JobStatus.COMPLETED


async def announced(redis_client: Redis, worker: str, cards: bytes, told: bytes | None = None) -> None:
    """Changes it as another version might."""
    await redis_client.zadd(keys.WORKERS, {worker: 9e9})
    await redis_client.set(keys.worker_models(worker), cards)
    if told is not None:
        await redis_client.set(keys.announcement(worker), told)


def card(name: str, **fields: Any) -> dict[str, Any]:
    return json.loads(written(a_card(name))) | fields


class TestAnnouncements:
    async def test_say_protocol_and_capabilities_beside_the_cards(self, queue: JobQueue, redis_client: Redis) -> None:
        more = {"weights_sha256": "0" * 64, "examples": ["a cat"]}
        await queue.announce("w", [a_card("a").model_copy(update=more)])
        [cards] = json.loads(await redis_client.get(keys.worker_models("w")) or b"")
        assert cards == json.loads(a_card("a").model_dump_json()), "what readers of protocol 0 expect"
        told = json.loads(await redis_client.get(keys.announcement("w")) or b"")
        assert told == {"protocol": PROTOCOL, "capabilities": sorted(CAPABILITIES), "details": {"a": more}}
        assert await queue.models() == [a_card("a").model_copy(update=more)]
        assert (await queue.workers())["w"].capabilities == CAPABILITIES
        await queue.announce_metrics("w", b"text")
        await queue.retire("w")
        left = [await redis_client.ttl(key) async for key in redis_client.scan_iter()]
        assert all(seconds > 0 for seconds in left), "only what changed is remembered, and not for long"

    async def test_of_the_version_before_are_read(self, queue: JobQueue, redis_client: Redis) -> None:
        await announced(redis_client, "old", json.dumps([card("a")]).encode())
        served = (await queue.workers())["old"]
        assert ([*served.cards], served.capabilities) == ([a_card("a")], FIRST)

    async def test_of_later_versions_are_read_without_what_is_new(self, queue: JobQueue, redis_client: Redis) -> None:
        told = {"protocol": PROTOCOL, "capabilities": ["sampler.later"], "later": 1}
        await announced(redis_client, "new", json.dumps([card("a", later={})]).encode(), json.dumps(told).encode())
        served = (await queue.workers())["new"]
        assert ([*served.cards], served.capabilities) == ([a_card("a")], {"sampler.later"})

    async def test_one_card_that_cannot_be_read_hides_no_other(
        self, queue: JobQueue, redis_client: Redis, capsys: pytest.CaptureFixture[str]
    ) -> None:
        odd = [card("later", sampler={"name": SECRET}), card("video", kind=SECRET), SECRET, {}, None]
        await announced(redis_client, "new", json.dumps([*odd, card("a")]).encode())
        await queue.announce("old", [a_card("b")])
        for _ in range(3):
            assert await queue.models() == [a_card("a"), a_card("b")]
        unreadable = (await queue.workers())["new"].unreadable
        assert set(unreadable) == {"later", "video", ""}
        assert unreadable["later"] == "card.sampler: is of an unknown kind"
        said = capsys.readouterr().out
        assert said.count("its card cannot be read") == len(odd), "said once, not with every look"
        assert SECRET not in said

    @pytest.mark.parametrize("cards", [b"\xff", b"{}", b"[" * 100_000, b'"a"', b"["])
    async def test_that_are_no_list_hide_no_other_worker(
        self, queue: JobQueue, redis_client: Redis, cards: bytes
    ) -> None:
        await announced(redis_client, "odd \udcff".encode(errors="surrogateescape").decode(errors="replace"), cards)
        await redis_client.zadd(keys.WORKERS, {b"\xff": 9e9})
        await redis_client.set(keys.WORKER_MODELS.encode() + b"\xff", cards)
        await queue.announce("well", [a_card("b")])
        assert await queue.models() == [a_card("b")]

    @pytest.mark.parametrize("told", [json.dumps({"protocol": LATER, "capabilities": []}).encode(), b"\xff", b"{}"])
    async def test_of_a_later_protocol_are_not_used(self, queue: JobQueue, redis_client: Redis, told: bytes) -> None:
        await announced(redis_client, "new", json.dumps([card("a")]).encode(), told)
        served = (await queue.workers())["new"]
        assert [*served.cards] == []
        assert set(served.unreadable) == {"a"}


NEW = frozenset({"sampler.later"})


async def claim_of(queue: JobQueue) -> Claim | None:
    return await queue.claim("w", ["emoji"], block_seconds=0)


@pytest.fixture
def able(other_queue: JobQueue) -> JobQueue:
    """The queue of a process whose workers can do more."""
    other_queue.capabilities = CAPABILITIES | NEW
    return other_queue


class TestJobsThatNeedMore:
    async def test_wait_for_a_worker_that_can(self, queue: JobQueue, able: JobQueue) -> None:
        job = await queue.submit(a_request(), needs=NEW)
        plain = await queue.submit(a_request(priority=Priority.LOW))
        taken = await claim_of(queue)
        assert taken is not None
        assert taken.job.id == plain.id
        assert await claim_of(queue) is None
        assert await queue.waiting() == {"emoji": 1}
        taken = await claim_of(able)
        assert taken is not None
        assert taken.job.id == job.id
        assert await able.publish(taken, Started(attempt=1, steps=4))
        assert await able.finish(taken, DONE)
        assert isinstance((await watched(queue, job.id))[-1][1], Completed)

    async def test_need_nothing_more_if_every_worker_can_do_it(self, queue: JobQueue) -> None:
        await queue.submit(a_request(), needs=FIRST)
        assert await claim_of(queue) is not None

    async def test_keep_their_place_among_the_others(self, queue: JobQueue, able: JobQueue) -> None:
        order = [Priority.LOW, Priority.HIGH, Priority.NORMAL]
        for priority in order:
            await queue.submit(a_request(priority=priority), needs=NEW)
            await queue.submit(a_request(priority=priority))
        taken = [await claim_of(able) for _ in range(6)]
        assert [claim.job.request.priority for claim in taken if claim] == [
            *[Priority.HIGH] * 2,
            *[Priority.NORMAL] * 2,
            *[Priority.LOW] * 2,
        ]

    async def test_do_not_stand_in_each_others_way(self, queue: JobQueue, able: JobQueue) -> None:
        first = await queue.submit(a_request(), needs={"another thing"})
        second = await queue.submit(a_request(), needs=NEW)
        taken = await claim_of(able)
        assert taken is not None
        assert taken.job.id == second.id
        assert await claim_of(able) is None
        able.capabilities |= {"another thing"}
        taken = await claim_of(able)
        assert taken is not None
        assert taken.job.id == first.id

    async def test_wake_a_worker_that_waits(self, queue: JobQueue, able: JobQueue) -> None:
        waiting = asyncio.create_task(able.claim("w", ["emoji"], block_seconds=3600))
        await eventually_blocked(queue)
        job = await queue.submit(a_request(), needs=NEW)
        claim = await asyncio.wait_for(waiting, PATIENCE)
        assert claim is not None
        assert claim.job.id == job.id

    async def test_are_taken_over_only_by_a_worker_that_can(
        self, queue: JobQueue, able: JobQueue, settings: Settings
    ) -> None:
        left = await queue.submit(a_request(), needs={"another thing"})
        job = await queue.submit(a_request(), needs=NEW)
        claim = await claim_of(able)
        assert claim is not None
        waiting_entry = (await queue._do("HGET", keys.job(left.id), "entry")).decode()
        for entry in (claim.entry_id, waiting_entry):
            await queue._redis.xclaim(claim.stream, keys.GROUP, keys.CONSUMER, 0, [entry], idle=3_600_000, justid=True)
        assert await queue.reclaim("w", ["emoji"]) is None
        able.capabilities = CAPABILITIES | {"something else"}
        assert await able.reclaim("w", ["emoji"]) is None
        able.capabilities = CAPABILITIES | NEW
        again = await able.reclaim("w", ["emoji"])
        assert again is not None
        assert (again.job.id, again.attempt) == (job.id, 2)
        assert await able.reclaim("w", ["emoji"]) is None
        able.capabilities |= {"another thing"}
        taken = await claim_of(able)
        assert taken is not None
        assert (taken.job.id, taken.attempt) == (left.id, 1), "that one waited, and nobody was silent"

    async def test_that_were_given_back_are_next_for_a_worker_that_can(self, queue: JobQueue, able: JobQueue) -> None:
        job = await queue.submit(a_request(priority=Priority.LOW), needs=NEW)
        claim = await claim_of(able)
        assert claim is not None
        assert await able.release(claim)
        await queue.submit(a_request(priority=Priority.HIGH))
        again = await claim_of(able)
        assert again is not None
        assert (again.job.id, again.attempt) == (job.id, 1)
        assert keys.is_returned(again.stream)
        assert not keys.is_returned(claim.stream)

    @pytest.mark.parametrize("way", ["cancel", "expire"])
    async def test_leave_nothing_behind_where_no_worker_looks(
        self, queue: JobQueue, able: JobQueue, redis_client: Redis, way: str
    ) -> None:
        looked_at = await queue.submit(a_request(), needs={"another thing"})
        assert await claim_of(able) is None
        other = await queue.submit(a_request(), needs={"another thing"})
        if way == "cancel":
            await queue.cancel(looked_at.id)
            await queue.cancel(other.id)
        else:
            await overdue(queue)
        assert await queue.waiting() == {}
        stream = keys.queue("emoji", Priority.NORMAL, special=True)
        assert await redis_client.xlen(stream) == 0
        assert (await redis_client.xpending(stream, keys.GROUP))["pending"] == 0

    async def test_survive_a_lost_group(self, queue: JobQueue, able: JobQueue, redis_client: Redis) -> None:
        running = await queue.submit(a_request(), needs=NEW)
        claim = await claim_of(able)
        assert claim is not None
        waiting = await queue.submit(a_request(), needs=NEW)
        await redis_client.xgroup_destroy(claim.stream, keys.GROUP)
        taken = await claim_of(able)
        assert taken is not None
        assert (claim.job.id, taken.job.id) == (running.id, waiting.id)
        await silenced(able, claim)
        again = await able.reclaim("w2", ["emoji"])
        assert again is not None
        assert again.job.id == running.id
