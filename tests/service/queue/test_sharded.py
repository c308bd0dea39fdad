"""One queue on several real servers, as gateways use it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack

import pytest
from ulid import ULID

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import (
    IdempotencyConflict,
    NeverRoom,
    NoRoom,
    NotFound,
    QueueFull,
    QueueRefused,
    TooManyJobs,
    Unavailable,
)
from patchforge.service.messages.events import Cancelled
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import JobQueue, ShardedQueue, connect, connect_all, connection, keys, sharded
from patchforge.service.queue.files import megabytes
from patchforge.service.queue.ids import MOST_SERVERS, new_id, server_of
from patchforge.service.settings import Settings
from tests.service.queue.kit import a_card, a_request, claimed, eventually

Servers = list[EmbeddedServer]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield [stack.enter_context(EmbeddedServer(tmp_path_factory.mktemp(f"server{number}"))) for number in range(3)]


def settings_for(servers: Servers, **limits: int) -> Settings:
    return Settings(redis_urls=[server.url for server in servers], max_waiting=8, **limits)


@pytest.fixture
async def queue(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ShardedQueue]:
    """An empty queue on the servers, all of which run."""
    monkeypatch.setattr(sharded, "RETRY_SECONDS", 0.05)
    for server in servers:
        if not server.running:  # a test stopped it
            server.start()
    whole = connect(settings_for(servers))
    assert isinstance(whole, ShardedQueue)
    await asyncio.gather(*(shard._do("FLUSHALL") for shard in whole.shards))
    yield whole
    await whole.close()


async def sent(queue: ShardedQueue, server: int) -> str:
    """Returns a new job on this server."""
    return (await queue.shards[server].submit(a_request())).id


class TestIds:
    def test_name_the_server_and_are_valid_ulids_in_order(self) -> None:
        for server in range(MOST_SERVERS):
            first, second = new_id(server), new_id(server)
            assert server_of(first) == server
            assert abs(ULID.from_str(f"0{first[1:]}").timestamp - ULID.from_str(f"0{second[1:]}").timestamp) < 60
            ULID.from_str(first)

    def test_of_before_there_were_several_belong_to_the_first(self) -> None:
        assert server_of(str(ULID())) == 0

    @pytest.mark.parametrize("name", ["", "8" + "0" * 25, "Z" * 26, "²" * 26])
    def test_that_can_be_on_no_server(self, name: str) -> None:
        assert server_of(name) == -1


class TestSettings:
    @pytest.mark.parametrize("text", ["{0},{1}", "{0} {1}", " {0}\n{1},\n", '["{0}", "{1}"]'])
    def test_list_of_servers(self, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        urls = ["redis+sentinel://a.test,b.test:26380/queue", "rediss://:pass%2Cword@c.test"]
        monkeypatch.setenv("PATCHFORGE_REDIS_URLS", text.format(*urls))
        monkeypatch.setenv("REDIS_URL", "redis://other.test")
        assert Settings().queue_urls == urls

    def test_one_server(self) -> None:
        settings = Settings(redis_url="redis://a.test")
        assert settings.queue_urls == ["redis://a.test"]
        assert isinstance(connect(settings), JobQueue)

    @pytest.mark.parametrize(
        ("urls", "problem"),
        [
            (["redis://a.test", "redis://a.test"], "twice"),
            (["redis://a.test", "redis://:s3cret/x@b.test"], "must be redis://"),
            ([f"redis://{number}.test" for number in range(9)], "at most 8"),
        ],
    )
    def test_unusable_lists(self, urls: list[str], problem: str) -> None:
        with pytest.raises(ValueError, match=problem) as caught:
            Settings(redis_urls=urls)
        assert "s3cret" not in str(caught.value)


class TestPlaces:
    async def test_jobs_go_to_every_server_and_are_found_there(self, queue: ShardedQueue) -> None:
        jobs = [(await queue.submit(a_request(seed=seed))).id for seed in range(20)]
        assert set(map(server_of, jobs)) == {0, 1, 2}
        assert [(await queue.get(job)).request.seed for job in jobs] == list(range(20))
        counts = [sum((await shard.backlog()).jobs.values()) for shard in queue.shards]
        assert counts == [Counter(map(server_of, jobs))[server] for server in range(3)]
        assert (await queue.backlog()).jobs == {"emoji": 20}

    async def test_a_key_finds_its_job_again(self, queue: ShardedQueue) -> None:
        for key in map(str, range(6)):
            first = await queue.submit(a_request(), idempotency_key=key, tenant="alice")
            assert (await queue.submit(a_request(), idempotency_key=key, tenant="alice")).id == first.id
            with pytest.raises(IdempotencyConflict):
                await queue.submit(a_request(seed=2), idempotency_key=key, tenant="alice")

    async def test_limits_count_all_jobs_of_a_tenant(self, queue: ShardedQueue, servers: Servers) -> None:
        limited = connect(settings_for(servers, max_in_flight=2))
        for tenant in ("alice", "bob", "carol", None):
            two = [await limited.submit(a_request(), tenant=tenant) for _ in range(2)]
            with pytest.raises(TooManyJobs):
                await limited.submit(a_request(), tenant=tenant)
            await asyncio.gather(*(limited.cancel(job.id) for job in two))
        await limited.close()

    async def test_a_full_server_leaves_jobs_to_the_others(self, queue: ShardedQueue) -> None:
        for _ in range(3 * 8):
            await queue.submit(a_request())
        with pytest.raises(QueueFull):
            await queue.submit(a_request())

    async def test_few_names_move_when_a_server_is_added(self, queue: ShardedQueue) -> None:
        two = ShardedQueue(queue.shards[:2], Settings())
        names = [f"tenant-{number}" for number in range(300)]
        moved = [name for name in names if two._home(name) is not queue._home(name)]
        assert 50 < len(moved) < 150
        assert {queue._home(name).number for name in moved} == {2}

    async def test_ids_of_other_servers_name_no_job(self, queue: ShardedQueue) -> None:
        for unknown in (new_id(1), new_id(5), "Z" * 26, "no id"):
            with pytest.raises(NotFound):
                await queue.get(unknown)
            with pytest.raises(NotFound):
                await anext(queue.watch(unknown))

    async def test_events_and_cancel(self, queue: ShardedQueue) -> None:
        job = await sent(queue, 2)
        events = queue.watch(job)
        await anext(events)
        assert (await queue.cancel(job)).status is JobStatus.CANCELLED
        assert isinstance((await anext(events))[1], Cancelled)
        assert isinstance((await queue.wait_for_end(job))[0], Cancelled)

    async def test_all_workers_are_known_once(self, queue: ShardedQueue) -> None:
        for shard in queue.shards:
            await shard.announce("one", [a_card("emoji")], b"metrics of one")
        await queue.shards[2].announce("two", [a_card("emoji")])
        assert set(await queue.workers()) == set(await queue.known_workers()) == {"one", "two"}
        assert await queue.worker_metrics() == [("one", b"metrics of one")]
        assert (await queue.backlog()).workers == 2


class TestFiles:
    async def test_are_with_their_batches_on_one_server(self, queue: ShardedQueue) -> None:
        homes = set()
        for tenant in map(str, range(8)):
            file = await queue.add_file([b'{"custom_id":"a"}'], "lines", tenant, 60)
            batch = await queue.create_batch(file.id, tenant, endpoint=None, window="24h", metadata=None)
            assert [line async for line in queue.file_lines(file.id)] == [b'{"custom_id":"a"}']
            assert (await queue.batch(batch.id, tenant)).batch.input_file_id == file.id
            assert [each.id for each in (await queue.files(tenant, None, 10))[0]] == [file.id]
            assert [each.id for each in (await queue.batches(tenant, None, 10))[0]] == [batch.id]
            assert server_of(file.id[-26:]) == server_of(batch.id[-26:])
            homes.add(server_of(file.id[-26:]))
        assert len(homes) > 1
        assert await queue.count_batches() == {"in_progress": 8}

    async def test_of_the_time_before_a_server_was_added_are_listed_last(self, queue: ShardedQueue) -> None:
        moved = next(name for name in map(str, range(99)) if queue._home(name).number == 2)
        before = ShardedQueue(queue.shards[:2], Settings())
        old = [(await before.add_file([b"x"], "old", moved, 60)).id for _ in range(3)]
        new = [(await queue.add_file([b"x"], "new", moved, 60)).id for _ in range(2)]
        seen: list[str] = []
        more = True
        while more:
            page, more = await queue.files(moved, seen[-1] if seen else None, 2)
            assert 0 < len(page) <= 2
            seen += [each.id for each in page]
        assert seen == [*reversed(new), *reversed(old)]

    async def test_elsewhere_are_left_out_while_their_server_is_away(
        self, queue: ShardedQueue, servers: Servers
    ) -> None:
        tenant = next(name for name in map(str, range(99)) if queue._home(name).number == 0)
        file = await queue.add_file([b"x"], "file", tenant, 60)
        servers[1].stop()
        assert [each.id for each in (await queue.files(tenant, None, 10))[0]] == [file.id]
        servers[0].stop()
        with pytest.raises(Unavailable):
            await queue.files(tenant, None, 10)


class TestChanges:
    async def test_a_key_of_the_time_before_a_server_was_added_finds_its_job(self, queue: ShardedQueue) -> None:
        before = ShardedQueue(queue.shards[:1], Settings())
        for key in map(str, range(12)):
            first = await before.submit(a_request(), idempotency_key=key, tenant="alice")
            assert (await queue.submit(a_request(), idempotency_key=key, tenant="alice")).id == first.id
            await before.cancel(first.id)
        with pytest.raises(IdempotencyConflict):
            await queue.submit(a_request(seed=9), idempotency_key="0", tenant="alice")

    async def test_a_server_that_drains_gets_nothing_new_and_keeps_what_it_has(
        self, queue: ShardedQueue, servers: Servers
    ) -> None:
        old = await sent(queue, 2)
        key = next(key for key in map(str, range(99)) if queue._home(keys.idempotency(key)).number == 2)
        keyed = await queue.submit(a_request(), idempotency_key=key)
        draining = ShardedQueue(queue.shards, Settings(redis_draining="2"))
        assert {server_of((await draining.submit(a_request())).id) for _ in range(10)} == {0, 1}
        assert (await draining.add_file([b"x"], "file", "a", 60)).id[5] in "01"
        assert (await draining.get(old)).status is JobStatus.WAITING
        assert (await draining.submit(a_request(), idempotency_key=key)).id == keyed.id


class TestOutages:
    async def test_a_server_without_its_replicas_is_left_alone(
        self, queue: ShardedQueue, servers: Servers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection, "REPLICAS_TIMEOUT", 0.05)
        lacking = connect(settings_for(servers))
        assert isinstance(lacking, ShardedQueue)
        lacking.shards[0]._wait_replicas = 1
        for _ in range(30):
            assert server_of((await lacking.submit(a_request(), room=0)).id) in (1, 2)
            await asyncio.gather(*(lacking.cancel(job) for job in await waiting_on(lacking.shards[1:])))
        orphans = await waiting_on([lacking.shards[0]])
        assert len(orphans) <= 1
        await lacking.close()

    async def test_refused_for_lack_of_room_counts_once_and_only_if_all_refuse(
        self, queue: ShardedQueue, servers: Servers
    ) -> None:
        counted: list[None] = []
        queue.on_no_room = lambda: counted.append(None)
        room = (await queue.shards[0].memory()).admission_limit - (await queue.shards[0].memory()).used - 10_000_000
        for shard in queue.shards[:2]:
            await shard.submit(a_request(), room=room)
        for _ in range(6):
            await queue.submit(a_request(), room=20_000_000)
            for job in await waiting_on(queue.shards[2:]):
                await queue.cancel(job)
        assert not counted
        await queue.shards[2].submit(a_request(), room=room)
        with pytest.raises(NoRoom):
            await queue.submit(a_request(), room=20_000_000)
        assert len(counted) == 1

    async def test_too_large_for_good_means_for_every_server_that_may_take_the_job(
        self, queue: ShardedQueue, servers: Servers
    ) -> None:
        counted: list[None] = []
        queue.on_no_room = lambda: counted.append(None)
        room, usual = 200_000_000, (await queue.shards[0].memory()).limit
        for shard in queue.shards[:2]:
            await shard._do("CONFIG", "SET", "maxmemory", 100_000_000)
        try:
            for _ in range(6):
                job = await queue.submit(a_request(), room=room)
                assert server_of(job.id) == 2
                await queue.cancel(job.id)
            memory = await queue.shards[2].memory()
            job = await queue.shards[2].submit(a_request(), room=memory.admission_limit - memory.used - room // 2)
            with pytest.raises(NoRoom):
                await queue.submit(a_request(), room=room)
            await queue.cancel(job.id)
            with pytest.raises(NeverRoom, match=f"has {megabytes(memory.admission_limit)} for"):
                await queue.submit(a_request(), room=10**12)
            assert len(counted) == 2
            key = next(key for key in map(str, range(99)) if queue._home(keys.idempotency(key)).number == 0)
            with pytest.raises(NeverRoom):
                await queue.submit(a_request(), room=room, idempotency_key=key)
            servers[2].stop()
            for _ in range(2):  # the second time it is known to be away, and is not asked
                with pytest.raises(Unavailable):
                    await queue.submit(a_request(), room=room)
        finally:
            for shard in queue.shards[:2]:
                await shard._do("CONFIG", "SET", "maxmemory", usual)

    async def test_one_server_costs_only_its_own_jobs(self, queue: ShardedQueue, servers: Servers) -> None:
        here, there = await sent(queue, 0), await sent(queue, 1)
        for shard in queue.shards:
            await shard.announce("worker", [a_card("emoji")])
        assert (await queue.backlog()).jobs == {"emoji": 2}
        servers[1].stop()
        await queue.check_server()
        assert {server_of((await queue.submit(a_request())).id) for _ in range(12)} == {0, 2}
        assert (await queue.get(here)).status is JobStatus.WAITING
        with pytest.raises(Unavailable):
            await queue.get(there)
        assert set(await queue.known_workers()) == {"worker"}
        assert (await queue.backlog()).jobs == {"emoji": 14}, "its job still waits"
        servers[1].start()
        assert (await eventually(lambda: found(queue, there))) is JobStatus.WAITING
        await eventually(lambda: landed_on(queue, 1))

    async def test_a_key_whose_server_is_away_makes_no_second_job(self, queue: ShardedQueue, servers: Servers) -> None:
        job = await queue.submit(a_request(), idempotency_key="once")
        servers[server_of(job.id)].stop()
        with pytest.raises(Unavailable):
            await queue.submit(a_request(), idempotency_key="once")

    async def test_without_any_server(self, queue: ShardedQueue, servers: Servers) -> None:
        for server in servers:
            server.stop()
        for call in (queue.check_server(), queue.submit(a_request()), queue.workers()):
            with pytest.raises(Unavailable):
                await call

    async def test_counts_come_from_the_last_answer(self, queue: ShardedQueue, servers: Servers) -> None:
        await sent(queue, 0)
        await claimed(queue.shards[0])
        assert await queue.held() == {"emoji": 1}
        servers[0].stop()
        assert await queue.held() == {"emoji": 1}


async def test_another_order_of_the_list_is_refused(queue: ShardedQueue, servers: Servers) -> None:
    await queue.check_server()
    shuffled = connect_all(settings_for([servers[1], servers[0], servers[2]]))
    with pytest.raises(QueueRefused, match="number 1 of other processes"):
        await shuffled[0].check_not_refused()
    await shuffled[2].check_not_refused()
    alone = JobQueue.connect(servers[2].url, Settings())
    with pytest.raises(QueueRefused):
        await alone.check_not_refused()
    for each in (*shuffled, alone):
        await each.close()


async def test_a_server_that_was_alone_stays_the_first(queue: ShardedQueue, servers: Servers) -> None:
    alone = JobQueue.connect(servers[1].url, Settings())
    await alone._do("DEL", keys.SERVER)
    await alone.check_server()
    with pytest.raises(QueueRefused):
        await queue.shards[1].check_server()
    await alone.close()


async def waiting_on(shards: Sequence[JobQueue]) -> list[str]:
    """Returns the ids of the jobs that wait on these servers."""
    entries = [entry for shard in shards for entry in await shard._do("ZRANGE", keys.WAITING, 0, -1)]
    return [entry.decode().partition(":")[0] for entry in entries]


async def found(queue: ShardedQueue, job_id: str) -> JobStatus | None:
    try:
        return (await queue.get(job_id)).status
    except Unavailable:
        return None


async def landed_on(queue: ShardedQueue, server: int) -> bool | None:
    job = await queue.submit(a_request())
    await queue.cancel(job.id)
    return server_of(job.id) == server or None
