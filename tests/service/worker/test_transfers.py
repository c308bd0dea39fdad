"""A worker whose pictures go to an object store: beside the engine, whole, and not lost when the store is away."""

from __future__ import annotations

import asyncio
import json
from base64 import b64decode, b64encode
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from itertools import product

import pytest
from PIL import Image
from redis.asyncio import Redis

from patchforge.model.pipeline import Pipeline
from patchforge.service.errors import QueueFull, Unavailable
from patchforge.service.messages.events import (
    TERMINAL_EVENTS,
    Cancelled,
    Completed,
    Failed,
    ImageReady,
    Preview,
    Started,
)
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.messages.small_copies import split_reference
from patchforge.service.queue import JobQueue, keys, stored_previews
from patchforge.service.queue.batch_records import StoredBatch
from patchforge.service.queue.claims import Delivery
from patchforge.service.queue.job_queue import FeedOutcome
from patchforge.service.results import Reference
from patchforge.service.settings import Settings
from patchforge.service.worker.worker import Worker
from tests.object_store import ObjectServer, browse
from tests.patience import PATIENCE
from tests.service.queue.kit import a_preview, eventually, silenced
from tests.service.worker.jobs import request
from tests.service.worker.test_source_images import source
from tests.service.worker.test_worker import BUDGETS, events, first, running

EDIT = {"image": "sha256:x", "mask": "sha256:x", "width": 32, "height": 32, "sampler": "adaptive"}


@pytest.fixture
def settings(settings: Settings, object_variables: dict[str, str]) -> Settings:
    return settings.model_copy(update={"results": object_variables["PATCHFORGE_RESULTS"], "drain_seconds": 0})


@pytest.fixture
async def queue(settings: Settings, redis_client: Redis) -> AsyncIterator[JobQueue]:
    apart = JobQueue.connect(settings.redis_url or "", settings)
    yield apart
    await apart.close()


@pytest.fixture
def worker(settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline]) -> Worker:
    return Worker(settings, [queue], pipelines, BUDGETS)


@pytest.fixture
def away(object_server: ObjectServer) -> Iterator[ObjectServer]:
    """The store, stopped; it runs again after the test."""
    object_server.stop()
    yield object_server
    object_server.start()


async def failed(worker: Worker, operation: str = "put") -> bool:
    """Whether the worker has tried in vain to do this in the store."""
    return bool(worker.registry.get_sample_value("patchforge_results_failures_total", {"operation": operation}))


async def test_all_pictures_are_stored_before_their_job_completes(
    worker: Worker, queue: JobQueue, redis_client: Redis, object_server: ObjectServer
) -> None:
    async with running(worker):
        job = await queue.submit(request(n=3, output_format="webp"))
        seen = await events(queue, job.id)
    assert sorted(event.index for event in seen if isinstance(event, ImageReady)) == [0, 1, 2]
    assert isinstance(seen[-1], Completed)
    assert all(len(value) < 150 for value in (await redis_client.hgetall(keys.images(job.id))).values())
    assert len([name for name in object_server.names() if job.id in name]) == 3
    links = await queue.picture_links(job.id)
    for index in range(3):
        assert (await queue.image(job.id, index))[:4] == b"RIFF"
        assert browse(links[index]).headers["content-type"] == "image/webp"
    assert not worker.claims


async def test_a_picture_waits_for_a_store_that_is_away_and_others_are_drawn(
    worker: Worker, queue: JobQueue, away: ObjectServer
) -> None:
    async with running(worker):
        jobs = [await queue.submit(request(n=2)) for _ in range(2)]
        await eventually(lambda: failed(worker))
        later = await queue.submit(request())
        assert isinstance(await first(queue, later.id, Started), Started), "the engine does not wait"
        for job in (*jobs, later):
            assert (await queue.get(job.id)).status is JobStatus.RUNNING
        away.start()
        for job in (*jobs, later):
            seen = await events(queue, job.id)
            assert [type(event) for event in seen if isinstance(event, TERMINAL_EVENTS)] == [Completed]
            assert (await queue.image(job.id, job.request.n - 1)).startswith(b"\x89PNG")
            assert (await queue.get(job.id)).attempt == 1
            assert len([name for name in away.names() if job.id in name]) == job.request.n


