"""The gateway follows its own OpenAPI document: schemathesis sends requests, and a scripted worker answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.faults.gateway_kit import APPLE, NO_JOB, Stage
from tests.patience import PATIENCE

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
FEW, MANY = 12, 150
UNLIKELY = ("class_label", "image", "mask", "strength", "deadline_seconds")  # rarely valid beside the others


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A gateway with room for all generated jobs."""
    with Stage(tmp_path_factory.mktemp("contract"), max_waiting=100_000) as stage:
        yield stage


def test_every_answer_is_as_documented(busy: Stage) -> None:
    explore(busy, FEW)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_answers_are_as_documented(busy: Stage) -> None:
    explore(busy, MANY)


def explore(stage: Stage, cases: int) -> None:
    """Sends this many valid requests to each operation, and as many invalid ones."""
    gateway = stage.gateway
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json", timeout=PATIENCE)
    mark, met = gateway.mark(), Counter[int]()
    made = gateway.submit(APPLE)
    gateway.ended(made)
    with stage.served_by_nobody("unserved"), requests.Session() as session:
        waiting = gateway.submit(APPLE | {"model": "unserved"})
        for result in schema.get_all_operations():
            for mode in GenerationMode:
                met += answers(result.ok(), mode, session, [made, waiting, NO_JOB], cases)
        gateway.cancel(waiting)
    assert {200, 202, 404, 409, 422} <= set(met), f"the requests were in vain: {met}"
    assert not [line for line in gateway.log[mark:] if line["level"] == "error"]
    assert gateway.ended(gateway.submit(APPLE))["status"] == "completed"


def answers(
    operation: Any, mode: GenerationMode, session: requests.Session, jobs: list[str], cases: int
) -> Counter[int]:
    """Returns the statuses that an operation answered with, and their descriptions."""
    met: Counter[int] = Counter()

    @settings(
        max_examples=cases,
        derandomize=cases == FEW,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode), st.sampled_from([*jobs, None]), st.booleans())
    def conforms(case: schemathesis.Case, job: str | None, known: bool) -> None:
        if known and job and "job_id" in (case.path_parameters or {}):
            case.path_parameters["job_id"] = job
        if known and isinstance(case.body, dict):
            case.body = {name: value for name, value in case.body.items() if name not in UNLIKELY} | APPLE
        answer = case.call(session=session, timeout=PATIENCE)
        met[answer.status_code] += 1
        case.validate_response(answer, checks=CHECKS)

    with suppress(Unsatisfiable):  # an operation without parameters has no invalid ones
        conforms()
    return met
