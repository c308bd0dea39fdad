"""The Open Inference Protocol over gRPC: ``inference.GRPCInferenceService``."""

from __future__ import annotations

from typing import Any

from service.errors import InvalidRequest
from service.gateway import inference
from service.gateway.calls import Call
from service.gateway.inference import Meta
from service.gateway.jobs import JobService
from service.gateway.tensors import CODES, Given, from_list, from_raw
from service.pb.inference import grpc_inference_service_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Which list of InferTensorContents a datatype's elements are in; FP16 has none."""


class InferenceService:
    """One method per RPC."""

    def __init__(self, service: JobService) -> None:
        self.service = service

    async def ServerLive(self, request: pb.ServerLiveRequest, call: Call) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, call: Call) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=await inference.is_ready(self.service))

    async def ModelReady(self, request: pb.ModelReadyRequest, call: Call) -> pb.ModelReadyResponse:
        return pb.ModelReadyResponse(ready=await inference.is_ready(self.service, request.name, request.version))

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, call: Call) -> pb.ServerMetadataResponse:
        return pb.ServerMetadataResponse(
            name=inference.SERVER, version=inference.VERSION, extensions=inference.EXTENSIONS
        )

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, call: Call) -> pb.ModelMetadataResponse:
        card = await inference.find(self.service, request.name, request.version)
        return pb.ModelMetadataResponse(
            name=card.name,
            versions=[inference.MODEL_VERSION],
            platform=inference.SERVER,
            inputs=map(_shown, inference.inputs_of(card)),
            outputs=map(_shown, inference.outputs_of(card)),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        card = await inference.find(self.service, request.model_name, request.model_version)
        inputs, names = asked(request)
        made = await inference.draw(self.service, call.tenant, card, inputs, names)
        outputs = [
            pb.ModelInferResponse.InferOutputTensor(name=each.name, datatype=each.datatype, shape=each.shape)
            for each in made
        ]
        return pb.ModelInferResponse(
            model_name=card.name,
            model_version=inference.MODEL_VERSION,
            id=request.id,
            outputs=outputs,
            raw_output_contents=[each.raw for each in made],
        )


def asked(request: pb.ModelInferRequest) -> tuple[list[Given], list[str]]:
    """The inputs, and the names of the outputs wanted. Raises InvalidRequest."""
    _refuse_crowds(request)
    _refuse_parameters(request)
    names = inference.wanted([output.name for output in request.outputs])
    return _inputs(request), names


def _inputs(request: pb.ModelInferRequest) -> list[Given]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest("must be as many as there are inputs", field="raw_input_contents")
    if raw:
        return [
            from_raw(inference.known(each.name), each.datatype, tuple(each.shape), content)
            for each, content in zip(request.inputs, raw, strict=True)
        ]
    return [_from_contents(each) for each in request.inputs]


def _from_contents(tensor: Any) -> Given:
    name = inference.known(tensor.name)
    if tensor.datatype not in CONTENTS and tensor.datatype in CODES:
        raise InvalidRequest("comes as raw_input_contents only", field=name)
    elements = list(getattr(tensor.contents, CONTENTS.get(tensor.datatype, "bytes_contents")))
    return from_list(name, tensor.datatype, tuple(tensor.shape), elements)


def _refuse_crowds(request: pb.ModelInferRequest) -> None:
    """A message has room for a million tensors: none is looked at if there are more than can be meant."""
    for name, sent, most in (
        ("inputs", request.inputs, len(inference.INPUTS)),
        ("outputs", request.outputs, len(inference.OUTPUTS)),
    ):
        if len(sent) > most:
            raise InvalidRequest(f"must be at most {most}", field=name)


def _refuse_parameters(request: pb.ModelInferRequest) -> None:
    """There are none here, and what would change nothing is refused rather than ignored."""
    holders: tuple[Any, ...] = (request, *request.inputs, *request.outputs)
    for holder in holders:
        if holder.parameters:
            raise InvalidRequest("there are none here: options are inputs", field="parameters")


def _shown(meta: Meta) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=meta.name, datatype=meta.datatype, shape=meta.shape)
