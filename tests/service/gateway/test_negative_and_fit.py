"""Negative prompts and sizes of another shape, over every protocol: the same request reaches the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest

from patchforge.service.gateway.defaults import fill_defaults
from patchforge.service.messages.fit import Fit
from patchforge.service.messages.schemas import GenerationRequest
from patchforge.service.pb.inference import grpc_inference_service_pb2 as inference_pb
from patchforge.service.pb.inference.grpc_inference_service_pb2_grpc import GRPCInferenceServiceStub
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.pb.patchforge.v1 import image_service_pb2_grpc as pb_grpc
from tests.service.gateway.harness import CARDS, ScriptedWorker

WISH = {"model": "tiny-text", "prompt": "apple", "negative_prompt": "blurry", "fit": "cover"}
Ask = Callable[[httpx.AsyncClient, grpc.aio.Channel], Awaitable[Any]]


def tensor(name: str, value: str) -> dict[str, Any]:
    return {"name": name, "datatype": "BYTES", "shape": [1], "data": [value]}


async def rest(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    (await http.post("/v1/jobs", json=WISH | {"width": 64, "height": 64})).raise_for_status()


async def openai(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    (await http.post("/v1/images/generations", json=WISH | {"size": "64x64"})).raise_for_status()


async def inference(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    inputs = [tensor(name, value) for name, value in WISH.items() if name != "model"]
    body = {"inputs": inputs, "parameters": {"width": 64, "height": 64}}
    reply = (await http.post("/v2/models/tiny-text/infer", json=body)).raise_for_status().json()
    assert {each["name"]: each["data"] for each in reply["outputs"]}["prompt_truncated"] == [False]


async def inference_parameters(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    asked = inference_pb.ModelInferRequest(model_name="tiny-text")
    prompt = asked.inputs.add(name="prompt", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(b"apple")
    for name in ("negative_prompt", "fit"):
        asked.parameters[name].string_param = WISH[name]
    for name in ("width", "height"):
        asked.parameters[name].int64_param = 64
    await GRPCInferenceServiceStub(channel).ModelInfer(asked)


async def rpc(http: httpx.AsyncClient, channel: grpc.aio.Channel) -> None:
    fields = {"model": "tiny-text", "prompt": "apple", "negative_prompt": "blurry", "width": 64, "height": 64}
    asked = pb.SubmitJobRequest(generation=pb.Generation(**fields, fit=pb.FIT_COVER))
    shown = (await pb_grpc.ImageServiceStub(channel).SubmitJob(asked)).job.generation
    assert (shown.negative_prompt, shown.fit) == ("blurry", pb.FIT_COVER)


@pytest.mark.parametrize("ask", [rest, openai, inference, inference_parameters, rpc])
async def test_they_reach_the_worker(
    http: httpx.AsyncClient, channel: grpc.aio.Channel, worker: ScriptedWorker, ask: Ask
) -> None:
    asking = asyncio.create_task(ask(http, channel))  # type: ignore[arg-type]
    request = (await worker.queue.get(await worker.next_job())).request
    await asking
    assert (request.negative_prompt, request.fit, request.width) == ("blurry", Fit.COVER, 64)


async def test_what_cannot_have_one_refuses_it(http: httpx.AsyncClient, worker: ScriptedWorker) -> None:
    by_label, by_prompt = {"class_label": "cat"}, {"prompt": "cat", "model": "tiny-class"}
    for path, body, field in (
        ("/v1/jobs", by_label, "negative_prompt"),
        ("/v1/jobs", by_prompt, "prompt"),
        ("/v1/images/generations", by_label, "negative_prompt"),
        ("/v1/images/generations", by_prompt, "negative_prompt"),
    ):
        reply = await http.post(path, json=body | {"negative_prompt": "dog"})
        told = reply.json()
        assert (told["error"]["param"] if "error" in told else told["field"]) == field
    reply = await http.post("/v1/jobs", json={"prompt": "cat", "fit": "squeeze"})
    assert reply.json()["field"] == "fit"
    metadata = (await http.get("/v2/models/tiny-class")).json()
    assert "negative_prompt" not in [each["name"] for each in metadata["inputs"]]


def test_the_job_says_what_becomes_of_another_shape() -> None:
    card = CARDS[0]  # 48 by 32
    for size, given, decided in (
        (None, None, None),
        ((96, 64), None, None),
        ((64, 64), None, Fit.CONTAIN),
        ((64, 64), "stretch", Fit.STRETCH),
        ((96, 64), "cover", Fit.COVER),
    ):
        width, height = size or (None, None)
        request = GenerationRequest.model_validate({"prompt": "x", "width": width, "height": height, "fit": given})
        assert fill_defaults(request, card).fit is decided
