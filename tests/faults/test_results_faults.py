"""The object store dies while workers deliver and gateways read, or refuses them: no picture is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.faults.gateways import SHORT
from tests.faults.harness import Stack
from tests.object_store import SECRET, ObjectServer
from tests.processes import PATCHFORGE, eventually, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AWAY = "object store cannot be used"
BACK = "object store can be used again"
FAILURES = "patchforge_results_failures_total"
ONE_LINE = "error: the object store "


def test_row_33_the_object_store_dies_and_comes_back(
    stack: Stack, object_server: ObjectServer, object_variables: dict[str, str]
) -> None:
    apart = {"results": object_variables["PATCHFORGE_RESULTS"]}
    gateway, worker = stack.start_pair(**apart, drain_seconds=0)
    early = gateway.submit()
    assert gateway.ended(early)["status"] == "completed"
    object_server.stop()

    waiting = [gateway.submit(SHORT | {"n": 2}) for _ in range(2)]
    worker.wait_for(AWAY, operation="put", reason="the object store s3://pictures/results cannot be reached")
    later = gateway.submit()
    gateway.until(later, "started")
    assert [gateway.job(job)["status"] for job in waiting] == ["running"] * 2
    answer = gateway.http.get(f"/v1/jobs/{early}/image")
    assert (answer.status_code, answer.json()["code"]) == (503, "results_unavailable")
    assert "Retry-After" in answer.headers
    assert gateway.ready().status_code == 200
    gateway.wait_for(AWAY, operation="get")
    assert gateway.metric(FAILURES, workers=False, operation="get") == 1
    assert worker.terminate() == 0
    assert len(worker.lines("job given back")) == 3

    other = stack.start_worker(**apart)
    other.wait_for(AWAY, operation="put")
    assert not [name for name in worker.lines("job completed") if name["job"] != early]
    object_server.start()
    for job in (*waiting, later):
        ended = gateway.ended(job)
        assert (ended["status"], ended["attempt"]) == ("completed", 1)
        assert gateway.picture(job, ended["request"]["n"] - 1).any()
    other.wait_for(BACK, operation="put")
    gateway.wait_for(BACK, operation="get")
    assert gateway.picture(early).any()
    names = object_server.names()
    assert [sum(job in name for name in names) for job in (*waiting, later)] == [2, 2, 1]


def test_row_33_a_batch_waits_for_the_object_store(
    stack: Stack, object_server: ObjectServer, object_variables: dict[str, str]
) -> None:
    """Its lines are there, and its results go there. Nothing of it is lost while the store is dead."""
    gateway, _ = stack.start_pair(results=object_variables["PATCHFORGE_RESULTS"], batch_in_flight=2)
    lines = [{"custom_id": str(seed), "url": "/v1/jobs", "body": SHORT | {"seed": seed}} for seed in range(12)]
    content = "\n".join(map(json.dumps, lines)).encode()
    headers = {"Content-Type": "application/jsonl"}
    batch = gateway.http.post("/v1/batches", content=content, headers=headers).json()["id"]
    object_server.stop()
    refused = gateway.http.post("/v1/batches", content=content, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "results_unavailable")
    gateway.wait_for(AWAY, operation="put")
    object_server.start()

    def state() -> dict[str, Any]:
        return dict(gateway.http.get(f"/v1/batches/{batch}").json())

    eventually(lambda: state()["status"] == "completed")
    assert state()["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    made = gateway.http.get(f"/v1/files/{state()['output_file_id']}/content").text.splitlines()
    assert [json.loads(line)["custom_id"] for line in made] == [str(seed) for seed in range(12)]
    assert [name for name in object_server.names() if f"batches/{batch.removeprefix('batch_')}/output-" in name]


@pytest.mark.parametrize("role", ["gateway", "worker", "serve"])
def test_row_33_what_the_object_store_refuses_ends_the_start_with_a_line(
    role: str, stack: Stack, bundle_dir: Path, object_variables: dict[str, str]
) -> None:
    wrong = object_variables | {"AWS_SECRET_ACCESS_KEY": SECRET.upper(), "REDIS_URL": stack.server.url}
    own = {
        "PATCHFORGE_BUNDLE_DIR": str(bundle_dir),
        "PATCHFORGE_PATCH_BUDGET": "4096",
        "PATCHFORGE_MODELS": "tiny-class",
    }
    ports = {"PATCHFORGE_HTTP_PORT": "0", "PATCHFORGE_GRPC_PORT": "0"}
    ended = run(*PATCHFORGE, role, status=1, **wrong, **own, **ports)
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ONE_LINE.removeprefix("error: ") in line
    assert line.endswith("it does not accept the signature: check AWS_SECRET_ACCESS_KEY")
    assert "Traceback" not in ended.stderr
    assert not {SECRET, SECRET.upper()} & set(ended.stderr.split())
