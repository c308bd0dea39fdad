"""Jobs as the gateway submits them, with all defaults filled in."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from patchforge.service.messages.schemas import GenerationRequest, Job, JobStatus
from patchforge.service.worker.outcomes import Outcome
from patchforge.service.worker.worker import Worker

SLOW_STEP_SECONDS = 0.1

_numbers = count(1)


def request(**fields: Any) -> GenerationRequest:
    given = {"model": "tiny-class", "class_label": "cat", "seed": 7, "sampler": "euler", "steps": 3, "guidance": 2.0}
    if fields.get("model") == "tiny-text":
        given |= {"class_label": None, "prompt": "red apple"}
    return GenerationRequest.model_validate(given | fields)


def job(**fields: Any) -> Job:
    number = next(_numbers)
    return Job(
        id=f"job-{number}", status=JobStatus.RUNNING, request=request(**fields), created_at=10.0, started_at=12.5
    )


def slow_down(worker: Worker, monkeypatch: pytest.MonkeyPatch, until: Callable[[], bool] = lambda: False) -> None:
    """Makes the worker's steps slow. On a fast machine, a long job would end before the worker looks around."""
    step = worker.engine.step

    def slow_step() -> list[Outcome]:
        if not until():
            time.sleep(SLOW_STEP_SECONDS)
        return step()

    monkeypatch.setattr(worker.engine, "step", slow_step)
