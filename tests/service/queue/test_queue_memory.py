"""Memory is reserved before a job is accepted, given back when it ends, and never lost in between."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator
from io import BytesIO
from random import Random

import pytest
from PIL import Image
from redis.asyncio import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.errors import InvalidRequest, QueueFull
from patchforge.service.messages.events import Completed, PatchesFinished, Preview, Started
from patchforge.service.messages.room import PREVIEWS_BYTES, preview_limit, room_for
from patchforge.service.messages.schemas import ImageReport, JobStatus, OutputFormat
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.records import EVENT
from patchforge.service.settings import Settings
from tests.service.queue.kit import DONE, REPORT, a_card, a_preview, a_request, claimed, overdue, silenced

MOST = 1 << 40
"""What the queue server may hold here: next to it, what it does hold is nothing."""
HALF = MOST // 2


@pytest.fixture
async def settings(queue_server: EmbeddedServer, redis_client: Redis) -> AsyncIterator[Settings]:
    """The server itself has no limit."""
    before = await redis_client.config_get("maxmemory")
    await redis_client.config_set("maxmemory", 0)
    yield Settings(redis_url=queue_server.url, max_waiting=100, max_attempts=1, redis_memory_bytes=MOST)
    await redis_client.config_set("maxmemory", before["maxmemory"])


async def reserved(queue: JobQueue) -> int:
    return (await queue.memory()).reserved


async def test_a_job_that_might_not_fit_is_refused_until_another_ends(queue: JobQueue) -> None:
    refused = 0

    def count() -> None:
        nonlocal refused
        refused += 1

    queue.on_no_room = count
    first = await queue.submit(a_request(), room=HALF, idempotency_key="first")
    with pytest.raises(QueueFull) as caught:
        await queue.submit(a_request(), room=HALF, idempotency_key="second")
    assert caught.value.retry_after
    assert "this may need 549755.8 MB, and 439" in caught.value.message
    assert " of 989560.5 MB are free" in caught.value.message
    assert refused == 1, "and counted"
    assert await queue.waiting() == {"emoji": 1}
    assert (await queue.submit(a_request(), room=HALF, idempotency_key="first")).id == first.id, "it has its room"
    assert await reserved(queue) == HALF

    await queue.finish(await claimed(queue), DONE)
    assert await reserved(queue) == 0
    await queue.submit(a_request(), room=HALF, idempotency_key="second")
    assert await reserved(queue) == HALF


async def test_parallel_submits_never_reserve_too_much(queue: JobQueue, other_queue: JobQueue) -> None:
    asked = [each.submit(a_request(), room=MOST // 10) for each in (queue, other_queue) * 10]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(answer, QueueFull) for answer in answers) == 12
    assert await queue.waiting() == {"emoji": 8}, "a ninth would use up what the server needs for itself"


async def test_what_could_never_fit_is_the_callers_fault(queue: JobQueue) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await queue.submit(a_request(), room=MOST)
    assert caught.value.field == "n"
    assert "1099511.6 MB" in caught.value.message


async def test_a_refused_submit_costs_no_pictures(queue_server: EmbeddedServer, settings: Settings) -> None:
    limited = JobQueue.connect(queue_server.url, settings.model_copy(update={"rate_limit": 1, "rate_burst": 2}))
    await limited.submit(a_request(), room=HALF)
    for _ in range(3):
        with pytest.raises(QueueFull):
            await limited.submit(a_request(), room=HALF)
    await limited.submit(a_request())
    await limited.close()


async def test_the_servers_own_limit_counts_and_what_it_holds(queue: JobQueue, redis_client: Redis) -> None:
    used = (await redis_client.info("memory"))["used_memory"]
    await redis_client.config_set("maxmemory", used + (40 << 20))
    await queue.submit(a_request(), room=30 << 20)
    with pytest.raises(QueueFull):
        await queue.submit(a_request(), room=10 << 20)
    await queue.finish(await claimed(queue), DONE)
    await redis_client.setrange("somebody else's", 20 << 20, "x")
    with pytest.raises(QueueFull):
        await queue.submit(a_request(), room=20 << 20)
    await redis_client.delete("somebody else's")
    await queue.submit(a_request(), room=20 << 20)


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ("finished", JobStatus.COMPLETED),
        ("cancelled while it waits", JobStatus.CANCELLED),
        ("cancelled while it runs", JobStatus.CANCELLED),
        ("overdue", JobStatus.EXPIRED),
        ("given up", JobStatus.FAILED),
    ],
)
async def test_every_end_gives_the_room_back(queue: JobQueue, how: str, status: JobStatus) -> None:
    job = await queue.submit(a_request(deadline_seconds=60.0), room=HALF)
    if how == "overdue":
        await overdue(queue)
    elif how == "cancelled while it waits":
        await queue.cancel(job.id)
    else:
        claim = await claimed(queue)
        if how == "finished":
            await queue.finish(claim, DONE)
        elif how == "cancelled while it runs":
            await queue.cancel(job.id)
            await queue.release(claim)
        else:
            await silenced(queue, claim)
            assert await queue.reclaim("w2", ["emoji"]) is None
    assert (await queue.get(job.id)).status is status
    assert await reserved(queue) == 0


async def test_a_job_that_is_given_back_keeps_its_room(queue: JobQueue) -> None:
    await queue.submit(a_request(), room=HALF)
    await queue.release(await claimed(queue))
    assert await reserved(queue) == HALF


async def test_an_end_that_was_missed_is_found(queue: JobQueue, redis_client: Redis) -> None:
    """Such as that of a job which a worker of an older version finished, or which someone deleted."""
    kept, finished, deleted = [await queue.submit(a_request(), room=MOST // 4) for _ in range(3)]
    await redis_client.expire(keys.job(finished.id), 3600)
    await redis_client.delete(keys.job(deleted.id))
    with pytest.raises(QueueFull):
        await queue.submit(a_request(), room=HALF)
    for job in (kept, finished, deleted):
        await redis_client.zadd(keys.RESERVED_UNTIL, {keys.job(job.id): 1})  # as after a minute
    await queue.submit(a_request(), room=HALF)
    assert await reserved(queue) == MOST // 4 + HALF
    assert await redis_client.zscore(keys.RESERVED_UNTIL, keys.job(kept.id)) > 1, "to be looked at again"


async def test_previews_have_a_limit_in_bytes(queue: JobQueue, redis_client: Redis) -> None:
    job = await queue.submit(a_request())
    claim = await claimed(queue)
    await queue.publish(claim, Started(attempt=1, steps=20))
    for evaluation in range(1, 21):
        await queue.publish(claim, a_preview(evaluation, size=300_000 if evaluation > 2 else 100))
        assert await redis_client.memory_usage(keys.events(job.id)) < PREVIEWS_BYTES + 10_000
    await queue.publish(claim, a_preview(21, size=PREVIEWS_BYTES))  # none would have room beside it
    await queue.finish(claim, DONE)
    events = [EVENT.validate_json(entry[b"event"]) for _, entry in await redis_client.xrange(keys.events(job.id))]
    assert [event.type for event in events] == ["queued", "started", *["preview"] * 3, "completed"]
    assert [event.evaluation for event in events if isinstance(event, Preview)] == [18, 19, 20]


@pytest.mark.parametrize("n", [1, 10])
@pytest.mark.parametrize("output_format", OutputFormat)
@pytest.mark.parametrize("side", [32, 256])
async def test_no_job_takes_more_than_was_reserved(
    queue: JobQueue, redis_client: Redis, n: int, output_format: OutputFormat, side: int
) -> None:
    """Pictures are noise, previews as large as they may be, and events as many as there are evaluations."""
    card = a_card("emoji").model_copy(update={"width": side, "height": side, "grid": (16, 16)})
    request = a_request(n=n, steps=40, output_format=output_format, output_compression=100)
    room = room_for(request, card)
    job = await queue.submit(request, room=room)
    claim = await claimed(queue)
    drawn = b64encode(noise(side, OutputFormat.PNG)[: preview_limit(n)]).decode()
    for evaluation in range(1, 41):
        for index in range(n):
            same = {"index": index, "evaluation": evaluation, "evaluations": 40, "finished_share": 1 / 3}
            await queue.publish(claim, PatchesFinished(patches=[200] * 6, times=[0.1234] * 6, **same))
            await queue.publish(
                claim,
                Preview(
                    times=[0.1234] * 256, patch_evaluations=10000, dense_patch_evaluations=10000, b64_png=drawn, **same
                ),
            )
    for index in range(n):
        await queue.store_image(claim, index, noise(side, output_format))
    image = ImageReport(
        seed=2**63,
        patch_evaluations=10000,
        dense_patch_evaluations=10000,
        difficulty=[1.234e-05] * 256,
        finished_at=[40] * 256,
    )
    await queue.finish(claim, Completed(report=REPORT.model_copy(update={"images": [image] * n})))
    held = [await redis_client.memory_usage(each(job.id), samples=0) for each in (keys.job, keys.events, keys.images)]
    assert sum(held) <= room, held


def noise(side: int, output_format: OutputFormat) -> bytes:
    """What compresses worst."""
    random, buffer = Random(side), BytesIO()
    pixels = random.randbytes(3 * side * side)
    if output_format is not OutputFormat.PNG:
        pixels = bytes(255 * (byte & 1) for byte in pixels)
    Image.frombytes("RGB", (side, side), pixels).save(buffer, output_format.value, quality=100)
    return buffer.getvalue()


async def test_a_file_and_a_batch_reserve_what_they_need(queue: JobQueue, redis_client: Redis) -> None:
    lines = [b'{"custom_id": "%d", "body": {}}' % number for number in range(1000)]
    file = await queue.add_file(lines, "some.jsonl", None, 3600)
    assert await reserved(queue) == 0, "it is stored"
    batch = await queue.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
    assert await reserved(queue) >= 1000 * 200, "its results are not"
    await queue.cancel_batch(batch.id, None)
    [key] = await queue.open_batches()
    while await queue.open_batches():
        await queue.step_batch(key)
    assert await reserved(queue) == 0

    await queue.submit(a_request(), room=MOST * 8 // 10)
    for refused in (
        queue.add_file(lines, "other.jsonl", None, 3600),
        queue.create_batch(file.id, None, endpoint=None, window="24h", metadata=None),
    ):
        with pytest.raises(QueueFull, match="has no room"):
            await refused
    assert await queue.open_batches() == []
    await queue.submit(a_request(), room=MOST // 20)  # others have more of the memory
