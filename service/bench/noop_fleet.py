"""A process of many workers without a model. Each has connections, announcements and metrics like a real one.

Its argument is their number. They do at once what each job asks for: news that it started, a picture, and the end.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from prometheus_client import CollectorRegistry

from patchforge.service.bench.noop_worker import ANNOUNCE_SECONDS, CARD, DONE
from patchforge.service.errors import Unavailable
from patchforge.service.messages.events import Completed, Started
from patchforge.service.messages.schemas import JobStatus
from patchforge.service.queue import Claim, JobQueue, connect_all
from patchforge.service.queue.claims import finished, published, stored
from patchforge.service.settings import Settings
from patchforge.service.worker.metrics import WorkerMetrics

PICTURE = bytes(range(256)) * 24
"""In place of a PNG of 64×64 pixels: nobody decodes it."""
RETRY_SECONDS = 0.5
WAIT_SECONDS = 2.0


async def main() -> None:
    """Run until SIGTERM."""
    this = asyncio.current_task()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel if this else lambda: None)
    settings = Settings()
    async with asyncio.TaskGroup() as group:
        for number in range(int(sys.argv[1])):
            metrics = WorkerMetrics(CollectorRegistry(), {CARD.name: 64}, {CARD.name: 1})
            for queue in connect_all(settings):
                group.create_task(_Link(f"noop-{os.getpid()}-{number}", queue, metrics).run())


class _Link:
    """A worker's part at one queue server."""

    def __init__(self, name: str, queue: JobQueue, metrics: WorkerMetrics) -> None:
        self.name = name
        self.queue = queue
        self.metrics = metrics

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for work in (self._announce, self._listen, self._draw):
                    group.create_task(_outlast(work))
        finally:
            await self.queue.close()

    async def _announce(self) -> None:
        await self.queue.announce(self.name, [CARD], self.metrics.exposition())
        await asyncio.sleep(ANNOUNCE_SECONDS)

    async def _listen(self) -> None:
        await self.queue.wait_for_call(self.name, WAIT_SECONDS)

    async def _draw(self) -> None:
        claim = await self.queue.claim(self.name, [CARD.name], block_seconds=WAIT_SECONDS, take_over=True)
        if claim is not None:
            await self._complete(claim)

    async def _complete(self, claim: Claim) -> None:
        job, done = claim.job, Completed(report=DONE.report)
        self.metrics.request_started(job)
        started = published(claim, Started(attempt=claim.attempt, steps=1))
        await self.queue.deliver([started, stored(claim, 0, PICTURE), finished(claim, done)])
        self.metrics.request_finished(job, done.report, JobStatus.COMPLETED, None)


async def _outlast(work: object) -> None:
    """Repeats a piece of work for ever, whatever happens to the queue server."""
    assert callable(work)
    while True:
        try:
            await work()
        except Unavailable:
            await asyncio.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    asyncio.run(main())
