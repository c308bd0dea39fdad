"""Workers die, freeze and are told to stop. Their jobs still end exactly once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest

from patchforge.service.queue import keys
from tests.faults.gateways import MEDIUM, SHORT, Gateway
from tests.faults.harness import IDLE, Stack
from tests.faults.saboteur import KILLS
from tests.processes import Process, eventually, stopped

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def started_attempts(gateway: Gateway, job_id: str) -> list[int]:
    return [event.data["attempt"] for event in gateway.events(job_id) if event.type == "started"]


def holder(workers: list[Process], job_id: str) -> tuple[Process, Process]:
    """Returns the worker that started the job, and the other one."""
    eventually(lambda: any(worker.lines("job started", job=job_id) for worker in workers))
    first, second = workers
    return (first, second) if first.lines("job started", job=job_id) else (second, first)


def test_row_01_worker_killed_mid_job(stack: Stack) -> None:
    second = stack.launch_worker("held_device")
    gateway, first = stack.start_pair("held_device")
    second.wait_for("worker ready")
    wanted = gateway.submit(MEDIUM)
    gateway.ended(wanted)

    with stack.device_held():
        job_id = gateway.submit(MEDIUM)
        gateway.until(job_id, "preview")
        victim, survivor = holder([first, second], job_id)
        killed_at = now(stack)
        silent_for = silence(stack)
        victim.kill()
    job = gateway.ended(job_id)

    assert (job["status"], job["attempt"]) == ("completed", 2)
    events = gateway.events(job_id)
    assert [event.data["attempt"] for event in events if event.type == "started"] == [1, 2]
    again = next(i for i, event in enumerate(events) if event.type == "started" and event.data["attempt"] == 2)
    waited = int(events[again].id.partition("-")[0]) / 1000 - killed_at
    assert waited >= IDLE - silent_for, "taken over before the idle time was up"
    images = [event.data["index"] for event in events[again:] if event.type == "image"]
    assert sorted(images) == list(range(10))
    assert stack.redis.hlen(keys.images(job_id)) == 10
    for index in range(10):
        assert np.abs(gateway.picture(job_id, index) - gateway.picture(wanted, index)).max() <= 1
    # What an operator sees.
    survivor.wait_for("job taken over: its worker stopped responding", job=job_id, attempt=2)
    gateway.await_metric(1, "patchforge_requests_reclaimed_total")


@pytest.mark.parametrize("call", ["heartbeat", "store_image", "finish"])
def test_row_02_worker_stopped_past_the_idle_time(stack: Stack, call: str) -> None:
    gateway, stale = stack.start_pair("stopped_before", stop_before=call)
    job_id = gateway.submit(MEDIUM)
    eventually(lambda: stopped(stale.pid), "the worker to stop itself")
    fresh = stack.start_worker()
    fresh.wait_for("job started", job=job_id, attempt=2)
    stale.resume()
    stale.wait_for("claim lost", job=job_id, attempt=1)  # what an operator sees
    job = gateway.ended(job_id)
    assert (job["status"], job["attempt"]) == ("completed", 2)
    assert not stale.lines("job completed", job=job_id)
    fresh.wait_for("job completed", job=job_id)
    assert started_attempts(gateway, job_id) == [1, 2]
    gateway.await_metric(1, "patchforge_requests_total", status="completed")
    gateway.await_metric(1, "patchforge_claims_lost_total")
    gateway.await_metric(0, "patchforge_requests_running")
    # The stale worker works normally again.
    fresh.kill()
    assert gateway.ended(gateway.submit())["status"] == "completed"


def test_row_02_worker_stopped_with_no_one_to_take_over(stack: Stack) -> None:
    gateway, worker = stack.start_pair("stopped_before", stop_before="heartbeat")
    job_id = gateway.submit(MEDIUM)
    eventually(lambda: stopped(worker.pid), "the worker to stop itself")
    eventually(lambda: silence(stack) > 2 * IDLE)
    worker.resume()
    job = gateway.ended(job_id)
    assert job["status"] == "completed"
    assert job["attempt"] <= 2, "it took the job from itself more than once"
    gateway.await_metric(1, "patchforge_requests_total", status="completed")
    gateway.await_metric(0, "patchforge_requests_running")


def test_row_03_job_that_crashes_every_worker(stack: Stack) -> None:
    gateway = stack.start_gateway()
    worker = stack.start_worker("saboteur")
    gateway.await_ready()
    neighbours = [gateway.submit(MEDIUM, seed=seed) for seed in range(4)]
    for job_id in neighbours:
        gateway.until(job_id, "preview")
    poison = gateway.submit(seed=KILLS)
    for attempt in (1, 2, 3):
        worker.wait_for("job started", job=poison, attempt=attempt)
        assert worker.wait() == -signal.SIGKILL
        worker = stack.start_worker("saboteur")

    job = gateway.ended(poison)
    assert (job["status"], job["attempt"]) == ("failed", 3)
    assert job["error"]["code"] == "dead_letter"
    assert "3 attempts" in job["error"]["message"]
    for job_id in neighbours:
        assert gateway.ended(job_id)["status"] == "completed"
    [(_, letter)] = stack.redis.xrange(keys.DEAD_LETTERS)
    assert letter[b"job"].decode() == poison
    # What an operator sees.
    assert "3 attempts" in worker.wait_for("job dead-lettered", job=poison, attempts=3)["reason"]
    gateway.await_metric(1, "patchforge_requests_dead_lettered_total")
    gateway.await_metric(1, "patchforge_requests_total", status="failed")
    assert gateway.ended(gateway.submit())["status"] == "completed"


def test_row_19_sigterm_a_worker(stack: Stack) -> None:
    gateway, first = stack.start_pair("held_device", max_running=1, drain_seconds=60)
    with stack.device_held():
        running, waiting = gateway.submit(MEDIUM), gateway.submit(MEDIUM)
        gateway.until(running, "preview")
        first.send(signal.SIGTERM)
        first.wait_for("draining", jobs=1)
    assert first.wait() == 0
    assert gateway.ended(running)["status"] == "completed"
    assert (gateway.job(waiting)["status"], gateway.job(waiting)["attempt"]) == ("waiting", 0)
    first.wait_for("worker stopped")
    assert not first.lines("job started", job=waiting)
    eventually(lambda: gateway.ready().status_code == 503)

    with stack.device_held():
        hasty = stack.start_worker("held_device", drain_seconds=0)
        gateway.until(waiting, "preview")
        assert hasty.terminate() == 0
    hasty.wait_for("job given back", job=waiting)
    assert (gateway.job(waiting)["status"], gateway.job(waiting)["attempt"]) == ("waiting", 0)

    last = stack.start_worker()
    job = gateway.ended(waiting)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert started_attempts(gateway, waiting) == [1, 1]
    assert not last.lines("job taken over: its worker stopped responding")
    gateway.await_metric(0, "patchforge_requests_reclaimed_total")


def test_row_19_sigterm_a_worker_while_redis_is_away(stack: Stack) -> None:
    gateway, busy = stack.start_pair(drain_seconds=1)
    job_id = gateway.submit(SHORT | {"steps": 200})
    gateway.until(job_id, "preview")
    stack.kill_server()
    early = stack.launch_worker()
    early.wait_for("queue server cannot be used", reason="the queue server cannot be reached")
    for worker in (busy, early):
        worker.send(signal.SIGTERM)
    assert [worker.wait(30) for worker in (busy, early)] == [0, 0]  # Kubernetes waits as long
    stack.server.start()
    stack.start_worker()
    assert gateway.ended(job_id)["status"] == "completed"


def silence(stack: Stack) -> float:
    """Returns the seconds since the last heartbeat of the only running job."""
    [pending] = stack.redis.xpending_range(keys.queue("tiny-class", "normal"), keys.GROUP, "-", "+", 1)
    return pending["time_since_delivered"] / 1000


def now(stack: Stack) -> float:
    seconds, microseconds = stack.redis.time()
    return float(seconds) + microseconds / 1e6


def test_serve_starts_another_worker_for_one_that_was_running(stack: Stack, tmp_path: Path) -> None:
    """`serve` ends only if a worker cannot start, whatever else ends it."""
    serve = stack.start_serve(tmp_path / "serve")
    listed = Path(f"/proc/{serve.pid}/task/{serve.pid}/children").read_text().split()
    [worker] = [int(pid) for pid in listed if "serve" not in Path(f"/proc/{pid}/comm").read_text()]
    mark = serve.mark()
    os.kill(worker, signal.SIGKILL)
    assert serve.wait_for("the worker ended; starting another", after=mark)["code"] == -signal.SIGKILL
    serve.wait_for("worker ready", after=mark)
    assert serve.ended(serve.submit())["status"] == "completed"
    assert serve.terminate() == 0
