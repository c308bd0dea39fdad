"""The device runs out of memory, or a request breaks the network: only this request fails, and the worker survives."""

from __future__ import annotations

import numpy as np
import pytest

from tests.faults.gateways import MEDIUM
from tests.faults.saboteur import GREEDY, RAISES, ROOM, TOO_GREEDY, TURNS_NAN, UNCERTAIN
from tests.faults.shared import Shared

pytestmark = pytest.mark.timeout(900)


def test_row_04_out_of_memory_together_is_retried_smaller(shared: Shared) -> None:
    gateway, worker = shared.gateway, shared.worker
    alone = gateway.submit(seed=GREEDY)
    job_id = gateway.submit(seed=GREEDY, n=10)
    job = gateway.ended(job_id)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    gateway.ended(alone)
    assert np.abs(gateway.picture(job_id, 0) - gateway.picture(alone)).max() <= 1
    # What an operator sees.
    tried = worker.lines("pictures failed together; trying each half")
    assert any("CUDA out of memory" in line["error"] and line["pictures"] > ROOM for line in tried)


def test_row_04_out_of_memory_alone_fails_typed(shared: Shared) -> None:
    gateway, worker, before = shared.gateway, shared.worker, shared.total("failed")
    neighbour = gateway.submit(MEDIUM)
    gateway.until(neighbour, "preview")
    job_id = gateway.submit(seed=TOO_GREEDY)
    job = gateway.ended(job_id)
    assert (job["status"], job["attempt"]) == ("failed", 1)
    assert job["error"]["code"] == "out_of_memory"
    assert "memory" in job["error"]["message"]
    assert gateway.ended(neighbour)["status"] == "completed"
    assert gateway.ended(gateway.submit())["status"] == "completed"
    assert worker.running
    # What an operator sees.
    worker.wait_for("job failed", job=job_id, code="out_of_memory")
    shared.await_ended("failed", before + 1)


def test_row_29_one_request_of_a_pack_raises_or_goes_nan(shared: Shared) -> None:
    gateway, worker, before = shared.gateway, shared.worker, shared.total("failed")
    reference = gateway.submit(MEDIUM)
    gateway.ended(reference)
    with shared.stack.device_held():
        good = [gateway.submit(MEDIUM) for _ in range(2)]
        for job_id in good:
            gateway.until(job_id, "preview")
        faults = {RAISES: "evaluation_failed", TURNS_NAN: "not_finite", UNCERTAIN: "not_finite"}
        bad = {gateway.submit(seed=seed): code for seed, code in faults.items()}
    for job_id, code in bad.items():
        job = gateway.ended(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", code)
    for job_id in good:
        job = gateway.ended(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 1)
        for index in range(10):
            assert np.abs(gateway.picture(job_id, index) - gateway.picture(reference, index)).max() <= 1
    # What an operator sees. The first line shows that the requests did share an evaluation.
    tried = worker.lines("pictures failed together; trying each half")
    assert any("mat1 and mat2" in line["error"] and line["pictures"] > 10 for line in tried)
    for job_id, code in bad.items():
        worker.wait_for("job failed", job=job_id, code=code)
    shared.await_ended("failed", before + 3)
