"""Runs the command line with a worker that stops itself (SIGSTOP), once, just before a call to the queue."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from typing import Any

from patchforge.service.cli.main import app
from patchforge.service.queue import Claim, JobQueue


def stop_before(call: str) -> None:
    """`call`: what the worker is about to tell the queue: heartbeat, store_image or finish. A job has started then."""
    keep, deliver = JobQueue.keep, JobQueue.deliver
    begun = stopped = False

    def stop() -> None:
        nonlocal stopped
        if begun and not stopped:
            stopped = True
            os.kill(os.getpid(), signal.SIGSTOP)

    async def watched_keep(queue: JobQueue, claims: Sequence[Claim]) -> Any:
        if call == "heartbeat":
            stop()
        return await keep(queue, claims)

    async def watched_deliver(queue: JobQueue, deliveries: Sequence[Any]) -> Any:
        nonlocal begun
        if any(command == call for command, *_ in deliveries):
            stop()
        answer = await deliver(queue, deliveries)
        begun = True
        return answer

    JobQueue.keep, JobQueue.deliver = watched_keep, watched_deliver  # type: ignore[method-assign]


if __name__ == "__main__":
    stop_before(os.environ["PATCHFORGE_STOP_BEFORE"])
    app()
