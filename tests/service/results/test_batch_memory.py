"""What a batch takes of the queue server's memory, with its files there and with its files in the object store."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from redis.asyncio import Redis

from patchforge.service.gateway.batches.lines import custom_id_of
from patchforge.service.messages.events import Completed
from patchforge.service.messages.schemas import ImageReport, Priority
from patchforge.service.queue import JobQueue, keys
from patchforge.service.queue.job_queue import FeedOutcome
from patchforge.service.results import Reference
from patchforge.service.settings import Settings
from tests.service.queue.kit import REPORT, a_request

LINES = 200
PICTURE = "s3://pictures/results/01JDXXXXXXXXXXXXXXXXXXXXXX/0-1764513209000-0-1.png"
IMAGE = ImageReport(
    seed=1,
    patch_evaluations=600,
    dense_patch_evaluations=1000,
    difficulty=[1.234e-05 * patch for patch in range(64)],
    finished_at=[patch % 20 for patch in range(64)],
)
DRAWN = Completed(report=REPORT.model_copy(update={"images": [IMAGE]}))


@pytest.fixture
def settings(settings: Settings, object_variables: dict[str, str]) -> Settings:
    return settings.model_copy(
        update={"results": object_variables["PATCHFORGE_RESULTS"], "batch_in_flight": LINES, "max_waiting": 2 * LINES}
    )


async def held(redis_client: Redis) -> dict[str, int]:
    """Bytes by kind of key."""
    sizes: Counter[str] = Counter()
    async for key in redis_client.scan_iter(f"{keys.TAG}*"):
        sizes[key.decode().split(":")[1]] += await redis_client.memory_usage(key, samples=0)
    return dict(sizes)


async def whole_batch(first: JobQueue, queue: JobQueue, redis_client: Redis) -> tuple[dict[str, int], dict[str, int]]:
    """Draws a batch that `first` has begun. Returns the bytes held once it has begun, and after its end."""
    await redis_client.flushall()
    lines = [
        json.dumps({"custom_id": f"line-{number}", "url": "/v1/jobs", "body": {"prompt": "a cat", "seed": number}})
        for number in range(LINES)
    ]
    file = await first.add_file([line.encode() for line in lines], "lines.jsonl", None, 3600)
    batch = await first.create_batch(file.id, None, endpoint=None, window="24h", metadata=None)
    before = await held(redis_client)
    for number in range(LINES):
        stored = await queue.batch(batch.id, None)
        about = {"custom_id": f"line-{number}", "url": "/v1/jobs"}
        fed = await queue.feed_line(
            stored, f"line-{number}", about, a_request(priority=Priority.LOW), source=None, needs=()
        )
        assert fed is FeedOutcome.QUEUED
        claim = await queue.claim("w", ["emoji"], block_seconds=0)
        assert claim is not None
        await queue.store_image(claim, 0, Reference(PICTURE))
        await queue.finish(claim, DRAWN)
    ended = False
    while not ended:
        step, _ = await queue.step_batch(stored.key)
        assert step is not None
        ended = step.batch.ended
        await queue.move_results(step, custom_id_of)
    assert step.batch.request_counts.completed == LINES
    await redis_client.delete(keys.TAKEN + "w")
    return before, await held(redis_client)


async def test_a_batch_leaves_little_on_the_queue_server(
    queue: JobQueue, settings: Settings, redis_client: Redis
) -> None:
    """With pictures in the store both times; the figures are in docs/operation.md."""
    plain = settings.model_copy(update={"results": "redis"})
    here = JobQueue.connect(plain.redis_url or "", plain)
    begun_here, ended_here = await whole_batch(here, queue, redis_client)
    await here.close()
    begun, ended = await whole_batch(queue, queue, redis_client)
    print(f"\n{LINES} lines, begun: {sum(begun_here.values())} bytes {begun_here}, now {sum(begun.values())} {begun}")
    print(f"ended: {sum(ended_here.values())} bytes {ended_here}, now {sum(ended.values())} {ended}")
    assert sum(begun.values()) < 4000, "where the lines are, and the batch"
    assert sum(begun_here.values()) > 2 * 80 * LINES, "the lines twice: of the file, and of the batch"
    assert sum(ended.values()) < sum(ended_here.values()) / 2, (ended_here, ended)
    assert sum(ended.values()) < 1200 * LINES, ended
