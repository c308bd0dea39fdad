"""The gRPC API over a real channel."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from service.gateway.app import Gateway
from service.gateway.convert import generation_from_proto, generation_to_proto
from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from service.queue import JobQueue
from service.sampler_options import DualLoop, Euler, LookAhead
from service.schemas import GenerationRequest, OutputFormat, Priority
from tests.service.gateway.harness import CARDS, ScriptedWorker, ended, png

APPLE = pb.Generation(prompt="a red apple", model="tiny-text", seed=7)
NO_JOB = "01ARZ3NDEKTSV4RRFFQ69G5FAV"

Stub = pb_grpc.ImageServiceStub


def generate(**fields: Any) -> pb.GenerateImageRequest:
    generation = pb.Generation()
    generation.CopyFrom(APPLE)
    generation.MergeFrom(pb.Generation(**fields))
    return pb.GenerateImageRequest(generation=generation)


async def test_generating_streams_events_and_pictures(stub: Stub, worker: ScriptedWorker) -> None:
    replies = [reply async for reply in stub.GenerateImage(generate(n=2))]
    kinds = [reply.event.WhichOneof("event") for reply in replies]
    assert kinds[:3] == ["queued", "started", "preview"]
    assert kinds[-3:] == ["image", "image", "completed"]
    assert len({reply.job_id for reply in replies}) == 1
    assert [reply.event.image.data for reply in replies[-3:-1]] == [png(7), png(8)]
    assert replies[-2].event.image.content_type == "image/png"
    assert replies[-1].event.completed.report.savings_ratio == pytest.approx(1 / 3)
    assert replies[-1].event.completed.report.images[1].seed == 8
    preview = replies[2].event.preview
    assert preview.png.startswith(b"\x89PNG")
    assert (preview.evaluation, preview.evaluations, len(preview.times)) == (1, 8, 6)


async def test_a_job_from_submit_to_picture(stub: Stub, worker: ScriptedWorker, queue: JobQueue) -> None:
    job = (await stub.SubmitJob(pb.SubmitJobRequest(generation=APPLE))).job
    assert job.status == pb.JOB_STATUS_WAITING
    assert job.generation.dual_loop.quantile == 0.5
    assert job.generation.steps == 8
    events = [reply.event async for reply in stub.WatchJob(pb.WatchJobRequest(job_id=job.id))]
    assert events[-1].WhichOneof("event") == "completed"
    watch = pb.WatchJobRequest(job_id=job.id, after_event_id=events[2].id)
    assert [reply.event async for reply in stub.WatchJob(watch)] == events[3:]
    done = (await stub.GetJob(pb.GetJobRequest(job_id=job.id))).job
    assert done.status == pb.JOB_STATUS_COMPLETED
    assert done.report.patch_evaluations == 32
    picture = await stub.GetImage(pb.GetImageRequest(job_id=job.id, index=0))
    assert (picture.data, picture.content_type) == (png(7), "image/png")


async def test_models(stub: Stub, worker: ScriptedWorker) -> None:
    models = {model.name: model for model in (await stub.ListModels(pb.ListModelsRequest())).models}
    assert models["tiny-class"].kind == pb.MODEL_KIND_CLASS
    assert list(models["tiny-class"].classes) == ["cat", "grinning face"]
    assert models["tiny-class"].WhichOneof("sampler") == "euler"
    text = models["tiny-text"]
    assert (text.kind, text.width, text.height, text.grid_rows, text.grid_columns) == (pb.MODEL_KIND_TEXT, 48, 32, 2, 3)
    assert text.dual_loop.quantile == 0.5


@pytest.mark.parametrize("how", ["cancel", "deadline", "hang up"])
async def test_leaving_a_generation_cancels_its_job(
    gateway: Gateway, worker: ScriptedWorker, queue: JobQueue, how: str
) -> None:
    worker.curtain.clear()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
        call = Stub(channel).GenerateImage(generate(), timeout=2 if how == "deadline" else None)
        job_id = await worker.next_job()
        if how == "cancel":
            call.cancel()
        if how == "deadline":
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [reply async for reply in call]
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await ended(queue, job_id) == "cancelled"


async def test_leaving_a_watch_leaves_the_job_alone(stub: Stub, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()
    job_id = (await stub.SubmitJob(pb.SubmitJobRequest(generation=APPLE))).job.id
    call = stub.WatchJob(pb.WatchJobRequest(job_id=job_id))
    await call.read()
    call.cancel()
    worker.curtain.set()
    assert await ended(queue, job_id) == "completed"


async def test_cancelling(stub: Stub, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()
    job_id = (await stub.SubmitJob(pb.SubmitJobRequest(generation=APPLE))).job.id
    await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
    assert await ended(queue, job_id) == "cancelled"
    again = await stub.CancelJob(pb.CancelJobRequest(job_id=job_id))
    assert again.job.status == pb.JOB_STATUS_CANCELLED


async def test_a_failing_job_ends_its_stream_with_an_event(stub: Stub, worker: ScriptedWorker) -> None:
    replies = [reply async for reply in stub.GenerateImage(generate(prompt="fail"))]
    assert replies[-1].event.failed.error.code == "out_of_memory"


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 2_000_000_000}, "n"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63 - 1}, "seed"),
    ({"steps": 1_000_000}, "steps"),
    ({"guidance": float("nan")}, "guidance"),
    ({"guidance": float("inf")}, "guidance"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"prompt": "x" * 2001}, "prompt"),
    ({"class_label": "cat"}, "class_label"),
    ({"class_label": "unicorn", "model": "tiny-class"}, "class_label"),
    ({"model": "tiny-class"}, "prompt"),
    ({"dual_loop": pb.DualLoopSampler(quantile=1.5)}, "sampler.quantile"),
    ({"look_ahead": pb.LookAheadSampler(ratio=float("nan"))}, "sampler.ratio"),
    ({"output_format": 99}, "output_format"),
    ({"priority": -1}, "priority"),
    ({"output_compression": 101}, "output_compression"),
    ({"deadline_seconds": 0}, "deadline_seconds"),
]


async def test_bad_fields_are_named(stub: Stub, worker: ScriptedWorker) -> None:
    for fields, field in BAD_FIELDS:
        request = generate(**fields)
        for call in (
            stub.GenerateImage(request).read(),
            stub.SubmitJob(pb.SubmitJobRequest(generation=request.generation)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert (caught.value.details() or "").startswith(f"{field}: ")
            assert dict(caught.value.trailing_metadata() or ())["error-field"] == field
    assert await worker.queue.waiting() == {}


async def test_errors_have_their_status(stub: Stub, worker: ScriptedWorker) -> None:
    worker.curtain.clear()
    job_id = (await stub.SubmitJob(pb.SubmitJobRequest(generation=APPLE))).job.id
    same = pb.SubmitJobRequest(generation=APPLE, idempotency_key="k")
    assert (await stub.SubmitJob(same)).job.id == (await stub.SubmitJob(same)).job.id
    other = pb.SubmitJobRequest(generation=generate(n=2).generation, idempotency_key="k")
    expected = [
        (stub.GetJob(pb.GetJobRequest(job_id=NO_JOB)), grpc.StatusCode.NOT_FOUND),
        (stub.GetJob(pb.GetJobRequest(job_id="*\0{")), grpc.StatusCode.NOT_FOUND),
        (stub.CancelJob(pb.CancelJobRequest(job_id=NO_JOB)), grpc.StatusCode.NOT_FOUND),
        (stub.GetImage(pb.GetImageRequest(job_id=job_id, index=-1)), grpc.StatusCode.NOT_FOUND),
        (stub.GetImage(pb.GetImageRequest(job_id=job_id)), grpc.StatusCode.FAILED_PRECONDITION),
        (stub.WatchJob(pb.WatchJobRequest(job_id=NO_JOB)).read(), grpc.StatusCode.NOT_FOUND),
        (
            stub.WatchJob(pb.WatchJobRequest(job_id=job_id, after_event_id="x")).read(),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (stub.SubmitJob(other), grpc.StatusCode.ALREADY_EXISTS),
        (stub.GenerateImage(generate(model="gpt-image-1")).read(), grpc.StatusCode.NOT_FOUND),
        (stub.SubmitJob(pb.SubmitJobRequest()), grpc.StatusCode.INVALID_ARGUMENT),
    ]
    for call, code in expected:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is code


async def test_bytes_that_are_no_message(channel: grpc.aio.Channel, worker: ScriptedWorker) -> None:
    for method in ("SubmitJob", "GetJob"):
        call = channel.unary_unary(f"/patchforge.v1.ImageService/{method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x0a\x02\xff\xfe")  # field 1: a string that is not UTF-8, or a broken submessage
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_oversize_message(stub: Stub, worker: ScriptedWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SubmitJob(pb.SubmitJobRequest(idempotency_key="x" * (9 << 20)))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stub.ListModels(pb.ListModelsRequest())).models, "and the server lives"


async def test_without_a_worker(stub: Stub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.SubmitJob(pb.SubmitJobRequest(generation=APPLE))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert int(dict(caught.value.trailing_metadata() or ())["retry-after"]) > 0


async def test_health_follows_readiness(gateway: Gateway, channel: grpc.aio.Channel, queue: JobQueue) -> None:
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(service="patchforge.v1.ImageService")
    )
    async with asyncio.timeout(60):
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        await queue.announce("scripted", CARDS)
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
        gateway.rpc.health.drain()
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection(gateway: Gateway) -> None:
    def services() -> tuple[list[str], list[str]]:
        with grpc.insecure_channel(f"127.0.0.1:{gateway.grpc_port}") as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            methods = database.FindFileContainingSymbol("patchforge.v1.ImageService").service[0].method
            return list(database.get_services()), [method.name for method in methods]

    names, methods = await asyncio.to_thread(services)
    assert {"patchforge.v1.ImageService", "grpc.health.v1.Health"} <= set(names)
    assert "GenerateImage" in methods


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest(prompt="x", sampler=Euler(), priority=Priority.LOW),
        GenerationRequest(prompt="x", sampler=DualLoop(quantile=0, inner_steps=2, exact=True), previews=False),
        GenerationRequest(class_label="x", sampler=LookAhead(ratio=2.5), output_format=OutputFormat.WEBP, seed=0),
        GenerationRequest(prompt="x", model="m", n=10, steps=200, guidance=0.0, deadline_seconds=0.5),
    ],
)
def test_generations_survive_the_round_trip(request_: GenerationRequest) -> None:
    assert generation_from_proto(generation_to_proto(request_)) == request_


async def test_health_of_what_is_not_served(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nothing"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest(service="nothing"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()