async def test_a_job_whose_pictures_cannot_be_stored_is_given_back(
    worker: Worker, queue: JobQueue, away: ObjectServer, settings: Settings, pipelines: dict[str, Pipeline]
) -> None:
    async with running(worker):
        job = await queue.submit(request())
        await eventually(lambda: failed(worker))
    given = await queue.get(job.id)
    assert (given.status, given.attempt) == (JobStatus.WAITING, 0)
    away.start()
    async with running(Worker(settings, [queue], pipelines, BUDGETS)):
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
    assert (await queue.image(job.id, 0)).startswith(b"\x89PNG")


async def test_a_job_can_be_cancelled_while_the_store_is_away(
    worker: Worker, queue: JobQueue, away: ObjectServer
) -> None:
    async with running(worker):
        job = await queue.submit(request())
        await eventually(lambda: failed(worker))
        await queue.cancel(job.id)
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Cancelled)
        assert not worker.claims


async def test_a_worker_that_lost_its_claim_takes_its_picture_away(
    queue: JobQueue, object_server: ObjectServer
) -> None:
    """The next owner's picture stays, because the two have different names."""
    job = await queue.submit(request())
    late = await queue.claim("late", ["tiny-class"], block_seconds=0)
    assert late is not None
    await silenced(queue, late)
    taken = await queue.reclaim("next", ["tiny-class"])
    assert taken is not None
    assert await queue.store_image(taken, 0, await queue.put_picture(taken, 0, b"of the next"))
    mine = await queue.put_picture(late, 0, b"of the late one")
    assert len([name for name in object_server.names() if job.id in name]) == 2
    assert not await queue.store_image(late, 0, mine)
    await queue.discard_picture(mine)
    assert len([name for name in object_server.names() if job.id in name]) == 1
    assert await queue.image(job.id, 0) == b"of the next"


async def test_a_picture_to_edit_is_fetched_beside_the_engine(
    worker: Worker, queue: JobQueue, object_server: ObjectServer, redis_client: Redis
) -> None:
    edit = await queue.submit(request(**EDIT), source=source())
    held = await redis_client.hgetall(keys.sources(edit.id))
    assert {name: value.decode().rpartition("/")[2] for name, value in held.items()} == {
        b"@image": "image.png",
        b"@mask": "mask.png",
    }
    assert await queue.source(edit.id) == source()
    object_server.stop()
    async with running(worker):
        plain = await queue.submit(request())
        await first(queue, plain.id, Started)
        await eventually(lambda: failed(worker, "get"))
        assert (await queue.get(edit.id)).status is JobStatus.RUNNING
        object_server.start()
        for job in (edit, plain):
            assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)


async def test_a_picture_to_edit_that_is_gone_fails_its_job(
    worker: Worker, queue: JobQueue, redis_client: Redis
) -> None:
    job = await queue.submit(request(**EDIT), source=source())
    reference = (await redis_client.hget(keys.sources(job.id), "@mask")).decode()
    await queue.discard_picture(Reference(reference))
    async with running(worker):
        ended = await first(queue, job.id, TERMINAL_EVENTS)
    assert isinstance(ended, Failed)
    assert ended.error.code == "source_lost"


async def test_a_picture_without_a_job_is_deleted(queue: JobQueue, object_server: ObjectServer) -> None:
    earlier = set(object_server.names())
    kept = await queue.submit(request(**EDIT), source=source(), idempotency_key="k")
    assert (await queue.submit(request(**EDIT), source=source(), idempotency_key="k")).id == kept.id
    for _ in range(7):
        await queue.submit(request())
    with pytest.raises(QueueFull):
        await queue.submit(request(**EDIT), source=source())
    assert {*object_server.names()} - earlier == {f"results/{kept.id}/{name}.png" for name in ("image", "mask")}


