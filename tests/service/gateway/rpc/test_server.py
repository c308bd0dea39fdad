"""The gRPC API over a real channel."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from patchforge.service.gateway.app import Gateway
from patchforge.service.gateway.rpc.convert import generation_from_proto, generation_to_proto
from patchforge.service.gateway.rpc.server import PING_SECONDS, PLAIN_CHUNK
from patchforge.service.messages.samplers import DualLoop, Euler, LookAhead
from patchforge.service.messages.schemas import GenerationRequest, OutputFormat, Priority
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from patchforge.service.queue import JobQueue
from tests.faults import http2
from tests.patience import PATIENCE
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
        call, job_id = await on_stage(channel, worker, 2.0 if how == "deadline" else None)
        if how == "cancel":
            call.cancel()
        if how == "deadline":
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [reply async for reply in call]
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert await ended(queue, job_id) == "cancelled"


async def on_stage(channel: grpc.aio.Channel, worker: ScriptedWorker, seconds: float | None) -> tuple[Any, str]:
    """A call and its job, which begins before the deadline: so many seconds off, or more if it has to be."""
    while True:
        call = Stub(channel).GenerateImage(generate(), timeout=seconds)
        try:
            return call, await asyncio.wait_for(worker.next_job(), seconds and 2 * seconds)
        except TimeoutError:
            assert seconds is not None, "no job begins"
            seconds *= 2


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
    async with asyncio.timeout(PATIENCE):
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


# --- large pictures, plain channels ---


@pytest.fixture
def noise(worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A picture larger than a plain channel takes in one message; every job draws it."""
    picture = random.Random(7).randbytes(5 << 20)
    monkeypatch.setattr("tests.service.gateway.harness.png", lambda seed: picture)
    return picture


@pytest.mark.parametrize("size", [0, 1 << 20])
async def test_a_large_picture_through_a_plain_channel(stub: Stub, noise: bytes, size: int) -> None:
    """Also if the client says nothing about sizes."""
    wanted = generate(n=2, previews=False)
    wanted.max_chunk_bytes = size
    pictures, finished, job = {0: b"", 1: b""}, [], ""
    async for reply in stub.GenerateImage(wanted):
        job = reply.job_id
        if reply.event.WhichOneof("event") == "image":
            image = reply.event.image
            assert image.content_type == "image/png"
            pictures[image.index] += image.data
            finished += [] if image.more else [image.index]
    assert pictures == {0: noise, 1: noise}
    assert finished == [0, 1]

    replies = [reply async for reply in stub.StreamImage(pb.StreamImageRequest(job_id=job, index=1))]
    assert b"".join(reply.data for reply in replies) == noise
    assert (replies[0].content_type, replies[0].total_bytes) == ("image/png", len(noise))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetImage(pb.GetImageRequest(job_id=job))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, "in one message, it needs the documented option"


async def test_a_picture_that_a_plain_channel_takes_is_whole(
    stub: Stub, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = random.Random(7).randbytes(PLAIN_CHUNK)
    monkeypatch.setattr("tests.service.gateway.harness.png", lambda seed: largest)
    replies = [reply async for reply in stub.GenerateImage(generate(previews=False))]
    assert [reply.event.image for reply in replies if reply.event.HasField("image")] == [
        pb.ImageEvent(data=largest, content_type="image/png")
    ]


async def test_a_large_picture_whole_through_a_channel_that_takes_it(gateway: Gateway, noise: bytes) -> None:
    options = [("grpc.max_receive_message_length", 64 << 20)]  # as docs/api.md has it
    wanted = generate(previews=False)
    wanted.max_chunk_bytes = 63 << 20
    async with grpc.aio.insecure_channel(f"127.0.0.1:{gateway.grpc_port}", options) as channel:
        replies = [reply async for reply in Stub(channel).GenerateImage(wanted)]
        job = pb.GetImageRequest(job_id=replies[0].job_id)
        assert (await Stub(channel).GetImage(job)).data == noise
    assert [reply.event.image.data for reply in replies if reply.event.HasField("image")] == [noise]


@pytest.mark.parametrize("size", [-1, 1, 1023, (63 << 20) + 1])
async def test_chunks_of_a_senseless_size(stub: Stub, worker: ScriptedWorker, size: int) -> None:
    wanted = generate()
    wanted.max_chunk_bytes = size
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [reply async for reply in stub.GenerateImage(wanted)]
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(caught.value.trailing_metadata())["error-field"] == "max_chunk_bytes"


async def test_reflection_under_its_name_of_today(channel: grpc.aio.Channel) -> None:
    """As grpcurl and Postman ask first."""
    request = reflection_pb2.ServerReflectionRequest
    call = channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=request.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [request(list_services=""), request(file_containing_symbol="patchforge.v1.ImageService")]
    listed, described = [reply async for reply in call(iter(asked))]
    names = {service.name for service in listed.list_services_response.service}
    assert {"patchforge.v1.ImageService", "grpc.reflection.v1.ServerReflection"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


async def test_pings_of_a_client_that_waits_are_allowed(gateway: Gateway) -> None:
    """Clients behind NAT send some every ten seconds; gRPC's own limit is one in five minutes."""

    def acknowledged() -> int:
        with http2.Connection(f"127.0.0.1:{gateway.grpc_port}", PATIENCE) as connection:
            frames = connection.frames()
            for number in range(4):
                time.sleep(1.1 * PING_SECONDS)
                connection.ping(number)
                for frame in frames:
                    assert frame.kind != http2.GOAWAY, frame
                    if frame.kind == http2.PING and frame.flags & http2.ACK:
                        break
            return number + 1

    assert await asyncio.to_thread(acknowledged) == 4
