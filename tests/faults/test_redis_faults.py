"""The queue server dies, hangs, fills up and loses its data: accepted jobs are kept, or their loss is reported."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import keys
from tests.faults.gateway_kit import APPLE, Stage
from tests.faults.gateways import LONG, MEDIUM, SHORT, Gateway
from tests.faults.harness import IDLE, Stack
from tests.faults.tap import tapped
from tests.patience import PATIENCE
from tests.processes import eventually, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

AWAY = "the queue server cannot be reached"


def refused(answer: httpx.Response) -> bool:
    """A clear refusal, and when to retry."""
    return answer.status_code == 503 and answer.json()["code"] == "unavailable" and "Retry-After" in answer.headers


def test_row_05_redis_killed_and_restarted(stack: Stack) -> None:
    gateway, worker = stack.start_pair(max_running=2)
    long = gateway.submit(LONG)
    gateway.until(long, "preview")
    accepted: list[str] = []
    quit_ = threading.Event()

    def keep_submitting() -> None:
        while not quit_.is_set():
            answer = gateway.post(SHORT)
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])

    with ThreadPoolExecutor(5) as pool:
        watching = pool.submit(gateway.events, long)
        for _ in range(4):
            pool.submit(keep_submitting)
        eventually(lambda: len(accepted) >= 20)
        stack.kill_server()
        quit_.set()

        gateway.wait_for("not ready", reason=AWAY)
        assert gateway.ready().status_code == 503
        assert refused(gateway.post(SHORT))
        worker.wait_for("queue server cannot be used", reason=AWAY)
        time.sleep(1.2 * IDLE)  # nobody could be heard during this time
        mark = gateway.mark()
        stack.server.start()
        gateway.wait_for("ready for requests", after=mark)
        worker.wait_for("queue server can be used again")
        events = watching.result()

    jobs = [gateway.ended(job_id) for job_id in [long, *accepted]]
    assert [job["status"] for job in jobs] == ["completed"] * len(jobs)
    assert [job["attempt"] for job in jobs] == [1] * len(jobs), "a worker that lived was taken for dead"
    order = [tuple(map(int, event.id.split("-"))) for event in events]
    assert order == sorted(set(order)), "the watcher saw an event twice, or out of order"
    milestones = [event.data for event in events if event.type not in ("preview", "patches")]
    assert [event["type"] for event in milestones] == ["queued", "started", *["image"] * 4, "completed"]
    assert stack.redis.zcard(keys.WAITING) == 0
    assert len(worker.lines("worker ready")) == 1
    assert gateway.metric("patchforge_http_requests_total", route="/v1/jobs", status="5xx") >= 1


def test_row_05_serve_restarts_its_redis(stack: Stack, tmp_path: Path) -> None:
    serve = stack.start_serve(tmp_path / "serve")
    job_id = serve.submit(LONG)
    serve.until(job_id, "preview")
    [server] = [child for child in serve.children() if "serve" in child.name()]
    mark = serve.mark()
    server.kill()
    serve.wait_for("the queue server ended; starting it again")  # what an operator sees
    serve.await_ready()
    job = serve.ended(job_id)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    assert len(serve.lines("the queue server ended; starting it again")) == 1
    assert not [line for line in serve.log[mark:] if line["event"] == "the worker ended; starting another"]
    assert serve.terminate() == 0


def test_row_06_redis_paused_during_a_submit(stack: Stack) -> None:
    stack.start_worker(claim_idle_seconds=30)
    with tapped(stack.server.url) as tap:
        gateway = stack.start_gateway(redis_url=tap.url, claim_idle_seconds=30)
        gateway.await_ready()
        running = gateway.submit(LONG)
        gateway.until(running, "preview")

        tap.once(b"submit", lambda: stop(stack.server.pid))
        began = time.monotonic()
        assert refused(gateway.post(SHORT, key="once")), "and Redis has not come back"
        gateway.wait_for("not ready", reason=AWAY)
        assert gateway.ready().status_code == 503
        time.sleep(max(0.0, began + 20 - time.monotonic()))  # the row's 20 s
        mark = gateway.mark()
        os.kill(stack.server.pid, signal.SIGCONT)
        gateway.wait_for("ready for requests", after=mark)

        jobs = eventually(lambda: len(job_keys := stack.redis.keys(keys.JOB + "*")) == 2 and job_keys)
        [made] = [key.decode().removeprefix(keys.JOB) for key in jobs if not key.endswith(running.encode())]
        assert gateway.submit(SHORT, key="once") == made, "the client's retry made a second job"
        for job_id in (made, running):
            job = gateway.ended(job_id)
            assert (job["status"], job["attempt"]) == ("completed", 1)
        assert len(stack.redis.keys(keys.JOB + "*")) == 2
        gateway.await_metric(2, "patchforge_requests_total", status="completed")
        assert gateway.metric("patchforge_http_requests_total", route="/v1/jobs", status="5xx") == 1


def test_row_06_redis_paused_during_a_claim(stack: Stack) -> None:
    """The server starts the job when it continues, for a worker that has given up by then. The worker asks again."""
    gateway = stack.start_gateway(claim_idle_seconds=600)
    with tapped(stack.server.url) as tap:
        worker = stack.start_worker(redis_url=tap.url, claim_idle_seconds=600)
        gateway.await_ready()
        stop(worker.pid)
        job_id = gateway.submit(SHORT)
        tap.once(b"\r\nclaim\r\n", lambda: stop(stack.server.pid))
        os.kill(worker.pid, signal.SIGCONT)
        worker.wait_for("queue server cannot be used", reason=AWAY)
        os.kill(stack.server.pid, signal.SIGCONT)
        job = gateway.ended(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 1)
        assert not worker.lines("job taken over: its worker stopped responding")


def test_row_06_redis_paused_during_a_finish(stack: Stack) -> None:
    gateway = stack.start_gateway()
    with tapped(stack.server.url) as tap:
        worker = stack.start_worker(redis_url=tap.url)
        gateway.await_ready()
        gateway.ended(
            gateway.submit(SHORT)
        )  # now the server has the script; otherwise it would only say that it has not
        tap.once(b"\r\nfinish\r\n", lambda: stop(stack.server.pid))
        job_id = gateway.submit(SHORT)
        worker.wait_for("queue server cannot be used", reason=AWAY)  # the call got no answer
        os.kill(stack.server.pid, signal.SIGCONT)
        assert gateway.ended(job_id)["status"] == "completed"
        # The worker's call did it, as the worker learns when it repeats the call. So it counts the job.
        worker.wait_for("job completed", job=job_id)
        gateway.await_metric(2, "patchforge_requests_total", status="completed")
        assert gateway.metric("patchforge_claims_lost_total") == 0


def test_row_07_redis_out_of_memory(stack: Stack) -> None:
    gateway, _ = stack.start_pair("held_device")
    with stack.device_held():
        running = gateway.submit(MEDIUM)
        gateway.until(running, "preview")
        stack.redis.config_set("maxmemory", 1)
        for _ in range(3):
            assert refused(gateway.post(SHORT))
        with gateway.grpc() as stub, pytest.raises(grpc.RpcError) as caught:
            stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(class_label="cat")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert gateway.job(running)["status"] == "running"
    job = gateway.ended(running)
    assert (job["status"], job["attempt"]) == ("completed", 1)
    for index in range(MEDIUM["n"]):
        assert gateway.picture(running, index).shape == (32, 32, 3)
    # What an operator sees.
    assert gateway.metric("patchforge_http_requests_total", route="/v1/jobs", status="5xx") == 3
    gateway.await_metric(1, "patchforge_requests_total", status="completed")

    stack.redis.config_set("maxmemory", 0)
    assert gateway.ended(gateway.submit())["status"] == "completed"


def test_row_07_startup_refuses_a_server_that_evicts(stack: Stack) -> None:
    stack.redis.config_set("maxmemory-policy", "allkeys-lru")
    worker, gateway = stack.launch_worker(), stack.start_gateway()
    reason = "the queue server's maxmemory-policy must be noeviction, not allkeys-lru"
    gateway.wait_for("not ready", reason=reason)
    worker.wait_for("queue server cannot be used", reason=reason)
    assert gateway.ready().status_code == 503
    assert gateway.ready().json()["detail"] == reason
    assert refused(gateway.post(SHORT))
    assert not worker.lines("worker ready")
    stack.redis.config_set("maxmemory-policy", "noeviction")
    worker.wait_for("worker ready")
    gateway.await_ready()
    assert gateway.ended(gateway.submit())["status"] == "completed"


def test_row_08_flushall(stack: Stack) -> None:
    gateway, worker = stack.start_pair("held_device", max_running=1)
    with stack.device_held(), ThreadPoolExecutor(2) as pool, gateway.grpc() as stub:
        running, waiting = gateway.submit(MEDIUM), gateway.submit(SHORT)
        gateway.until(running, "preview")
        first_event = threading.Event()

        def watch(job_id: str) -> Any:
            for _ in stub.WatchJob(pb.WatchJobRequest(job_id=job_id)):
                first_event.set()

        watching = pool.submit(watch, waiting)
        assert first_event.wait(PATIENCE)
        stack.redis.flushall()
        error = watching.exception()
    assert isinstance(error, grpc.RpcError)
    assert error.code() is grpc.StatusCode.NOT_FOUND, "the watcher was not told"
    for job_id in (running, waiting):
        assert gateway.http.get(f"/v1/jobs/{job_id}").status_code == 404
    worker.wait_for("claim lost", job=running)  # what an operator sees
    after_a_loss(gateway)
    gateway.await_metric(1, "patchforge_claims_lost_total")
    gateway.await_metric(0, "patchforge_requests_running")
    assert worker.running
    assert len(worker.lines("worker ready")) == 1


def test_row_08_consumer_group_gone(stack: Stack) -> None:
    gateway, worker = stack.start_pair("held_device", max_running=1)
    stream = keys.queue("tiny-class", "normal")
    with stack.device_held():
        running, waiting = gateway.submit(MEDIUM), gateway.submit(SHORT)
        gateway.until(running, "preview")
        stack.redis.xgroup_destroy(stream, keys.GROUP)
    for job_id in (running, waiting):
        job = gateway.ended(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 1)
    [group] = stack.redis.xinfo_groups(stream)
    assert (group["name"].decode(), group["pending"]) == (keys.GROUP, 0)
    after_a_loss(gateway)
    gateway.await_metric(3, "patchforge_requests_total", status="completed")
    assert len(worker.lines("worker ready")) == 1
    assert not worker.lines("claim lost")


def test_row_32_more_jobs_than_memory(tmp_path: Path) -> None:
    """Forty jobs of ten pictures at a queue server of 50 MB: all together would take about 100."""
    noise = 196_000  # a PNG of 256 × 256 pixels that nothing compresses
    job = APPLE | {"prompt": f"fill {noise}", "n": 10, "width": 256, "height": 256, "sampler": "euler"}
    accepted: list[str] = []
    refused: list[str] = []
    with Stage(tmp_path, max_waiting=100) as stage, ThreadPoolExecutor(8) as pool:
        gateway = stage.gateway
        stage.redis.config_set("maxmemory", 50_000_000)

        def submit(_: int) -> None:
            answer = gateway.post(job)
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])
            else:
                assert answer.status_code == 503, answer.text
                assert answer.json()["code"] == "queue_full"
                assert "Retry-After" in answer.headers
                refused.append(answer.json()["detail"])

        with stage.curtain_down():  # what was accepted holds nothing yet
            list(pool.map(submit, range(40)))
            assert 10 <= len(accepted) <= 20
            assert all("the queue server has no room: this may need" in reason for reason in refused)
            assert gateway.metric("patchforge_queue_reserved_bytes") > len(accepted) * 10 * noise
        for done in accepted:
            assert gateway.ended(done)["status"] == "completed"
        for number in range(5):  # into the room that reservations were larger than results
            submit(number)
        assert len(refused) > 20
        for done in accepted:
            assert gateway.ended(done)["status"] == "completed"
            for index in range(10):
                answer = gateway.http.get(f"/v1/jobs/{done}/image", params={"index": index})
                assert len(answer.content) == noise
        assert stage.redis.info("memory")["used_memory_peak"] < 60_000_000
        # What an operator sees.
        assert gateway.metric("patchforge_memory_refusals_total") == len(refused)
        assert gateway.metric("patchforge_queue_reserved_bytes") == 0
        assert 0 < gateway.metric("patchforge_queue_admission_limit_bytes") < 50_000_000

        stage.redis.delete(*map(keys.images, accepted), *map(keys.events, accepted))  # results expire
        assert gateway.ended(gateway.submit(job))["status"] == "completed"


def after_a_loss(gateway: Gateway) -> None:
    """Service continues."""
    gateway.await_ready()
    assert gateway.ended(gateway.submit(MEDIUM))["status"] == "completed"
