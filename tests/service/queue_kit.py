"""What the tests of the queue share: messages to pass through it, and ways to wait for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from service import keys
from service.events import Completed, Event, Preview
from service.queue import Claim, JobQueue
from service.sampler_options import Euler
from service.schemas import GenerationRequest, ModelCard, SavingsReport

T = TypeVar("T")

REPORT = SavingsReport(
    patches=64,
    grid_rows=8,
    grid_columns=8,
    patch_evaluations=600,
    dense_patch_evaluations=1000,
    savings_ratio=0.4,
    queue_seconds=0.1,
    duration_seconds=1.0,
    time_to_first_preview_seconds=0.2,
    images=[],
)
DONE = Completed(report=REPORT)
UNKNOWN = "0" * 26


def a_request(**changes: Any) -> GenerationRequest:
    filled = GenerationRequest(model="emoji", prompt="a cat", sampler=Euler(), seed=1, steps=4, guidance=2.0)
    return filled.model_copy(update=changes)


def a_preview(evaluation: int, index: int = 0, size: int = 10) -> Preview:
    return Preview(
        index=index,
        evaluation=evaluation,
        evaluations=100,
        times=[0.5],
        finished_share=0.0,
        patch_evaluations=1,
        dense_patch_evaluations=1,
        b64_png="x" * size,
    )


def a_card(name: str) -> ModelCard:
    return ModelCard(
        name=name,
        kind="text",
        width=64,
        height=64,
        grid=(8, 8),
        sampler=Euler(),
        steps=20,
        guidance=2.0,
        licence="Apache-2.0",
        created=0,
    )


async def silenced(queue: JobQueue, claim: Claim) -> None:
    """As if the claim's worker had not been heard for an hour."""
    holder = (claim.stream, keys.GROUP, keys.CONSUMER, 0)
    await queue._redis.xclaim(*holder, [claim.entry_id], idle=3_600_000, justid=True)


async def overdue(queue: JobQueue) -> None:
    """As if the deadlines of all waiting jobs had passed."""
    for member in await queue._do("ZRANGE", keys.WAITING, 0, -1):
        await queue._do("ZADD", keys.WAITING, "XX", 1, member)


async def eventually(attempt: Callable[[], Awaitable[T | None]], seconds: float = 30.0) -> T:
    """The first true answer; for what no event tells."""
    async with asyncio.timeout(seconds):
        while True:
            if result := await attempt():
                return result
            await asyncio.sleep(0.02)


async def eventually_blocked(queue: JobQueue) -> None:
    """Until some client waits in a blocking read."""

    async def blocked() -> bool:
        return bool((await queue._redis.info("clients"))["blocked_clients"])

    await eventually(blocked)


async def claimed(queue: JobQueue, worker: str = "w1") -> Claim:
    claim = await queue.claim(worker, ["emoji"], block_seconds=0)
    assert claim is not None
    return claim


async def watched(queue: JobQueue, job_id: str, after: str = "0") -> list[tuple[str, Event]]:
    return [pair async for pair in queue.watch(job_id, after)]


async def taken_over(queue: JobQueue, claim: Claim, worker: str = "w") -> Claim:
    """The claim on the job that ``worker`` gets once the one who held it has been silent for too long."""
    await silenced(queue, claim)
    fresh = await queue.reclaim(worker, ["emoji"])
    assert fresh is not None
    return fresh
