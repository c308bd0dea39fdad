"""A worker without a model, as a process: takes jobs, ends each at once, and prints its id and when it was claimed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from service.events import Completed
from service.queue import JobQueue
from service.sampler_options import Euler
from service.schemas import ModelCard, SavingsReport
from service.settings import Settings

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
LOOPS = 2  # so that one claims while another's finish is on its way


async def main() -> None:
    """Runs until SIGTERM, or until whoever reads its output has gone."""
    settings = Settings()
    queue = JobQueue.connect(settings.redis_url or "", settings)
    this = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel if this else lambda: None)
    name = f"nothing-{os.getpid()}"
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_announce(queue, name))
            for number in range(LOOPS):
                group.create_task(_work(queue, f"{name}-{number}"))
    finally:
        await queue.close()


async def _announce(queue: JobQueue, name: str) -> None:
    while True:
        await queue.announce(name, [CARD])
        await asyncio.sleep(ANNOUNCE_SECONDS)


async def _work(queue: JobQueue, name: str) -> None:
    while True:
        claim = await queue.claim(name, [CARD.name], block_seconds=1.0)
        if claim is not None:
            # Comparable with other processes' readings: the clock is the machine's.
            sys.stdout.write(f"{claim.job.id} {time.monotonic():.6f}\n")
            sys.stdout.flush()
            await queue.finish(claim, DONE)


if __name__ == "__main__":
    asyncio.run(main())
