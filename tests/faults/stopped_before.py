"""Runs the command line with a worker that stops itself (SIGSTOP), once, just before a call to the queue."""

from __future__ import annotations

import os
import signal
from typing import Any

from patchforge.service.cli.main import app
from patchforge.service.queue import Claim, JobQueue


def stop_before(method: str) -> None:
    """`method` is the JobQueue method that the worker is about to call. Its claim exists and is known by then."""
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
