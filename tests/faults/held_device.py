"""Runs the command line on a device that tells its steps and stands still while a file, the curtain, is there.

Behind the curtain each new job still gets its first steps, until it is under way and has shown a preview if it may.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from service.cli import app
from service.worker.engine import Engine
from service.worker.live import LiveJob

Step = Callable[[Engine], list[Any]]


def held(step: Step) -> Step:
    """``step``, which does nothing while the curtain is down and every job is under way."""
    curtain = Path(os.environ["PATCHFORGE_CURTAIN"])
    begun: set[str] = set()

    def under_way(live: LiveJob) -> bool:
        return live.job.id in begun and (live.first_preview is not None or not live.job.request.previews)

    def held_step(engine: Engine) -> list[Any]:
        if curtain.exists() and all(map(under_way, engine.jobs.values())):
            time.sleep(0.02)
            return []
        begun.update(engine.jobs)
        return step(engine)

    return held_step


def told(step: Step) -> Step:
    """``step``, with a log line that says which jobs it is for."""

    def told_step(engine: Engine) -> list[Any]:
        structlog.get_logger().info("step", jobs=list(engine.jobs))
        return step(engine)

    return told_step


if __name__ == "__main__":
    Engine.step = held(told(Engine.step))  # type: ignore[method-assign]
    app(["worker"])
