"""Runs the command line with a worker that stops dead (SIGSTOP), once, just before it tells the queue something."""

from __future__ import annotations

import os
import signal
from typing import Any

from service.cli import app
from service.queue import Claim, JobQueue


def stop_before(method: str) -> None:
    """``method`` of JobQueue is what the worker is about to call; its claim is real, and known to be, by then."""
    tell, publish = getattr(JobQueue, method), JobQueue.publish
    published = told = False

    async def published_first(queue: JobQueue, *event: Any) -> Any:
        nonlocal published
        answer = await publish(queue, *event)
        published = True
        return answer

    async def stopped_first(queue: JobQueue, claim: Claim, *rest: Any) -> Any:
        nonlocal told
        if published and not told:
            told = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return await tell(queue, claim, *rest)

    for name, wrapped in (("publish", published_first), (method, stopped_first)):
        setattr(JobQueue, name, wrapped)


if __name__ == "__main__":
    stop_before(os.environ["PATCHFORGE_STOP_BEFORE"])
    app()
