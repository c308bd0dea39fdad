"""The worker on a real queue."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from patchforge.model.pipeline import Pipeline
from patchforge.service import memory
from patchforge.service.messages.events import (
    TERMINAL_EVENTS,
    Cancelled,
    Completed,
    Event,
    Failed,
    ImageReady,
    Preview,
    Queued,
    Started,
)
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import Claim, Heartbeat, JobQueue, keys
from patchforge.service.queue.claims import Delivery
from patchforge.service.settings import Settings
from patchforge.service.worker import outbox
from patchforge.service.worker.outages import Outages
from patchforge.service.worker.outcomes import Outcome
from patchforge.service.worker.worker import Worker
from tests.patience import PATIENCE
from tests.service.queue.kit import silenced
from tests.service.worker.jobs import request, slow_down
from tests.service.worker.test_source_images import source

Running = Callable[..., object]
BUDGETS = {"tiny-class": 4096, "tiny-text": 4096}


@asynccontextmanager
async def running(worker: Worker) -> AsyncIterator[asyncio.Task[None]]:
    task, test = asyncio.create_task(worker.run()), asyncio.current_task()
    # If the worker crashed, the test would wait for events.
    task.add_done_callback(lambda ended: test.cancel() if not ended.cancelled() and ended.exception() else None)
    try:
        yield task
    finally:
        worker.draining.set()
        await task


@pytest.fixture
def worker(settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline]) -> Worker:
    return Worker(settings.model_copy(update={"preview_interval_seconds": 0.0}), [queue], pipelines, BUDGETS)


async def events(queue: JobQueue, job_id: str) -> list[Event]:
    return [event async for _, event in queue.watch(job_id)]


async def first(queue: JobQueue, job_id: str, kind: type) -> Event:
    async for _, event in queue.watch(job_id):
        if isinstance(event, kind):
            return event
    raise AssertionError(f"no {kind.__name__}")


async def claimed(queue: JobQueue) -> Claim:
    """A claim of a worker that never responds again."""
    claim = await queue.claim("dead", ["tiny-class"], block_seconds=0)
    assert claim is not None
    return claim


async def test_a_job_runs_from_queued_to_completed(worker: Worker, queue: JobQueue) -> None:
    async with running(worker):
        job = await queue.submit(request(n=2, steps=4))
        seen = await events(queue, job.id)
    kinds = [type(event) for event in seen]
    assert kinds[:2] == [Queued, Started]
    assert kinds[-1] is Completed
    assert kinds.count(ImageReady) == 2
    assert Preview in kinds
    assert sum(isinstance(event, TERMINAL_EVENTS) for event in seen) == 1
    stored = await queue.get(job.id)
    assert stored.status is JobStatus.COMPLETED
    assert stored.report == seen[-1].report
    assert (await queue.image(job.id, 1)).startswith(b"\x89PNG")
    exposition = worker.metrics.exposition().decode()
    assert 'patchforge_patch_evaluations_total{model="tiny-class",sampler="euler"} 256.0' in exposition
    assert 'patchforge_requests_total{model="tiny-class",sampler="euler",status="completed"} 1.0' in exposition
    assert 'patchforge_requests_running{model="tiny-class",sampler="euler"} 0.0' in exposition


async def test_news_that_nobody_waits_for_goes_with_the_picture(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", PATIENCE)  # the picture comes first, on any machine
    calls: list[list[str]] = []
    deliver = worker.links[0].queue.deliver

    async def watched_deliver(deliveries: Sequence[Delivery]) -> list[bool]:
        calls.append([what for what, *_ in deliveries])
        return await deliver(deliveries)

    monkeypatch.setattr(worker.links[0].queue, "deliver", watched_deliver)
    async with running(worker):
        job = await queue.submit(request(previews=False), quiet=True)
        assert isinstance((await queue.wait_for_end(job.id))[0], Completed)
        assert calls[0][0] == "publish"
        assert "store_image" in calls[0], "the news that it started waited for this call"
        calls.clear()
        job = await queue.submit(request(previews=False))
        await queue.wait_for_end(job.id)
        assert calls[0] == ["publish"], "someone may wait for the news that it started"


async def test_a_running_job_stops_when_cancelled(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = asyncio.Event()
    slow_down(worker, monkeypatch, until=cancelled.is_set)
    async with running(worker):
        job = await queue.submit(request(steps=200))
        await first(queue, job.id, Preview)
        await queue.cancel(job.id)
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Cancelled)
        cancelled.set()
        assert not worker.engine.jobs
        assert not worker.claims
        after = await queue.submit(request())
        assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)


async def test_a_job_that_does_not_fit_fails_with_the_reason(worker: Worker, queue: JobQueue) -> None:
    async with running(worker):
        job = await queue.submit(request(class_label="unicorn"))
        failed = await first(queue, job.id, TERMINAL_EVENTS)
    assert isinstance(failed, Failed)
    assert "unicorn" in failed.error.message


async def test_a_picture_that_the_worker_cannot_hold_fails_its_job_alone(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda: 1000.0)
    async with running(worker):
        job = await queue.submit(request(image="sha256:x", sampler="adaptive"), source=source())
        failed = await first(queue, job.id, TERMINAL_EVENTS)
        after = await queue.submit(request())
        assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)
    assert isinstance(failed, Failed)
    assert failed.error.code == "out_of_memory"


@pytest.mark.parametrize(
    "odd",
    [
        {"request": b"\xff\xfe"},
        {"request": b'{"prompt":"the caller\'s own words","sampler":{"name":"later"}}'},
        {"protocol": b"2"},
    ],
)
async def test_a_job_of_a_later_version_fails_at_once_and_the_worker_goes_on(
    worker: Worker,
    queue: JobQueue,
    redis_client: Redis,
    odd: dict[str, bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = await queue.submit(request())
    await redis_client.hset(keys.job(job.id), mapping=dict(odd))
    after = await queue.submit(request())
    async with running(worker):
        failed = await first(queue, job.id, TERMINAL_EVENTS)
        assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)
    assert isinstance(failed, Failed)
    assert failed.error.code == "unsupported"
    assert (await queue.get(job.id)).attempt == 1
    said = capsys.readouterr().out
    assert "own words" not in said + failed.error.message
    assert "Traceback" not in said
    assert 'patchforge_request_failures_total{code="unsupported",model="tiny-class"} 1.0' in (
        worker.metrics.exposition().decode()
    )


async def test_a_worker_leaves_what_it_cannot_do_to_others(worker: Worker, queue: JobQueue) -> None:
    special = await queue.submit(request(), needs={"sampler.later"})
    async with running(worker):
        after = await queue.submit(request())
        assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)
    assert (await queue.get(special.id)).status is JobStatus.WAITING


async def test_a_job_whose_preparation_stops_an_iteration_fails_and_the_worker_goes_on(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A StopIteration does not leave a thread by itself: the worker would wait for ever."""
    with monkeypatch.context() as patched:
        patched.setattr(worker.engine, "admit", lambda job, source: next(iter(())))
        async with running(worker), asyncio.timeout(PATIENCE):
            job = await queue.submit(request())
            failed = await first(queue, job.id, TERMINAL_EVENTS)
            patched.undo()
            after = await queue.submit(request())
            assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)
    assert isinstance(failed, Failed)
    assert failed.error.code == "preparation_failed"


