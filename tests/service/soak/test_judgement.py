"""A soak must find every broken promise; these tests break the promises by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from redis import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.messages.events import Cancelled, Completed
from patchforge.service.queue import JobQueue, keys
from patchforge.service.soak.audit import Audit
from patchforge.service.soak.fleet import Member
from patchforge.service.soak.ledger import Ledger, Watch
from patchforge.service.soak.memory import ALLOWED_BYTES, MIN_SAMPLES, Memory
from patchforge.service.soak.traffic import Client
from patchforge.service.soak.versions import TODAY, Version
from tests.patience import PATIENCE
from tests.service.queue.kit import DONE, REPORT, UNKNOWN, a_request, claimed

LARGE = 700 << 20
OLDER = Version("older", ())
KEPT = 3600.0


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def meddler(queue_server: EmbeddedServer) -> Iterator[Redis]:
    with Redis.from_url(queue_server.url) as client:
        yield client


@pytest.fixture
def masters(meddler: Redis) -> list[Redis]:
    """The last one is the master: a client that is appended is a failover."""
    return [meddler]


@pytest.fixture
def audit(masters: list[Redis], ledger: Ledger) -> Audit:
    return Audit(lambda: masters[-1], ledger, KEPT)


class TestAudit:
    async def test_finds_every_job_and_how_it_ended(self, queue: JobQueue, audit: Audit, ledger: Ledger) -> None:
        done = await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        left = await queue.submit(a_request())
        await queue.cancel(left.id)
        live = await queue.submit(a_request())
        assert audit.try_to_scan()
        assert audit.ended == {done.id: "completed", left.id: "cancelled"}
        assert audit.live == {live.id: "waiting"}
        assert audit.accepted == {done.id, left.id, live.id}, "though no client got their ids"
        assert (audit.lost, ledger.broken) == ({live.id}, [])

    async def test_remembers_jobs_that_have_expired(self, queue: JobQueue, audit: Audit, meddler: Redis) -> None:
        job = await queue.submit(a_request())
        audit.ledger.accepted.add(job.id)
        await queue.cancel(job.id)
        assert audit.try_to_scan()
        meddler.delete(keys.job(job.id), keys.events(job.id))
        assert audit.try_to_scan()
        assert (audit.lost, audit.count("cancelled")) == (set(), 1)

    async def test_misses_a_job_that_was_accepted_and_is_gone(self, queue: JobQueue, audit: Audit) -> None:
        audit.ledger.accepted.add(UNKNOWN)
        assert audit.try_to_scan()
        assert audit.lost == {UNKNOWN}

    @pytest.mark.parametrize("scanned_before", [True, False])
    async def test_finds_a_second_terminal_event(
        self, queue: JobQueue, audit: Audit, meddler: Redis, scanned_before: bool
    ) -> None:
        job = await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        if scanned_before:
            audit.try_to_scan()
        meddler.xadd(keys.events(job.id), {"event": Cancelled().model_dump_json()})
        assert audit.try_to_scan()
        assert job.id in audit.ledger.broken[0]

    async def test_finds_a_terminal_event_of_a_job_that_goes_on(
        self, queue: JobQueue, audit: Audit, meddler: Redis
    ) -> None:
        job = await queue.submit(a_request())
        meddler.xadd(keys.events(job.id), {"event": Completed(report=REPORT).model_dump_json()})
        audit.try_to_scan()
        assert "is waiting and has a terminal event" in audit.ledger.broken[0]

    async def test_finds_an_end_without_a_terminal_event(self, queue: JobQueue, audit: Audit, meddler: Redis) -> None:
        job = await queue.submit(a_request())
        meddler.hset(keys.job(job.id), mapping={"status": "failed", "last_event": "1-1", "error": '{"code": "x"}'})
        audit.try_to_scan()
        assert "is failed with terminal events []" in audit.ledger.broken[0]

    async def test_finds_keys_that_never_expire(self, queue: JobQueue, audit: Audit, meddler: Redis) -> None:
        await queue.submit(a_request())
        await queue.finish(await claimed(queue), DONE)
        lasting = audit.lasting_keys()
        # The streams that the claim looked at, each plain and special, until it found the job in a plain one.
        assert (lasting["queue"], lasting["queue entries"], audit.ledger.broken) == (5, 0, [])
        meddler.hset(keys.images("x"), "0", "left behind")
        audit.lasting_keys()
        assert audit.ledger.broken == [f"{keys.images('x')} never expires"]

    async def test_waits_for_the_review_of_memory_that_an_older_version_left_reserved(
        self, queue: JobQueue, audit: Audit, meddler: Redis
    ) -> None:
        job = await queue.submit(a_request(), room=1000)
        assert audit.reserved() == [keys.job(job.id)]
        meddler.expire(keys.job(job.id), 60)  # it has ended
        meddler.zadd(keys.RESERVED_UNTIL, {keys.job(job.id): 0})  # and its review is due

        async def look() -> None:
            await queue.memory()

        await audit.await_review(look, PATIENCE)
        assert audit.reserved() == []

    async def test_finds_memory_that_no_review_releases(self, queue: JobQueue, audit: Audit) -> None:
        job = await queue.submit(a_request(), room=1000)

        async def look() -> None:
            await queue.memory()

        await audit.await_review(look, 0)
        assert audit.reserved() == [keys.job(job.id)]

    def test_a_server_that_is_away_is_no_fault_of_the_jobs(self, ledger: Ledger) -> None:
        ledger.accepted.add(UNKNOWN)
        audit = Audit(lambda: Redis(port=1), ledger, KEPT)
        assert not audit.try_to_scan()
        assert audit.used_memory() == 0


class TestFailover:
    """The new master has the old one's data here, except for what a test takes from it."""

    @pytest.fixture
    def failover(self, masters: list[Redis], queue_server: EmbeddedServer) -> Iterator[Callable[[], None]]:
        with Redis.from_url(queue_server.url) as other:
            yield lambda: masters.append(other)

    async def ended(self, queue: JobQueue, audit: Audit) -> str:
        job = await queue.submit(a_request())
        await queue.cancel(job.id)
        audit.ledger.accepted.add(job.id)
        assert audit.try_to_scan()
        return job.id

    async def test_a_job_that_the_new_master_lacks_is_lost(
        self, queue: JobQueue, audit: Audit, meddler: Redis, failover: Callable[[], None]
    ) -> None:
        job_id = await self.ended(queue, audit)
        failover()
        meddler.delete(keys.job(job_id), keys.events(job_id))
        assert audit.try_to_scan()
        assert (audit.lost, audit.count("cancelled")) == ({job_id}, 0)

    async def test_a_job_that_had_expired_is_not(
        self, queue: JobQueue, masters: list[Redis], ledger: Ledger, meddler: Redis, failover: Callable[[], None]
    ) -> None:
        audit = Audit(lambda: masters[-1], ledger, kept=0)
        job_id = await self.ended(queue, audit)
        failover()
        meddler.delete(keys.job(job_id), keys.events(job_id))
        assert audit.try_to_scan()
        assert (audit.lost, audit.count("cancelled")) == (set(), 1)

    async def test_a_job_that_expires_while_the_audit_looks_is_not(
        self, queue: JobQueue, masters: list[Redis], ledger: Ledger, meddler: Redis, failover: Callable[[], None]
    ) -> None:
        audit = Audit(lambda: masters[-1], ledger, kept=0)
        job_id = await self.ended(queue, audit)
        failover()
        meddler.delete(keys.job(job_id))
        meddler.hset(keys.job(job_id), "found", "by the scan, and expired since")
        assert audit.try_to_scan()
        assert (audit.lost, audit.count("cancelled")) == (set(), 1)

    async def test_a_job_whose_end_no_replica_had_must_end_again(
        self, queue: JobQueue, audit: Audit, meddler: Redis, failover: Callable[[], None]
    ) -> None:
        job_id = await self.ended(queue, audit)
        failover()
        meddler.hset(keys.job(job_id), "status", "waiting")
        meddler.xtrim(keys.events(job_id), maxlen=0)
        assert audit.try_to_scan()
        assert (audit.lost, audit.undone, audit.ledger.broken) == ({job_id}, {job_id}, [])
        meddler.xadd(keys.events(job_id), {"event": Cancelled().model_dump_json()})
        meddler.hset(keys.job(job_id), "status", "cancelled")
        assert audit.try_to_scan()
        assert (audit.lost, audit.undone, audit.ledger.broken) == (set(), {job_id}, [])


