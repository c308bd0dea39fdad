"""Gateways that die, stop or are overloaded: accepted jobs are kept, and others are refused at once."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from uuid import uuid4

import grpc
import httpx
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1.image_service_pb2_grpc import ImageServiceStub
from patchforge.service.queue import keys
from tests.faults import http2
from tests.faults.gateway_kit import APPLE, Stage, faults, flat_memory, openai_client
from tests.faults.gateways import Gateway, patiently
from tests.faults.tap import tapped
from tests.patience import PATIENCE
from tests.processes import eventually

DRAWING = {"prompt": "a red apple", "model": "tiny-text"}
GENERATION = pb.Generation(prompt="a red apple", model="tiny-text", seed=7)
SUBMIT_JOB = "/patchforge.v1.ImageService/SubmitJob"
SUBMIT = b"\r\n$6\r\nsubmit\r\n"  # the queue's command, as redis-py sends it


# --- row 10 ---


def test_row_10_gateway_killed_between_commit_and_reply(own_stage: Stage) -> None:
    """The client gets no answer, repeats its call at another gateway with the same key, and gets the accepted job."""

    def over_rest(gateway: Gateway) -> str:
        return gateway.submit(APPLE, key="once")

    def over_grpc(gateway: Gateway) -> str:
        with gateway.grpc() as stub:
            return stub.SubmitJob(pb.SubmitJobRequest(generation=GENERATION, idempotency_key="once again")).job.id

    for count, submit in enumerate((over_rest, over_grpc), 1):
        with tapped(own_stage.server.url) as wire, own_stage.redis as redis, own_stage.curtain_down():
            dying = own_stage.start_gateway(redis_url=wire.url)
            dying.await_ready()
            dying.cancel(dying.post(APPLE).json()["id"])  # loads the script into the server
            redis.delete(*redis.keys(keys.JOB + "*"))
            wire.once_answered(SUBMIT, dying.kill)
            with pytest.raises((httpx.TransportError, grpc.RpcError)):
                submit(dying)
            [committed] = own_stage.jobs()
            assert submit(own_stage.gateway) == committed
            assert submit(own_stage.gateway) == committed
            assert len(redis.keys(keys.IDEMPOTENCY + "*")) == count
            assert len(own_stage.jobs()) == 1
        assert own_stage.gateway.ended(committed)["status"] == "completed"
    # An operator sees twice as many answered calls as jobs.
    answered = {"method": "POST", "route": "/v1/jobs", "status": "2xx"}
    assert own_stage.gateway.metric("patchforge_http_requests_total", **answered) == 2
    own_stage.gateway.await_metric(2, "patchforge_grpc_requests_total", method=SUBMIT_JOB, status="OK")


# --- row 11 ---


def test_row_11_queue_full_under_parallel_submits(stage: Stage) -> None:
    """A hundred callers at two gateways, and eight places: eight get in, the others learn when to retry."""
    over, most_waiting, today = threading.Event(), 0, uuid4().hex

    def keep_counting() -> None:
        nonlocal most_waiting
        with stage.redis as redis:
            while not over.is_set():
                most_waiting = max(most_waiting, redis.zcard(keys.WAITING))

    def submit(gateway: Gateway, key: str) -> httpx.Response:
        return patiently(lambda: gateway.post(APPLE | {"model": "idle"}, key))

    with (
        stage.served_by_nobody("idle"),
        stage.another_gateway() as second,
        ThreadPoolExecutor(101) as pool,
        stage.redis as redis,
        ExitStack() as tidying,
    ):
        tidying.callback(over.set)
        counting = pool.submit(keep_counting)
        turned_away = faults(stage.gateway) + faults(second)
        with flat_memory(stage.gateway, 32), flat_memory(second, 32):
            gateways = [stage.gateway, second] * 50
            answers = list(pool.map(submit, gateways, [f"caller {number} {today}" for number in range(100)]))
        over.set()
        counting.result()
        accepted = [answer.json()["id"] for answer in answers if answer.status_code == 202]
        tidying.callback(lambda: [stage.gateway.cancel(job) for job in accepted])
        refused = [answer for answer in answers if answer.status_code != 202]
        assert len(accepted) == len(set(accepted)) == 8
        assert most_waiting == redis.zcard(keys.WAITING) == 8
        # What an operator sees, at any gateway and in total.
        assert second.metric("patchforge_requests_waiting", model="idle") == 8
        assert faults(stage.gateway) + faults(second) - turned_away >= 92
        for answer in refused:
            assert (answer.status_code, answer.json()["code"]) == (503, "queue_full")
            assert int(answer.headers["Retry-After"]) > 0

        with second.grpc() as stub, pytest.raises(grpc.RpcError) as caught:
            stub.SubmitJob(pb.SubmitJobRequest(generation=pb.Generation(prompt="x", model="idle")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert int(dict(caught.value.trailing_metadata())["retry-after"]) > 0

        # A refusal leaves nothing behind, and costs little work.
        stored, before = stage.stored(), stage.gateway.processor_seconds()
        for number in range(20):
            assert submit(stage.gateway, f"latecomer {number} {today}").status_code == 503
        assert stage.gateway.processor_seconds() - before < 20 * 0.1
        assert stage.stored() == stored

        tidying.close()
        late = stage.gateway.submit(APPLE | {"model": "idle"}, key=f"latecomer 0 {today}")
        stage.gateway.cancel(late)


# --- row 18 ---


def test_row_18_sigterm_a_gateway(own_stage: Stage) -> None:
    """First not ready; waiting calls get their pictures, watches end cleanly and continue elsewhere; then it exits."""
    leaving, other = own_stage.start_gateway(drain_seconds=3600), own_stage.gateway
    with (
        ThreadPoolExecutor(1) as pool,
        openai_client(leaving) as client,
        grpc.insecure_channel(leaving.grpc_address) as channel,
    ):
        images, health = ImageServiceStub(channel), health_pb2_grpc.HealthStub(channel)
        with own_stage.curtain_down():
            watched = other.submit(APPLE)
            other.until(watched, "preview")
            over_sse, over_grpc = leaving.follow(watched), images.WatchJob(pb.WatchJobRequest(job_id=watched))
            seen, heard = [next(over_sse).id], [next(over_grpc).event.id]
            watch = health.Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            waiting = pool.submit(client.images.generate, **DRAWING)
            streaming = client.images.generate(**DRAWING, stream=True, partial_images=3)
            generating = images.GenerateImage(pb.GenerateImageRequest(generation=GENERATION))
            kinds = [next(generating).event.WhichOneof("event") for _ in range(3)]

            eventually(lambda: len(own_stage.jobs()) == 4, "all to be accepted")

            leaving.send(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            seen += [event.id for event in over_sse]  # to its end: the connection does not break
            with pytest.raises(grpc.RpcError) as caught:
                heard += [reply.event.id for reply in over_grpc]
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            leaving.wait_for("gateway is shutting down")  # what an operator sees
            assert takes_nothing_on(leaving)
            assert not waiting.done()
        assert waiting.result().data[0].b64_json
        assert [event.type for event in streaming][-1] == "image_generation.completed"
        kinds += [reply.event.WhichOneof("event") for reply in generating]
        assert kinds[-2:] == ["image", "completed"]
        assert leaving.wait() == 0, "well within the grace period, though its health is still being watched"
    assert not leaving.lines("unexpected error")
    seen += [event.id for event in other.follow(watched, seen[-1])]
    assert seen == [event.id for event in other.events(watched)]


def test_row_18_what_outlasts_the_grace_period_is_cancelled(own_stage: Stage) -> None:
    hasty = own_stage.start_gateway(drain_seconds=1)
    with ThreadPoolExecutor(1) as pool, openai_client(hasty) as client, own_stage.curtain_down():
        waiting = pool.submit(client.images.generate, **DRAWING)
        [job] = eventually(own_stage.jobs)
        own_stage.gateway.until(job, "started")
        assert hasty.terminate() == 0
        assert own_stage.gateway.ended(job)["status"] == "cancelled"
        hasty.wait_for("gateway is shutting down")
        with pytest.raises(openai.APIError):
            waiting.result()


def test_row_18_nobody_can_hold_it_up(own_stage: Stage) -> None:
    """Clients that watch health, a job and a picture without reading do not delay health or exit.

    They are tolerated for an hour here, so they are not disconnected earlier.
    """
    held = own_stage.start_gateway(drain_seconds=1, client_timeout_seconds=3600)
    watch = pb.WatchJobRequest(job_id=held.submit(APPLE)).SerializeToString()
    with http2.Connection(held.grpc_address, PATIENCE, window=0) as client, held.grpc() as stub:
        client.call("/grpc.health.v1.Health/Watch", b"", stream=1)
        client.call("/patchforge.v1.ImageService/WatchJob", watch, stream=3)
        generate = pb.GenerateImageRequest(generation=GENERATION).SerializeToString()
        client.call("/patchforge.v1.ImageService/GenerateImage", generate, stream=5)
        eventually(lambda: len(own_stage.jobs()) == 2)
        stub.ListModels(pb.ListModelsRequest())
        own_stage.worker.kill()
        with own_stage.redis as redis:
            redis.delete(keys.WORKERS)  # instead of waiting until the announcement expires
        held.wait_for("not ready", reason="no worker is serving a model")
        assert held.terminate() == 0


def takes_nothing_on(gateway: Gateway) -> bool:
    """New callers are refused: their connection, or their request."""
    try:
        with httpx.Client(base_url=gateway.url, timeout=PATIENCE) as client:
            return client.post("/v1/jobs", json=APPLE).status_code == 503
    except httpx.TransportError:
        return True
