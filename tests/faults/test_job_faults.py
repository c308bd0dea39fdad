"""Jobs that are submitted twice, wait too long, or are cancelled at the worst moment."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from uuid import uuid4

import grpc
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import keys
from tests.faults.gateways import LONG, MEDIUM, SHORT, Gateway, Seen
from tests.faults.harness import IDLE, Stack
from tests.faults.shared import MAX_RUNNING, Shared
from tests.processes import eventually

pytestmark = pytest.mark.timeout(900)
HALF_AN_HOUR = 1800  # no correct clock is wrong by this much, even on a slow machine
AS_PROTO = pb.Generation(
    class_label="cat", seed=7, euler=pb.EulerSampler(), steps=MEDIUM["steps"], n=MEDIUM["n"], guidance=2.0
)


def test_row_09_twenty_submits_with_one_key(shared: Shared) -> None:
    gateways, key = [shared.gateway, shared.other_gateway], str(uuid4())
    before = shared.total("completed")
    jobs_before = len(shared.stack.redis.keys(keys.JOB + "*"))
    with ThreadPoolExecutor(20) as pool:
        ids = {job.result() for job in [pool.submit(gateways[i % 2].submit, MEDIUM, key) for i in range(20)]}
    assert len(ids) == 1
    [job_id] = ids

    other = shared.gateway.post(MEDIUM | {"seed": 8}, key)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_conflict")
    assert shared.gateway.post(MEDIUM, key).json()["id"] == job_id, "in flight: the same job"
    assert shared.gateway.ended(job_id)["status"] == "completed"
    again = shared.other_gateway.post(MEDIUM, key).json()
    assert (again["id"], again["status"]) == (job_id, "completed")
    assert len(shared.stack.redis.keys(keys.JOB + "*")) == jobs_before + 1
    shared.await_ended("completed", before + 1)  # an operator sees one request for all these calls
    assert len(shared.worker.lines("job started", job=job_id)) == 1


def test_row_09_the_same_over_grpc(shared: Shared) -> None:
    key, before = str(uuid4()), shared.total("completed")
    with shared.gateway.grpc() as stub, ThreadPoolExecutor(20) as pool:
        request = pb.SubmitJobRequest(generation=AS_PROTO, idempotency_key=key)
        answers = [pool.submit(stub.SubmitJob, request) for _ in range(20)]
        [job_id] = {answer.result().job.id for answer in answers}
        request.generation.seed = 8
        with pytest.raises(grpc.RpcError) as caught:
            stub.SubmitJob(request)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    assert shared.gateway.ended(job_id)["status"] == "completed"
    shared.await_ended("completed", before + 1)


def test_row_12_deadline_passes_while_queued(shared: Shared) -> None:
    gateway, before = shared.gateway, shared.total("expired")
    with shared.stack.device_held():
        blockers = [gateway.submit(LONG, previews=False) for _ in range(MAX_RUNNING)]
        for job_id in blockers:
            gateway.until(job_id, "started")
        late = gateway.submit(deadline_seconds=0.5)
        patient = gateway.submit(deadline_seconds=600)
        assert [event.type for event in gateway.events(late)] == ["queued", "expired"]
    job = gateway.job(late)
    assert (job["status"], job["attempt"]) == ("expired", 0)
    assert job["finished_at"] - job["created_at"] >= 0.5, "expired early"
    for job_id in blockers:
        gateway.cancel(job_id)
    assert gateway.ended(patient)["status"] == "completed"
    assert not shared.worker.lines("job started", job=late), "it was run"
    shared.await_ended("expired", before + 1)
    for job_id in blockers:
        assert gateway.ended(job_id)["status"] == "cancelled"


def test_row_14_cancel_races_completion(shared: Shared) -> None:
    shared.catch_up()
    before = {status: shared.total(status) for status in ("completed", "cancelled")}
    seen = {"completed": 0, "cancelled": 0}
    moments = [*["queued", "started"] * 3, *["image"] * 14, *["completed"] * 2]
    with ThreadPoolExecutor(3) as pool, shared.gateway.grpc() as stub:
        for moment in moments:
            job_id = shared.gateway.submit(LONG if moment in ("queued", "started") else SHORT)
            shared.gateway.until(job_id, moment)
            cancels = [
                pool.submit(shared.gateway.cancel, job_id),
                pool.submit(shared.gateway.cancel, job_id),
                pool.submit(stub.CancelJob, pb.CancelJobRequest(job_id=job_id)),
            ]
            for cancel in cancels:
                cancel.result()
            job = shared.gateway.ended(job_id)
            seen[job["status"]] += 1
            assert shared.gateway.cancel(job_id) == job, "repeating a cancel changed something"
            assert shared.other_gateway.ended(job_id) == job, "gateways disagree"
            assert moment != "completed" or job["status"] == "completed"
            assert moment not in ("queued", "started") or job["status"] == "cancelled"
    assert sum(seen.values()) == len(moments)
    for status, count in seen.items():
        shared.await_ended(status, before[status] + count)
    eventually(lambda: shared.gateway.metric("patchforge_requests_running") == 0)


@pytest.mark.slow
def test_row_20_clock_off_by_an_hour(stack: Stack) -> None:
    ahead = stack.launch_worker("wrong_clock", clock_off=3600)
    behind = stack.launch_worker("wrong_clock", clock_off=-3600)
    gateway = stack.start_gateway("wrong_clock", clock_off=3600)
    for worker in (ahead, behind):
        worker.wait_for("worker ready")
    gateway.await_ready()

    job_id = gateway.submit(LONG, seed=1, n=10)
    started, last = running_for(gateway, job_id, seconds=2 * IDLE)
    assert gateway.job(job_id)["attempt"] == 1, "reclaimed early"
    assert 0 < last - started < HALF_AN_HOUR, "the queue's own clock is off"
    victim, survivor = (ahead, behind) if ahead.lines("job started", job=job_id) else (behind, ahead)
    victim.kill()
    survivor.wait_for("job taken over: its worker stopped responding", job=job_id, attempt=2)
    gateway.await_metric(1, "patchforge_requests_reclaimed_total")

    gateway.cancel(job_id)
    assert gateway.ended(job_id)["status"] == "cancelled"
    job = gateway.ended(gateway.submit(deadline_seconds=600))
    assert (job["status"], job["attempt"]) == ("completed", 1), "expired early"
    assert abs(job["created_at"] - time.time()) < HALF_AN_HOUR
    assert 0 <= job["report"]["queue_seconds"] < HALF_AN_HOUR
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    survivor.pause()
    late = gateway.ended(gateway.submit(deadline_seconds=1))
    survivor.resume()
    assert late["status"] == "expired"
    assert 1 <= late["finished_at"] - late["created_at"] < HALF_AN_HOUR, "expired late"


def running_for(gateway: Gateway, job_id: str, seconds: float) -> tuple[float, float]:
    """Returns when the job started, and when its first event after `seconds` came, by the queue's clock."""

    def at(event: Seen) -> float:
        return int(event.id.partition("-")[0]) / 1000

    started = at(gateway.until(job_id, "started"))
    for event in gateway.follow(job_id):
        if event.type == "preview" and at(event) - started > seconds:
            return started, at(event)
    raise AssertionError(f"the job ended within {seconds} s")
