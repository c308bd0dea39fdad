"""A worker process without a model: claims jobs, prints their ids and claim times, and completes them at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from patchforge.service.messages.events import Completed
from patchforge.service.messages.samplers import Euler
from patchforge.service.messages.schemas import ModelCard, SavingsReport
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings

CARD = ModelCard(
    name="nothing",
    kind="text",
    width=64,
    height=64,
    grid=(8, 8),
    sampler=Euler(),
    steps=1,
    guidance=1.0,
    licence="none",
    created=0,
)
DONE = Completed(
    report=SavingsReport(
        patches=64,
        grid_rows=8,
        grid_columns=8,
        patch_evaluations=0,
        dense_patch_evaluations=64,
        savings_ratio=1.0,
        queue_seconds=0.0,
        duration_seconds=0.0,
        time_to_first_preview_seconds=None,
        images=[],
    )
)
ANNOUNCE_SECONDS = 2.0
LOOPS = 2  # so that one loop claims while the other finishes a job


async def main() -> None:
    """Run until SIGTERM, or until the reader of its output has gone."""
    settings = Settings()
    queue = JobQueue.connect(settings.redis_url or "", settings)
    this = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel if this else lambda: None)
    name = f"nothing-{os.getpid()}"
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_announce_card(queue, name))
            for number in range(LOOPS):
                group.create_task(_complete_jobs(queue, f"{name}-{number}"))
    finally:
        await queue.close()


async def _announce_card(queue: JobQueue, name: str) -> None:
    while True:
        await queue.announce(name, [CARD])
        await asyncio.sleep(ANNOUNCE_SECONDS)


async def _complete_jobs(queue: JobQueue, name: str) -> None:
    while True:
        claim = await queue.claim(name, [CARD.name], block_seconds=1.0)
        if claim is not None:
            # All processes share this clock, so they can compare its times.
            sys.stdout.write(f"{claim.job.id} {time.monotonic():.6f}\n")
            sys.stdout.flush()
            await queue.finish(claim, DONE)


if __name__ == "__main__":
    asyncio.run(main())
