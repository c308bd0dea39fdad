"""Tools for the queue's tests: messages to send, and ways to wait for what the queue does."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from patchforge.service.messages.events import Completed, Event, Preview
from patchforge.service.messages.samplers import Euler
from patchforge.service.messages.schemas import GenerationRequest, ModelCard, SavingsReport
from patchforge.service.queue import Claim, JobQueue, keys
from tests.patience import PATIENCE

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
    """Makes a claim look as if its worker had been silent for an hour."""
    holder = (claim.stream, keys.GROUP, keys.CONSUMER, 0)
    await queue._redis.xclaim(*holder, [claim.entry_id], idle=3_600_000, justid=True)


async def overdue(queue: JobQueue) -> None:
    """Makes the deadlines of all waiting jobs pass."""
    for member in await queue._do("ZRANGE", keys.WAITING, 0, -1):
        await queue._do("ZADD", keys.WAITING, "XX", 1, member)


async def eventually(attempt: Callable[[], Awaitable[T | None]], seconds: float = PATIENCE) -> T:
    """Waits for a result that no event announces, and returns it."""
    async with asyncio.timeout(seconds):
        while True:
            if result := await attempt():
                return result
            await asyncio.sleep(0.02)


async def eventually_blocked(queue: JobQueue) -> None:
    """Waits until a client waits in a blocking read."""

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
    """Makes the holder of a job silent for too long, and returns the claim that `worker` then gets."""
    await silenced(queue, claim)
    fresh = await queue.reclaim(worker, ["emoji"])
    assert fresh is not None
    return fresh