class TestWatch:
    def test_accepts_events_in_order(self, ledger: Ledger) -> None:
        watch = Watch("job", ledger)
        for event_id, kind in (("5-0", "queued"), ("5-1", "started"), ("10-0", "completed")):
            watch.see(event_id, kind)
        assert (watch.terminal, watch.last_id, ledger.broken) == ("completed", "10-0", [])

    @pytest.mark.parametrize(("event_id", "kind"), [("10-0", "preview"), ("9-0", "preview"), ("11-0", "failed")])
    def test_finds_repeated_events_and_events_after_the_end(self, ledger: Ledger, event_id: str, kind: str) -> None:
        watch = Watch("job", ledger)
        watch.see("10-0", "completed")
        watch.see(event_id, kind)
        assert ledger.broken


class TestMemory:
    def test_distinguishes_growth_from_noise(self) -> None:
        memory, noise = Memory(), Random(0)
        for number in range(10 * MIN_SAMPLES):
            base = LARGE + noise.randint(-20 << 20, 20 << 20)
            memory.sample({"flat": base, "growing": base + number * ALLOWED_BYTES // MIN_SAMPLES, "away": 0})
        assert memory.grown() == ["growing"]
        assert memory.course().keys() == memory.trend().keys() == {"flat", "growing"}
        assert abs(memory.trend()["flat"]) < ALLOWED_BYTES

    @pytest.mark.parametrize("at", [[0.2], [0.6], [0.9], [0.5, 0.7], [0.4, 0.45, 0.8]])
    def test_steps_to_a_new_high_water_mark_are_no_leak(self, at: list[float]) -> None:
        memory = Memory()
        for number in range(10 * MIN_SAMPLES):
            memory.sample({"x": LARGE + sum(9 * ALLOWED_BYTES for step in at if number >= step * 10 * MIN_SAMPLES)})
        assert memory.grown() == []

    def test_peaks_are_no_leak(self) -> None:
        memory, chance = Memory(), Random(0)
        for number in range(10 * MIN_SAMPLES):
            memory.sample({"x": LARGE + (number << 20 if chance.random() < 0.5 else 0)})
        assert memory.grown() == []

    def test_traffic_that_comes_and_goes_is_no_leak(self) -> None:
        """Most parts lie above the one before, and some far below."""
        memory = Memory()
        for number in range(12 * MIN_SAMPLES):
            memory.sample({"x": LARGE + ALLOWED_BYTES * (number // MIN_SAMPLES % 4)})
        assert memory.grown() == []

    def test_many_small_steps_are_a_leak(self) -> None:
        memory = Memory()
        for number in range(10 * MIN_SAMPLES):
            memory.sample({"x": LARGE + number // MIN_SAMPLES * (ALLOWED_BYTES // 2)})
        assert memory.grown() == ["x"]

    def test_reports_nothing_without_enough_samples(self) -> None:
        memory = Memory()
        for number in range(MIN_SAMPLES - 1):
            memory.sample({"x": number * ALLOWED_BYTES})
        assert memory.grown() == []


class Repeating(Client):
    """Records who is asked to accept what, and gets an answer to the fourth request."""

    def __init__(self, *versions: Version) -> None:
        members = [Member("gateway", "gateway", {}, Path("log"), version=version) for version in versions]
        super().__init__(members, Ledger(), Random(0))
        self.models = [{"id": "model", "patchforge": {"classes": []}}]
        self.asked: list[tuple[bool, list[Version]]] = []

    async def _submit(
        self, request: dict[str, Any], key: str | None = None, gateways: Sequence[Member] = ()
    ) -> str | None:
        self.asked.append((key is not None, [gateway.version for gateway in gateways]))
        return "job" if len(self.asked) == 4 else None

    async def _follow(self, job_id: str) -> None:
        assert job_id == "job"


class TestRepeatedRequests:
    """An older version may confirm a request that it had before although no replica has its job."""

    async def test_only_gateways_of_this_version_get_them(self) -> None:
        client = Repeating(OLDER, TODAY)
        await client.repeat_a_request()
        assert client.asked == [(True, [TODAY])] * 6

    async def test_without_any_the_request_is_sent_once(self) -> None:
        client = Repeating(OLDER, OLDER)
        await client.repeat_a_request()
        assert client.asked == [(False, [])]


async def test_a_comment_between_events_is_no_event(ledger: Ledger) -> None:
    sent = "id: 1-0\nevent: started\ndata: {}\n\n: keep-alive\n\nid: 1-1\nevent: completed\ndata: {}\n\n"
    stream = httpx.Response(200, headers={"content-type": "text/event-stream"}, text=sent)
    watch = Watch("job", ledger)
    async with httpx.AsyncClient(base_url="http://gateway", transport=httpx.MockTransport(lambda _: stream)) as http:
        await Client([], ledger, Random(0))._listen(http, watch)
    assert watch.terminal == "completed"
    assert ledger.broken == []