async def test_the_picture_of_a_batch_line_is_stored_once_however_often_it_is_offered(
    queue: JobQueue, object_server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await a_batch(queue, lines=2)
    earlier, calls = set(object_server.names()), Counter[str]()
    assert queue.objects is not None
    monkeypatch.setattr(queue.objects, "on_call", lambda operation, *rest: calls.update([operation]))
    others = [await queue.submit(request()) for _ in range(4)]  # half of the limit: no batch gets further
    for _ in range(3):
        with pytest.raises(QueueFull):
            await offer(queue, batch)
    assert calls["put"] == 2, "a picture and its mask"
    await queue.cancel(others[0].id)
    assert await offer(queue, batch) is FeedOutcome.QUEUED
    [job] = {name.split("/")[1] for name in {*object_server.names()} - earlier}
    assert await queue.source(job) == source()
    assert calls["put"] == 2

    assert await offer(queue, batch) is FeedOutcome.STALE
    assert calls["put"] == 4
    assert {*object_server.names()} - earlier == {f"results/{job}/{name}.png" for name in ("image", "mask")}

    with pytest.raises(QueueFull):
        await offer(queue, replace(batch, next=1))
    assert len({*object_server.names()} - earlier) == 4
    await queue.cancel_batch(batch.batch.id, None)
    await queue.step_batch(batch.key)
    assert {*object_server.names()} - earlier == {f"results/{job}/{name}.png" for name in ("image", "mask")}


async def test_a_batch_line_with_a_picture_needs_a_worker_with_the_store(queue: JobQueue, settings: Settings) -> None:
    assert await offer(queue, await a_batch(queue)) is FeedOutcome.QUEUED
    without = JobQueue.connect(settings.redis_url or "", settings.model_copy(update={"results": "redis"}))
    assert await without.claim("without", ["tiny-class"], block_seconds=0) is None
    await without.close()
    assert await queue.claim("with", ["tiny-class"], block_seconds=0) is not None


async def a_batch(queue: JobQueue, lines: int = 1) -> StoredBatch:
    file = await queue.add_file([b"{}"] * lines, "lines.jsonl", None, 600)
    batch = await queue.create_batch(file.id, None, endpoint=None, window="1h", metadata=None)
    return await queue.batch(batch.id, None)


async def offer(queue: JobQueue, batch: StoredBatch) -> FeedOutcome:
    """Offers the batch's next line, a picture to edit, to the queue."""
    line = str(batch.next)
    return await queue.feed_line(batch, line, {"custom_id": line}, request(**EDIT), source=source(), needs=())


async def test_a_worker_without_a_store_leaves_such_jobs_to_others(
    queue: JobQueue, settings: Settings, object_server: ObjectServer
) -> None:
    plain = settings.model_copy(update={"results": "redis"})
    without = JobQueue.connect(plain.redis_url or "", plain)
    job = await queue.submit(request(**EDIT), source=source())
    assert await without.claim("without", ["tiny-class"], block_seconds=0) is None
    claim = await queue.claim("with", ["tiny-class"], block_seconds=0)
    await without.close()
    assert claim is not None
    assert claim.job.id == job.id


async def test_pictures_of_an_unanswered_delivery_are_kept(
    worker: Worker, queue: JobQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The queue took the picture and the end of the job together, so both are refused when they are told again."""
    deliver, stored, lost = queue.deliver, asyncio.Event(), []

    async def unanswered_once(deliveries: Sequence[Delivery]) -> list[bool]:
        if not stored.is_set():
            await stored.wait()  # so that all else is told in one call
        answer = await deliver(deliveries)
        if any(kind == "finish" for kind, *_ in deliveries) and not lost:
            lost.append([kind for kind, *_ in deliveries])
            raise Unavailable("no answer")
        return answer

    async def all_told() -> bool:
        return worker.links[0].outbox.ends(job.id)

    monkeypatch.setattr(queue, "deliver", unanswered_once)
    async with running(worker):
        job = await queue.submit(request())
        await eventually(all_told)
        stored.set()
        assert isinstance(await first(queue, job.id, TERMINAL_EVENTS), Completed)
        await eventually(lambda: gone(worker))
    assert lost[0][-2:] == ["store_image", "finish"]
    assert (await queue.image(job.id, 0)).startswith(b"\x89PNG")


async def gone(worker: Worker) -> bool:
    return not worker.claims


async def test_a_picture_to_edit_that_is_in_another_store_fails_its_job(
    settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline]
) -> None:
    moved = settings.model_copy(update={"results": "s3://another-bucket/results"})
    elsewhere = JobQueue.connect(settings.redis_url or "", moved)
    async with running(Worker(moved, [elsewhere], pipelines, BUDGETS)):
        job = await queue.submit(request(**EDIT), source=source())
        end = await first(queue, job.id, TERMINAL_EVENTS)
    await elsewhere.close()
    assert isinstance(end, Failed)
    assert end.error.code == "source_lost"
    assert "another object store" in end.error.message


@pytest.fixture
def showing(settings: Settings, queue: JobQueue, pipelines: dict[str, Pipeline]) -> Worker:
    """A worker that makes many previews, and counts almost all as large."""
    eager = {"results_preview_bytes": 1024, "preview_interval_seconds": 0.0, "preview_share": 100.0}
    return Worker(settings.model_copy(update=eager), [queue], pipelines, BUDGETS)


async def test_large_previews_go_through_the_store_and_come_back(
    showing: Worker, queue: JobQueue, redis_client: Redis, object_server: ObjectServer, settings: Settings
) -> None:
    async with running(showing):
        job = await queue.submit(request(n=2, partial_images=2))
        live = await events(queue, job.id)
    [end] = {place for place, event in enumerate(live) if isinstance(event, TERMINAL_EVENTS)}
    assert end == len(live) - 1
    for index in range(2):
        mine = [each for each in live if isinstance(each, Preview | ImageReady) and each.index == index]
        assert isinstance(mine.pop(), ImageReady)
        made = [each.evaluation for each in mine if isinstance(each, Preview)]
        assert len(made) >= 2
        assert made == sorted(set(made))
    kept = [name for name in object_server.names() if f"{job.id}/preview-" in name]
    held = [fields[b"event"] for _, fields in await redis_client.xrange(keys.events(job.id))]
    copies = [text for text in held if text.startswith(b'{"type":"preview","index":')]
    assert len(kept) == len(copies) == sum(isinstance(event, Preview) for event in live)
    assert all(split_reference(json.loads(text)["b64_png"])[1] for text in copies)
    for event in live:
        if isinstance(event, Preview):
            assert split_reference(event.b64_png)[1] is None
            assert f"results/{job.id}/preview-{event.index}-{event.evaluation}-" in "".join(kept)
    without = JobQueue.connect(settings.redis_url or "", settings.model_copy(update={"results": "redis"}))
    plain = [event async for _, event in without.watch(job.id)]
    await without.close()
    assert [type(event) for event in plain] == [type(event) for event in live]
    assert all(split_reference(event.b64_png)[1] is None for event in plain if isinstance(event, Preview))


@pytest.fixture
def any_time_to_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that answers is waited for, and one that was away is left alone until the test says so."""
    for name in ("FETCH_SECONDS", "PAUSE_SECONDS"):
        monkeypatch.setattr(stored_previews, name, PATIENCE)


@pytest.mark.usefixtures("any_time_to_fetch")
async def test_previews_of_a_store_that_is_away_or_empty_are_small_copies(
    queue: JobQueue, object_server: ObjectServer
) -> None:
    job = await queue.submit(request())
    claim = await queue.claim("w", ["tiny-class"], block_seconds=0)
    assert claim is not None
    large, small = a_png(64), a_png(8)
    for evaluation in (1, 2):
        drawn = a_preview(evaluation).model_copy(update={"b64_png": b64encode(large).decode()})
        event, reference = await queue.put_preview(claim, drawn, small)
        assert await queue.publish(claim, event)
    await queue.discard_picture(reference)
    await queue.finish(claim, Cancelled())
    shown = [event.b64_png for event in await events(queue, job.id) if isinstance(event, Preview)]
    assert list(map(b64decode, shown)) == [large, small], "the second is gone"
    object_server.stop()
    seen = await events(queue, job.id)
    object_server.start()
    assert [b64decode(event.b64_png) for event in seen if isinstance(event, Preview)] == [small, small]
    assert isinstance(seen[-1], Cancelled)
    seen = await events(queue, job.id)
    assert [b64decode(event.b64_png) for event in seen if isinstance(event, Preview)] == [small, small], "not at once"
    queue._no_previews_before = 0.0
    seen = await events(queue, job.id)
    assert [b64decode(event.b64_png) for event in seen if isinstance(event, Preview)] == [large, small]


@pytest.mark.usefixtures("any_time_to_fetch")
async def test_a_watcher_that_has_fallen_behind_fetches_the_newest_previews(
    queue: JobQueue, object_server: ObjectServer
) -> None:
    job = await queue.submit(request(n=2))
    claim = await queue.claim("w", ["tiny-class"], block_seconds=0)
    assert claim is not None
    for evaluation, index in product(range(1, 4), range(2)):
        drawn = a_preview(evaluation, index).model_copy(update={"b64_png": b64encode(a_png(64)).decode()})
        event, _ = await queue.put_preview(claim, drawn, a_png(8))
        assert await queue.publish(claim, event)
    await queue.finish(claim, Cancelled())
    sizes = {
        (each.evaluation, len(b64decode(each.b64_png)))
        for each in await events(queue, job.id)
        if isinstance(each, Preview)
    }
    assert sizes == {(3, len(a_png(64))), *((evaluation, len(a_png(8))) for evaluation in (1, 2))}


def a_png(side: int) -> bytes:
    buffer = BytesIO()
    Image.radial_gradient("L").resize((side, side)).save(buffer, "PNG")
    return buffer.getvalue()
