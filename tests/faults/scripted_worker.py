"""A worker process without a model: plays the scripts of the gateway's tests, so that these run fast.

Jobs are held after their first preview while the key `CURTAIN` is set. A prompt of "flood N BYTES" is answered with
N previews of so many bytes, as fast as the queue takes them; "flood N BYTES AHEAD" keeps at most AHEAD previews ahead
of a reader, who pushes onto the list `READ` + job id for each one it has seen. A prompt of "fill BYTES" is answered,
once the curtain is open, with previews that nothing compresses, and with pictures of so many bytes.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from contextlib import suppress
from os import urandom
from typing import Any

import structlog

from patchforge.service.errors import Unavailable
from patchforge.service.logs import configure_logs
from patchforge.service.messages.events import Completed, Preview, Started
from patchforge.service.queue import Claim, Heartbeat, JobQueue
from patchforge.service.settings import Settings
from tests.service.gateway.harness import CARDS, ScriptedWorker, png, report

CURTAIN = "curtain"
READ = "read:"
LARGEST_PREVIEW = 6100  # a PNG of noise in base64, in the size of the text model
ANNOUNCE_SECONDS = 2.0


class PatientQueue(JobQueue):
    """Repeats a call until the queue server answers. A worker's calls may be repeated."""

    async def _run(self, *args: Any, **options: Any) -> Any:
        while True:
            with suppress(Unavailable):
                return await super()._run(*args, **options)

    async def _do(self, *command: str | bytes | int) -> Any:
        while True:
            with suppress(Unavailable):
                return await super()._do(*command)

    async def claim(
        self, worker_id: str, models: Sequence[str], *, block_seconds: float, take_over: bool = True
    ) -> Claim | None:
        """Returns a job, possibly one that was claimed by an earlier call whose answer was lost."""
        with suppress(Unavailable):
            return await super().claim(worker_id, models, block_seconds=block_seconds, take_over=take_over)
        return None


class FloodingWorker(ScriptedWorker):
    """Also plays floods, and looks for its curtain in Redis."""

    async def _may_go_on(self, claim: Claim) -> bool:
        while await self.queue.heartbeat(claim) is Heartbeat.OK:
            if not await self.queue._do("EXISTS", CURTAIN):
                return True
            await asyncio.sleep(0.02)
        return False

    async def _play(self, claim: Claim) -> None:
        words = (claim.job.request.prompt or "").split()
        if words[:1] == ["fill"]:
            await self._fill(claim, int(words[1]))
            return
        if words[:1] != ["flood"]:
            await super()._play(claim)
            return
        count, size, *ahead = map(int, words[1:])
        await self.queue.publish(claim, Started(attempt=claim.attempt, steps=count))
        for evaluation in range(1, count + 1):
            if ahead and evaluation > ahead[0]:
                await self._another_read(claim)
            await self.queue.publish(claim, large_preview(0, evaluation, count, size))
            if evaluation % 100 == 0:
                await self.queue.heartbeat(claim)
        await self.queue.store_image(claim, 0, png(1))
        await self.queue.finish(claim, Completed(report=report(1, 1)))

    async def _fill(self, claim: Claim, size: int) -> None:
        pictures = range(claim.job.request.n)
        if not await self._may_go_on(claim):
            return
        for evaluation in range(1, 9):
            for index in pictures:
                await self.queue.publish(claim, large_preview(index, evaluation, 8, LARGEST_PREVIEW))
        for index in pictures:
            await self.queue.store_image(claim, index, urandom(size))
        await self.queue.finish(claim, Completed(report=report(1, len(pictures))))

    async def _another_read(self, claim: Claim) -> None:
        while not await self.queue._do("BLPOP", READ + claim.job.id, 1):
            await self.queue.heartbeat(claim)


def large_preview(index: int, evaluation: int, evaluations: int, size: int) -> Preview:
    return Preview(
        index=index,
        evaluation=evaluation,
        evaluations=evaluations,
        times=[0.5],
        finished_share=0.0,
        patch_evaluations=evaluation,
        dense_patch_evaluations=evaluation,
        b64_png="A" * (size - size % 4),
    )


async def main() -> None:
    settings = Settings()
    configure_logs(settings, "worker")
    queue = PatientQueue.connect(settings.redis_url or "", settings)
    worker = FloodingWorker(queue)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)  # type: ignore[union-attr]
    await queue.announce("scripted", CARDS)
    structlog.get_logger().info("worker ready")
    async with asyncio.TaskGroup() as group:
        group.create_task(worker.run())
        group.create_task(keep_announcing(queue))


async def keep_announcing(queue: JobQueue) -> None:
    while True:
        await asyncio.sleep(ANNOUNCE_SECONDS)
        await queue.announce("scripted", CARDS)


if __name__ == "__main__":
    asyncio.run(main())
