"""A worker on several real queue servers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack

import pytest

from patchforge.model.pipeline import Pipeline
from patchforge.service.embedded import EmbeddedServer
from patchforge.service.messages.events import TERMINAL_EVENTS, Completed, Started
from patchforge.service.messages.schemas import Job, JobStatus
from patchforge.service.messages.source import Source
from patchforge.service.queue import JobQueue, connect_all, keys, work
from patchforge.service.settings import Settings
from patchforge.service.worker import link as links
from patchforge.service.worker import outbox
from patchforge.service.worker.outcomes import Outcome
from patchforge.service.worker.worker import Worker
from tests.patience import PATIENCE
from tests.service.queue.kit import eventually, silenced
from tests.service.worker.jobs import request, slow_down
from tests.service.worker.test_source_images import source
from tests.service.worker.test_worker import BUDGETS, first, running


@pytest.fixture
def servers(tmp_path_factory: pytest.TempPathFactory) -> list[EmbeddedServer]:
    with ExitStack() as stack:
        yield [stack.enter_context(EmbeddedServer(tmp_path_factory.mktemp("server"))) for _ in range(2)]


@pytest.fixture
def both(servers: list[EmbeddedServer]) -> Settings:
    return Settings(redis_urls=[server.url for server in servers], preview_interval_seconds=0.0)


@pytest.fixture
async def queues(both: Settings) -> AsyncIterator[list[JobQueue]]:
    """The queue on each server, for callers."""
    queues = connect_all(both)
    yield queues
    await asyncio.gather(*(queue.close() for queue in queues))


@pytest.fixture
async def of_worker(both: Settings) -> AsyncIterator[list[JobQueue]]:
    queues = connect_all(both)
    yield queues
    await asyncio.gather(*(queue.close() for queue in queues))


def before_each_step(worker: Worker, look: Callable[[], object]) -> None:
    step = worker.engine.step

    def watched() -> list[Outcome]:
        look()
        return step()

    worker.engine.step = watched


async def status(queue: JobQueue, job: Job) -> JobStatus:
    return (await queue.get(job.id)).status


async def test_jobs_of_all_servers_share_the_engine(
    both: Settings, queues: list[JobQueue], of_worker: list[JobQueue], pipelines: dict[str, Pipeline]
) -> None:
    worker = Worker(both, of_worker, pipelines, BUDGETS)
    together: set[int] = set()

    def look() -> None:
        while not together and len(worker.claims) < 2:  # the first step waits for the other server's job
            time.sleep(0.01)
        together.add(len(worker.engine.jobs))

    before_each_step(worker, look)
    jobs = [(queue, await queue.submit(request(steps=20, n=2))) for queue in queues]
    async with running(worker):
        for queue, job in jobs:
            assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
            assert (await queue.image(job.id, 1)).startswith(b"\x89PNG")
            assert set(await queue.workers()) == {worker.id}
            assert [name for name, _ in await queue.worker_metrics()] == [worker.id]
    assert max(together) == 2
    for queue in queues:
        assert not await queue.workers()


async def test_a_server_that_stops_costs_only_its_own_jobs(
    both: Settings,
    servers: list[EmbeddedServer],
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(both, of_worker, pipelines, BUDGETS)
    stopped = asyncio.Event()
    slow_down(worker, monkeypatch, until=stopped.is_set)
    async with running(worker):
        cut_off = await queues[1].submit(request(steps=200, n=10))
        await first(queues[1], cut_off.id, Started)
        servers[1].stop()
        stopped.set()
        for _ in range(3):
            job = await queues[0].submit(request())
            assert isinstance(await first(queues[0], job.id, TERMINAL_EVENTS), Completed)
        assert cut_off.id in worker.claims
        servers[1].start()
        assert isinstance(await eventually(lambda: ended(queues[1], cut_off)), Completed)
        assert (await queues[1].get(cut_off.id)).attempt == 1
        after = await queues[1].submit(request())
        assert isinstance(await first(queues[1], after.id, TERMINAL_EVENTS), Completed)


@pytest.mark.parametrize("most", [1, 16])
async def test_drawn_jobs_of_an_absent_server_hold_nothing_up(
    both: Settings,
    servers: list[EmbeddedServer],
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    monkeypatch: pytest.MonkeyPatch,
    most: int,
) -> None:
    """Neither the room that they take, nor their messages, although few may wait."""
    monkeypatch.setattr(outbox, "MOST_WAITING", 2)
    worker = Worker(both.model_copy(update={"max_running": most}), of_worker, pipelines, BUDGETS)
    away = threading.Event()
    drawn = [await queues[1].submit(request(steps=20, n=4)) for _ in range(min(most, 3))]

    def look() -> None:
        """They do not end before the server is away."""
        if len(worker.claims) == len(drawn):
            away.wait(PATIENCE)

    before_each_step(worker, look)
    async with running(worker):
        for job in drawn:
            await first(queues[1], job.id, Started)
        servers[1].stop()
        away.set()
        await eventually(lambda: all_told(worker, drawn))
        job = await queues[0].submit(request())
        assert isinstance(await first(queues[0], job.id, TERMINAL_EVENTS), Completed)
        servers[1].start()
        for job in drawn:
            assert isinstance(await eventually(lambda job=job: ended(queues[1], job)), Completed)


async def test_the_source_of_an_absent_server_is_waited_for_beside_other_jobs(
    both: Settings,
    servers: list[EmbeddedServer],
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = Worker(both, of_worker, pipelines, BUDGETS)
    read, asked = of_worker[1].source, list[str]()

    async def away(job_id: str) -> Source:
        if not asked:
            servers[1].stop()
        asked.append(job_id)
        return await read(job_id)

    monkeypatch.setattr(of_worker[1], "source", away)
    edit = await queues[1].submit(request(image="sha256:x", sampler="adaptive"), source=source())
    async with running(worker):
        await eventually(lambda: stopped(servers[1]))
        job = await queues[0].submit(request())
        assert isinstance(await first(queues[0], job.id, TERMINAL_EVENTS), Completed)
        servers[1].start()
        assert isinstance(await eventually(lambda: ended(queues[1], edit)), Completed)


async def test_a_worker_starts_while_a_server_is_away(
    both: Settings,
    servers: list[EmbeddedServer],
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    capsys: pytest.CaptureFixture[str],
) -> None:
    servers[0].stop()
    async with running(Worker(both, of_worker, pipelines, BUDGETS)):
        job = await queues[1].submit(request())
        assert isinstance(await first(queues[1], job.id, TERMINAL_EVENTS), Completed)
        servers[0].start()
        late = await queues[0].submit(request())
        assert isinstance(await first(queues[0], late.id, TERMINAL_EVENTS), Completed)
    assert "server=0" in capsys.readouterr().out


async def test_all_servers_together_fill_no_more_than_the_room(
    both: Settings, queues: list[JobQueue], of_worker: list[JobQueue], pipelines: dict[str, Pipeline]
) -> None:
    jobs = [(queue, await queue.submit(request(steps=8))) for queue in queues for _ in range(4)]
    worker = Worker(both.model_copy(update={"max_running": 3}), of_worker, pipelines, BUDGETS)
    held: set[int] = set()
    before_each_step(worker, lambda: held.add(len(worker.claims)))
    async with running(worker):
        for queue, job in jobs:
            assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
    assert max(held) == 3


async def test_a_job_on_its_last_attempt_runs_alone_whatever_server_has_it(
    both: Settings, queues: list[JobQueue], of_worker: list[JobQueue], pipelines: dict[str, Pipeline]
) -> None:
    suspect = await queues[0].submit(request(steps=5))
    for dead in range(2):
        claim = await queues[0].claim("dead", ["tiny-class"], block_seconds=0, take_over=False) or (
            await queues[0].reclaim("dead too", ["tiny-class"])
        )
        assert claim is not None
        assert claim.attempt == dead + 1
        await silenced(queues[0], claim)
    other = await queues[1].submit(request(steps=5, n=4))
    worker = Worker(both, of_worker, pipelines, BUDGETS)
    together: list[set[str]] = []
    before_each_step(worker, lambda: together.append(set(worker.engine.jobs)))
    async with running(worker):
        assert isinstance(await first(queues[0], suspect.id, TERMINAL_EVENTS), Completed)
        assert isinstance(await first(queues[1], other.id, TERMINAL_EVENTS), Completed)
    assert [jobs for jobs in together if suspect.id in jobs] == [{suspect.id}] * 5


async def test_a_bell_that_a_busy_worker_hears_rings_on(
    both: Settings,
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It waited at the second server while it was idle, and has a job of the first one when the bell rings."""
    monkeypatch.setattr(links, "LOOK_SECONDS", 3600)
    monkeypatch.setattr(work, "LONGEST_BLOCK", 3600)
    rung: list[str] = []
    ring = of_worker[1].ring

    async def watched_ring(bell: str) -> None:
        rung.append(bell)
        await ring(bell)

    monkeypatch.setattr(of_worker[1], "ring", watched_ring)
    worker = Worker(both.model_copy(update={"max_running": 1}), of_worker, pipelines, BUDGETS)
    async with running(worker):
        await eventually(lambda: waits(queues[1]))
        slow_down(worker, monkeypatch)
        long = await queues[0].submit(request(steps=200, n=10))
        await first(queues[0], long.id, Started)
        second = asyncio.create_task(queues[1].wait_for_job(["tiny-class"], 60))  # an idle worker, next in line
        await eventually(lambda: waits(queues[1], 2))
        job = await queues[1].submit(request())
        assert await second == keys.bell("tiny-class")
        assert rung == [keys.bell("tiny-class")]
        assert await status(queues[1], job) is JobStatus.WAITING
        await queues[0].cancel(long.id)


