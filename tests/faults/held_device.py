"""Runs the command line with a device that logs its steps, and pauses while a file, the curtain, exists.

Behind the curtain each new job still gets its first steps, until it is under way and has shown a preview if it may.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from patchforge.service import tracing
from patchforge.service.cli.main import app
from patchforge.service.worker.engine import Engine
from patchforge.service.worker.live import LiveJob
from tests.patience import PATIENCE

Step = Callable[[Engine], list[Any]]


def held(step: Step) -> Step:
    """Wraps `step`: it does nothing while the curtain exists and every job has started."""
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
    """Wraps `step`: it also logs which jobs a step is for."""

    def told_step(engine: Engine) -> list[Any]:
        structlog.get_logger().info("step", jobs=list(engine.jobs))
        return step(engine)

    return told_step


if __name__ == "__main__":
    tracing.FLUSH_SECONDS = PATIENCE  # time to export the last spans on a busy machine
    Engine.step = held(told(Engine.step))  # type: ignore[method-assign]
    app(["worker"])
