"""Runs the command line with a worker that stops dead (SIGSTOP), once, just before it tells the queue something."""

from __future__ import annotations

import os
import signal
from typing import Any

from service.cli import app
from service.queue import Claim, JobQueue


def stop_before(method: str) -> None:
    """``method`` of JobQueue is what the worker is about to call; its claim is real by then."""
    tell = getattr(JobQueue, method)
    told = False

    async def stopped_first(queue: JobQueue, claim: Claim, *rest: Any) -> Any:
        nonlocal told
        if not told:
            told = True
            os.kill(os.getpid(), signal.SIGSTOP)
        return await tell(queue, claim, *rest)

    setattr(JobQueue, method, stopped_first)


if __name__ == "__main__":
    stop_before(os.environ["PATCHFORGE_STOP_BEFORE"])
    app()
