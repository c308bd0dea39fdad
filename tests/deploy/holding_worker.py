"""A worker process that claims some jobs and holds them until it ends: `holding_worker MODELS COUNT`."""

from __future__ import annotations

import asyncio
import signal
import sys

import structlog

from patchforge.service.logs import configure_logs
from patchforge.service.queue import Claim, JobQueue
from patchforge.service.settings import Settings
from tests.service.queue.kit import a_card

BEAT = 0.2  # seconds


async def main(models: list[str], most: int) -> None:
    settings = Settings()
    queue = JobQueue.connect(settings.redis_url or "", settings)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    held: list[Claim] = []
    await queue.announce("holding", [a_card(name) for name in models])
    structlog.get_logger().info("worker ready")
    while not stopping.is_set():
        await queue.announce("holding", [a_card(name) for name in models])
        await queue.reclaim("holding", models)  # ends what should be cancelled
        while len(held) < most and (claim := await queue.claim("holding", models, block_seconds=0)):
            held.append(claim)
        for claim in held:
            await queue.heartbeat(claim)
        await asyncio.sleep(BEAT)
    for claim in held:
        await queue.release(claim)
    await queue.retire("holding")
    await queue.close()


if __name__ == "__main__":
    configure_logs(Settings(log_json=True), "worker")
    asyncio.run(main(sys.argv[1].split(","), int(sys.argv[2])))
