"""Runs the command line on a device that takes half a second a step, and tells which jobs are in it."""

from __future__ import annotations

import time

import structlog

from service.cli import app
from service.worker.engine import Engine, Outcome

STEP = 0.5

_step = Engine.step


def step(engine: Engine) -> list[Outcome]:
    structlog.get_logger().info("step", jobs=list(engine.jobs))
    time.sleep(STEP)
    return _step(engine)


if __name__ == "__main__":
    Engine.step = step  # type: ignore[method-assign]
    app(["worker"])