async def test_a_bell_that_a_worker_hears_just_as_it_fills_up_rings_on(
    both: Settings,
    queues: list[JobQueue],
    of_worker: list[JobQueue],
    pipelines: dict[str, Pipeline],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It had room for one more job when it waited at the second server, and the first one's next job took that."""
    monkeypatch.setattr(links, "LOOK_SECONDS", 3600)
    monkeypatch.setattr(work, "LONGEST_BLOCK", 3600)
    worker = Worker(both.model_copy(update={"max_running": 2}), of_worker, pipelines, BUDGETS)
    wait, busy, long = of_worker[1].wait_for_job, asyncio.Event(), list[Job]()
    next_in_line: list[asyncio.Task[str | None]] = []

    async def begin_long() -> None:
        long.append(await queues[0].submit(request(steps=200, n=10)))
        await first(queues[0], long[-1].id, Started)

    async def fills_up_meanwhile(models: Sequence[str], seconds: float) -> str | None:
        if worker.claims:
            busy.set()
        bell = await wait(models, min(seconds, links.YIELD_SECONDS))
        if bell is not None and not next_in_line:
            await begin_long()
            next_in_line.append(asyncio.create_task(queues[1].wait_for_job(["tiny-class"], 60)))
            await eventually(lambda: waits(queues[1]))
        return bell

    monkeypatch.setattr(of_worker[1], "wait_for_job", fills_up_meanwhile)
    slow_down(worker, monkeypatch)
    async with running(worker):
        await begin_long()
        await busy.wait()
        job = await queues[1].submit(request())
        await eventually(lambda: begun(next_in_line))
        assert await next_in_line[0] == keys.bell("tiny-class")
        assert await status(queues[1], job) is JobStatus.WAITING
        for each in long:
            await queues[0].cancel(each.id)


async def begun(tasks: Sequence[asyncio.Task[str | None]]) -> bool | None:
    return bool(tasks) or None


async def all_told(worker: Worker, jobs: list[Job]) -> bool | None:
    """Whether the end of each job waits to be told."""
    return all(worker.links[1].outbox.ends(job.id) for job in jobs) or None


async def stopped(server: EmbeddedServer) -> bool | None:
    return not server.running or None


async def ended(queue: JobQueue, job: Job) -> object:
    try:
        return (await queue.wait_for_end(job.id))[0]
    except Exception:
        return None


async def waits(queue: JobQueue, workers: int = 1) -> bool | None:
    """Whether so many wait for a job; the worker also waits to hear of cancelled ones."""
    return (await queue._do("INFO", "clients"))["blocked_clients"] > workers or None
