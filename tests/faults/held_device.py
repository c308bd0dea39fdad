"""Runs the command line on a device that tells its steps and stands still while a file, the curtain, is there.

Behind the curtain each new job still gets its first step, so that it is under way and has shown a preview.
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

Step = Callable[[Engine], list[Any]]


def held(step: Step) -> Step:
    """``step``, which does nothing while the curtain is down and every job has begun."""
    curtain = Path(os.environ["PATCHFORGE_CURTAIN"])
    begun: set[str] = set()

    def held_step(engine: Engine) -> list[Any]:
        if curtain.exists() and begun.issuperset(engine.jobs):
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