async def test_several_jobs_share_evaluations(worker: Worker, queue: JobQueue) -> None:
    jobs = [await queue.submit(request(seed=seed, steps=6)) for seed in range(4)]
    async with running(worker):
        for job in jobs:
            assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
    samples = {
        (sample.name, sample.labels.get("le")): sample.value
        for metric in worker.registry.collect()
        if metric.name == "patchforge_evaluation_patches"
        for sample in metric.samples
    }
    assert samples["patchforge_evaluation_patches_count", None] == 6  # four jobs of six steps, packed
    assert samples["patchforge_evaluation_patches_sum", None] == 4 * 6 * 2 * 16


async def test_draining_finishes_what_runs(worker: Worker, queue: JobQueue) -> None:
    async with running(worker) as task:
        job = await queue.submit(request(steps=40))
        await first(queue, job.id, Started)
        worker.draining.set()
        await task
    assert (await queue.get(job.id)).status is JobStatus.COMPLETED
    assert await queue.models() == []


async def test_draining_gives_back_what_it_cannot_finish(
    settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    hasty = Worker(settings.model_copy(update={"drain_seconds": 0}), [queue], pipelines, BUDGETS)
    slow_down(hasty, monkeypatch)
    async with running(hasty) as task:
        job = await queue.submit(request(steps=200, n=10))
        await first(queue, job.id, Preview)
        hasty.draining.set()
        await task
    waiting = await queue.get(job.id)
    assert waiting.status is JobStatus.WAITING
    patient = Worker(settings, [queue], pipelines, BUDGETS)
    async with running(patient):
        again = await queue.submit(request())
        await first(queue, again.id, TERMINAL_EVENTS)
        await queue.cancel(job.id)
        await first(queue, job.id, TERMINAL_EVENTS)
    assert (await queue.get(job.id)).attempt == 1  # draining uses up no attempt


async def test_a_job_of_a_dead_worker_is_made_again_the_same(
    settings: Settings, queue: JobQueue, other_queue: JobQueue, pipelines: dict[str, Pipeline], worker: Worker
) -> None:
    job = await queue.submit(request(steps=5))
    await silenced(queue, await claimed(other_queue))
    async with running(worker):
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
        assert (await queue.get(job.id)).attempt == 2
        twin = await queue.submit(request(steps=5))
        await first(queue, twin.id, TERMINAL_EVENTS)
    assert await queue.image(job.id, 0) == await queue.image(twin.id, 0)


async def test_a_job_on_its_last_attempt_runs_alone(
    settings: Settings, queue: JobQueue, other_queue: JobQueue, pipelines: dict[str, Pipeline]
) -> None:
    suspect = await queue.submit(request(steps=5))
    await silenced(queue, await claimed(other_queue))
    last = await other_queue.reclaim("dead too", ["tiny-class"])
    assert last is not None
    worker = Worker(settings, [queue], pipelines, BUDGETS)
    together: list[set[str]] = []
    step = worker.engine.step

    def watched_step() -> list[Outcome]:
        together.append(set(worker.engine.jobs))
        return step()

    worker.engine.step = watched_step
    async with running(worker):
        busy = await queue.submit(request(steps=200, n=10))
        await first(queue, busy.id, Started)
        await silenced(queue, last)  # probably in the middle of it
        await queue.submit(request(steps=5, seed=1))
        assert isinstance(await first(queue, suspect.id, TERMINAL_EVENTS), Completed)
        assert isinstance(await first(queue, busy.id, TERMINAL_EVENTS), Completed)
    assert (await queue.get(suspect.id)).attempt == 3
    assert [jobs for jobs in together if suspect.id in jobs] == [{suspect.id}] * 5


async def test_a_worker_that_cannot_keep_its_claims_ends(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(claims: Sequence[Claim]) -> list[Heartbeat]:
        raise ResponseError("WRONGTYPE")

    monkeypatch.setattr(queue, "keep", broken)
    slow_down(worker, monkeypatch)
    await queue.submit(request(steps=200, n=10))
    with pytest.raises(ExceptionGroup):
        await asyncio.wait_for(worker.run(), PATIENCE)


async def test_no_one_is_taken_for_dead_after_an_outage(
    settings: Settings, queue: JobQueue, other_queue: JobQueue, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await other_queue.submit(request())
    claim = await claimed(other_queue)
    await silenced(queue, claim)  # nobody could reach the server
    monkeypatch.setattr(Outages, "seconds_since", 0.9 * settings.claim_idle_seconds)
    async with running(worker):
        after = await queue.submit(request())
        assert isinstance(await first(queue, after.id, TERMINAL_EVENTS), Completed)
        assert await other_queue.heartbeat(claim) is Heartbeat.OK
        await silenced(queue, claim)
        monkeypatch.undo()
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)  # it does complete


async def test_a_worker_that_takes_over_its_own_job_goes_on_with_it(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard, keep, reclaimed, claim = asyncio.Event(), queue.keep, asyncio.Event(), queue.claim

    async def watched_claim(*args: Any, **options: Any) -> Claim | None:
        taken = await claim(*args, **options)
        if taken is not None and taken.taken_over:
            reclaimed.set()
        return taken

    async def held_up(claims: Sequence[Claim]) -> list[Heartbeat]:
        await heard.wait()
        return await keep(claims)

    monkeypatch.setattr(queue, "keep", held_up)
    monkeypatch.setattr(queue, "claim", watched_claim)
    slow_down(worker, monkeypatch, until=heard.is_set)
    async with running(worker):
        job = await queue.submit(request(steps=100, sampler={"name": "dual_loop", "inner_steps": 4}))
        await first(queue, job.id, Started)
        await silenced(queue, worker.claims[job.id])
        await reclaimed.wait()
        heard.set()  # the news that the first claim is lost must not be taken for the second
        seen = await events(queue, job.id)
    assert isinstance(seen[-1], Completed)
    assert not worker.claims
    exposition = worker.metrics.exposition().decode()
    assert 'patchforge_requests_running{model="tiny-class",sampler="dual_loop"} 0.0' in exposition
    assert "patchforge_claims_lost_total{" not in exposition


async def test_what_was_refused_for_an_old_claim_is_told_again_for_the_new_one(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a pause, a worker takes over its own job while a delivery for the old claim is on its way."""
    deliver, refused = queue.deliver, []

    async def taken_over_before(deliveries: Sequence[Delivery]) -> list[bool]:
        if refused or not any(kind == "store_image" for kind, *_ in deliveries):
            return await deliver(deliveries)
        [old] = worker.claims.values()
        await silenced(queue, old)
        new = await queue.reclaim(worker.id, ["tiny-class"])
        assert new is not None
        refused.append(await deliver(deliveries))
        worker.claims[old.job.id] = new
        return refused[0]

    monkeypatch.setattr(queue, "deliver", taken_over_before)
    async with running(worker):
        job = await queue.submit(request(n=2, steps=4))
        end = await first(queue, job.id, TERMINAL_EVENTS)
    assert refused
    assert not any(refused[0])
    assert isinstance(end, Completed)
    assert (await queue.get(job.id)).attempt == 2
    for index in range(2):
        assert (await queue.image(job.id, index)).startswith(b"\x89PNG")
