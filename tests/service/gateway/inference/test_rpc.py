"""The Open Inference Protocol over a real gRPC channel, with generated stubs only."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import grpc
import pytest

from patchforge.service.gateway.inference.protocol import INPUTS, OUTPUTS
from patchforge.service.pb.inference import grpc_inference_service_pb2 as pb
from patchforge.service.pb.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub as Stub
from patchforge.service.queue import JobQueue
from tests.service.gateway.harness import COLUMNS, PATCHES, ROWS, ScriptedWorker, ended

Input = pb.ModelInferRequest.InferInputTensor


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> Stub:
    return Stub(channel)


def text(name: str, value: str | bytes) -> Any:
    value = value.encode() if isinstance(value, str) else value
    return Input(name=name, datatype="BYTES", shape=[1], contents=pb.InferTensorContents(bytes_contents=[value]))


def number(name: str, value: int, datatype: str = "INT64") -> Any:
    return Input(name=name, datatype=datatype, shape=[1], contents=pb.InferTensorContents(int64_contents=[value]))


def request(*inputs: Any, model: str = "tiny-text", outputs: tuple[str, ...] = (), **fields: Any) -> Any:
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs]
    return pb.ModelInferRequest(model_name=model, inputs=inputs, outputs=wanted, **fields)


async def test_liveness_does_not_need_a_worker_and_readiness_does(inference: Stub) -> None:
    assert (await inference.ServerLive(pb.ServerLiveRequest())).live
    assert not (await inference.ServerReady(pb.ServerReadyRequest())).ready
    assert not (await inference.ModelReady(pb.ModelReadyRequest(name="tiny-text"))).ready


async def test_readiness_of_server_and_models(inference: Stub, worker: ScriptedWorker) -> None:
    assert (await inference.ServerReady(pb.ServerReadyRequest())).ready
    for name, version, ready in [("tiny-text", "", True), ("tiny-text", "1", True), ("tiny-text", "2", False)]:
        assert (await inference.ModelReady(pb.ModelReadyRequest(name=name, version=version))).ready is ready
    assert not (await inference.ModelReady(pb.ModelReadyRequest(name="other"))).ready


async def test_metadata(inference: Stub, worker: ScriptedWorker) -> None:
    server = await inference.ServerMetadata(pb.ServerMetadataRequest())
    assert (server.name, list(server.extensions)) == (
        "patchforge",
        ["binary_tensor_data", "model_configuration", "statistics"],
    )
    model = await inference.ModelMetadata(pb.ModelMetadataRequest(name="tiny-class"))
    inputs = {each.name: each.datatype for each in model.inputs}
    assert inputs == {name: datatype for name, datatype in INPUTS.items() if name not in ("prompt", "negative_prompt")}
    outputs = {each.name: list(each.shape) for each in model.outputs}
    assert list(outputs) == list(OUTPUTS)
    assert outputs["image"] == [-1, -1, -1, 3]
    assert outputs["difficulty"] == [-1, ROWS, COLUMNS]
    assert (list(model.versions), model.platform) == (["1"], "patchforge")


async def test_pictures_and_what_they_saved(inference: Stub, worker: ScriptedWorker) -> None:
    asked = request(text("prompt", "apple"), number("n", 2, "INT32"), number("seed", 7), id="mine")
    asked.inputs[1].contents.CopyFrom(pb.InferTensorContents(int_contents=[2]))
    reply = await inference.ModelInfer(asked)
    assert (reply.model_name, reply.model_version, reply.id) == ("tiny-text", "1", "mine")
    assert [output.name for output in reply.outputs] == list(OUTPUTS)
    pairs = zip(reply.outputs, reply.raw_output_contents, strict=True)
    raw = {output.name: (list(output.shape), content) for output, content in pairs}
    assert raw["image"] == ([2, 1, 1, 3], bytes([7, 7, 7, 8, 8, 8]))
    assert raw["seed"] == ([2], struct.pack("<2q", 7, 8))
    assert raw["savings_ratio"] == ([1], struct.pack("<d", 1 / 3))
    assert raw["patch_evaluations"] == ([2], struct.pack("<2q", 32, 32))
    assert raw["difficulty"] == ([2, ROWS, COLUMNS], struct.pack(f"<{2 * PATCHES}f", *[0.25] * 2 * PATCHES))


async def test_every_input_reaches_the_job(inference: Stub, worker: ScriptedWorker) -> None:
    sampler = '{"name": "dual_loop", "quantile": 0.25}'
    asked = request(text("class_label", "CAT"), text("sampler", sampler), model="tiny-class", outputs=("seed",))
    asked.inputs.append(Input(name="steps", datatype="UINT8", shape=[1]))
    asked.inputs[-1].contents.uint_contents.append(5)
    asked.inputs.append(Input(name="guidance", datatype="FP32", shape=[1, 1]))
    asked.inputs[-1].contents.fp32_contents.append(2.5)
    call = asyncio.create_task(_infer(inference, asked))
    job = await worker.queue.get(await worker.next_job())
    assert [output.name for output in (await call).outputs] == ["seed"]
    drawn = job.request
    assert (drawn.class_label, drawn.steps, drawn.guidance, drawn.previews) == ("cat", 5, 2.5, False)
    assert drawn.sampler is not None
    assert drawn.sampler.model_dump()["quantile"] == 0.25


async def _infer(inference: Stub, asked: Any) -> Any:
    return await inference.ModelInfer(asked)


async def test_raw_inputs(inference: Stub, worker: ScriptedWorker) -> None:
    prompt = Input(name="prompt", datatype="BYTES", shape=[1])
    seed = Input(name="seed", datatype="INT64", shape=[1])
    raw = [struct.pack("<I", 5) + b"apple", struct.pack("<q", 9)]
    reply = await inference.ModelInfer(request(prompt, seed, raw_input_contents=raw, outputs=("image",)))
    assert reply.raw_output_contents[0] == bytes([9, 9, 9])


APPLE = text("prompt", "apple")
BAD: dict[str, tuple[Any, str]] = {
    "no prompt": (request(), "prompt"),
    "an input unheard of": (request(APPLE, text("mood", "x")), "mood"),
    "an input twice": (request(APPLE, APPLE), "prompt"),
    "a number as a prompt": (request(number("prompt", 1)), "prompt"),
    "a text as a number": (request(APPLE, text("seed", "7")), "seed"),
    "out of range": (request(APPLE, number("n", 11)), "n"),
    "not UTF-8": (request(text("prompt", b"\xff")), "prompt"),
    "empty": (request(Input(name="prompt", datatype="BYTES", shape=[1])), "prompt"),
    "no such sampler": (request(APPLE, text("sampler", "ddim")), "sampler"),
    "half a sampler": (request(APPLE, text("sampler", "{")), ""),
    "an output unheard of": (request(APPLE, outputs=("mask",)), "outputs"),
    "too few raw inputs": (request(APPLE, number("seed", 1), raw_input_contents=[b""]), "raw_input_contents"),
    "FP16 in contents": (request(APPLE, Input(name="guidance", datatype="FP16", shape=[1])), "guidance"),
    "a parameter out of range": (request(APPLE, parameters={"n": pb.InferParameter(int64_param=11)}), "n"),
    "a parameter of another kind": (request(APPLE, parameters={"n": pb.InferParameter(bool_param=True)}), "n"),
    "a name of odd letters": (request(APPLE, Input(name="ü\n", datatype="FP16", shape=[1])), "\\xfc\\n"),
    "an endless name": (request(APPLE, text("x" * 20_000, "x")), "x" * 64 + "..."),
    "an endless key": (
        request(APPLE, text("sampler", '{"name": "euler", "%s": 1}' % ("x" * 999))),
        f"sampler.{'x' * 56}...",
    ),
    "no shape": (request(Input(name="prompt", datatype="BYTES", shape=[-1, -1], contents=APPLE.contents)), "prompt"),
    "a crowd of inputs": (request(*[APPLE] * 10_000), "inputs"),
    "a crowd of outputs": (request(APPLE, outputs=("image",) * 10_000), "outputs"),
    "a crowd of elements": (
        request(Input(name="prompt", datatype="BYTES", shape=[1]), raw_input_contents=[bytes(4 << 20)]),
        "prompt",
    ),
    "a picture that is none": (request(APPLE, text("sampler", "euler"), text("image", "x")), "sampler"),
}


@pytest.mark.parametrize("what", BAD)
async def test_bad_inputs_are_refused_by_name(inference: Stub, worker: ScriptedWorker, what: str) -> None:
    asked, field = BAD[what]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.ModelInfer(asked)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (caught.value.details() or "").startswith(f"{field}:" if field else "the body")
    assert dict(caught.value.trailing_metadata() or ()).get("error-field", "") == field


async def test_models_that_are_not_there(inference: Stub, worker: ScriptedWorker) -> None:
    for asked in (request(APPLE, model="other"), request(APPLE, model_version="2")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference.ModelInfer(asked)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_a_job_that_fails(inference: Stub, worker: ScriptedWorker) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="too big") as caught:
        await inference.ModelInfer(request(text("prompt", "fail")))
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_job_cancelled_by_someone_else(inference: Stub, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()
    waiting = asyncio.create_task(_result(inference.ModelInfer(request(APPLE))))
    await queue.cancel(await worker.next_job())
    with pytest.raises(grpc.aio.AioRpcError, match="cancelled") as caught:
        await waiting
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    assert dict(caught.value.trailing_metadata() or ())["error-code"] == "job_cancelled"


async def test_hanging_up_cancels_the_job(inference: Stub, worker: ScriptedWorker, queue: JobQueue) -> None:
    worker.curtain.clear()
    call = inference.ModelInfer(request(APPLE))
    waiting = asyncio.create_task(_result(call))
    job_id = await worker.next_job()
    call.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert await ended(queue, job_id) == "cancelled"


async def _result(call: Any) -> Any:
    return await call


async def test_parameters_that_nobody_knows_are_passed_over(inference: Stub, worker: ScriptedWorker) -> None:
    """KServe's client sends the size of each input, which only REST needs."""
    asked = request(text("prompt", "apple"), outputs=("seed",))
    for holder in (asked, asked.inputs[0], asked.outputs[0]):
        holder.parameters["binary_data_size"].int64_param = 9
        holder.parameters["priority"].uint64_param = 1
    asked.parameters["seed"].int64_param = 5
    asked.parameters["n"].double_param = 2
    reply = await inference.ModelInfer(asked)
    assert reply.raw_output_contents[0] == struct.pack("<2q", 5, 6)


async def test_tritons_extensions(inference: Stub, worker: ScriptedWorker) -> None:
    await inference.ModelInfer(request(APPLE))
    config = (await inference.ModelConfig(pb.ModelConfigRequest(name="tiny-class"))).config
    assert {each.name: (each.data_type, each.optional) for each in config.input}["class_label"] == (
        pb.TYPE_STRING,
        False,
    )
    assert [each.name for each in config.output] == list(OUTPUTS)
    stats = (await inference.ModelStatistics(pb.ModelStatisticsRequest())).model_stats
    assert [(each.name, each.execution_count) for each in stats] == [("tiny-class", 0), ("tiny-text", 1)]
    [one] = (await inference.ModelStatistics(pb.ModelStatisticsRequest(name="tiny-text"))).model_stats
    assert one.inference_stats.success.count == 1
    index = (await inference.RepositoryIndex(pb.RepositoryIndexRequest())).models
    assert [(each.name, each.state) for each in index] == [("tiny-class", "READY"), ("tiny-text", "READY")]
