"""The Open Inference Protocol over gRPC: `inference.GRPCInferenceService`."""

from __future__ import annotations

from typing import Any

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.calls import Call
from patchforge.service.gateway.inference import extensions
from patchforge.service.gateway.inference import protocol as inference
from patchforge.service.gateway.inference.protocol import TensorInfo, Wish
from patchforge.service.gateway.inference.tensors import CODES, Input, input_from_list, input_from_raw
from patchforge.service.gateway.jobs import JobService
from patchforge.service.pb.inference import grpc_inference_service_pb2 as pb

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
"""The field of InferTensorContents that holds a datatype's elements. FP16 has none."""


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
        card = await inference.find_model(self.service, request.name, request.version)
        return pb.ModelMetadataResponse(
            name=card.name,
            versions=[inference.MODEL_VERSION],
            platform=inference.SERVER,
            inputs=map(_to_metadata, inference.describe_inputs(card)),
            outputs=map(_to_metadata, inference.describe_outputs(card)),
            properties=inference.describe_bundle(card),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelInferResponse:
        card = await inference.find_model(self.service, request.model_name, request.model_version)
        outputs = await inference.infer(self.service, call.tenant, card, read_request(request))
        return pb.ModelInferResponse(
            model_name=card.name,
            model_version=inference.MODEL_VERSION,
            id=request.id,
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(name=each.name, datatype=each.datatype, shape=each.shape)
                for each in outputs
            ],
            raw_output_contents=[each.raw for each in outputs],
        )

    async def ModelConfig(self, request: pb.ModelConfigRequest, call: Call) -> pb.ModelConfigResponse:
        card = await inference.find_model(self.service, request.name, request.version)
        return pb.ModelConfigResponse(config=pb.ModelConfig(**extensions.configuration(card)))

    async def ModelStatistics(self, request: pb.ModelStatisticsRequest, call: Call) -> pb.ModelStatisticsResponse:
        if request.name:
            cards = [await inference.find_model(self.service, request.name, request.version)]
        else:
            cards = (await self.service.fleet()).cards
        return pb.ModelStatisticsResponse(
            model_stats=[pb.ModelStatistics(**extensions.statistics(self.service, card)) for card in cards]
        )

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, call: Call) -> pb.RepositoryIndexResponse:
        cards = (await self.service.fleet()).cards
        index = [pb.RepositoryIndexResponse.ModelIndex(**extensions.index_entry(card)) for card in cards]
        return pb.RepositoryIndexResponse(models=index)


def read_request(request: pb.ModelInferRequest) -> Wish:
    """Returns what a call asks for.

    Raises:
        InvalidRequest: `field` names what is not valid.
    """
    _check_counts(request)
    names = inference.select_outputs([output.name for output in request.outputs])
    parameters = {}
    for name in inference.INPUTS:
        if name in request.parameters and (kind := request.parameters[name].WhichOneof("parameter_choice")):
            parameters[name] = getattr(request.parameters[name], kind)
    return Wish(_read_inputs(request), names, parameters)


def _read_inputs(request: pb.ModelInferRequest) -> list[Input]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidRequest("must have one entry per input", field="raw_input_contents")
    if raw:
        return [
            input_from_raw(inference.check_input_name(each.name), each.datatype, tuple(each.shape), content)
            for each, content in zip(request.inputs, raw, strict=True)
        ]
    return [_input_from_contents(each) for each in request.inputs]


def _input_from_contents(tensor: Any) -> Input:
    name = inference.check_input_name(tensor.name)
    if tensor.datatype not in CONTENTS and tensor.datatype in CODES:
        raise InvalidRequest(f"must be sent in raw_input_contents: it has datatype {tensor.datatype}", field=name)
    elements = list(getattr(tensor.contents, CONTENTS.get(tensor.datatype, "bytes_contents")))
    return input_from_list(name, tensor.datatype, tuple(tensor.shape), elements)


def _check_counts(request: pb.ModelInferRequest) -> None:
    """Refuses too many tensors before reading any: a message has room for a million."""
    for name, sent, most in (
        ("inputs", request.inputs, len(inference.INPUTS)),
        ("outputs", request.outputs, len(inference.OUTPUTS)),
    ):
        if len(sent) > most:
            raise InvalidRequest(f"must have at most {most} entries", field=name)


def _to_metadata(info: TensorInfo) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=info.name, datatype=info.datatype, shape=info.shape)
