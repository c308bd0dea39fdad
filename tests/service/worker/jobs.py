"""Jobs as the gateway submits them, with all defaults filled in."""

from __future__ import annotations

from itertools import count
from typing import Any

from patchforge.service.messages.schemas import GenerationRequest, Job, JobStatus

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
