"""The Open Inference Protocol over HTTP, binary tensors included, for clients of KServe and Triton."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.answers import BODY, inference_errors, success
from patchforge.service.gateway.body import read_body
from patchforge.service.gateway.dependencies import Service, Tenant
from patchforge.service.gateway.inference import extensions
from patchforge.service.gateway.inference import protocol as inference
from patchforge.service.gateway.inference.protocol import TensorInfo, Wish
from patchforge.service.gateway.inference.tensors import Input, Output, input_from_list, input_from_raw
from patchforge.service.gateway.streams import cancel_on_disconnect
from patchforge.service.gateway.validation import parse_json, validated
from patchforge.service.messages.base import LooseRequest

router = APIRouter(tags=["open inference"], responses=inference_errors(401, 413, 500, 501, 503))
uploads = APIRouter(tags=["open inference"], responses=inference_errors(401, 413, 500, 501, 503))
"""Operations whose request bodies may carry pictures: they may be larger."""

JSON_LENGTH = "Inference-Header-Content-Length"
MAX_JSON_BYTES = 1 << 20  # of one output sent as JSON numbers, counted before encoding


class TensorParameters(LooseRequest):
    """How a tensor is sent."""

    binary_data_size: int | None = Field(None, ge=0, description="Bytes of this input; they follow the JSON.")
    binary_data: bool | None = Field(None, description="Send this output as bytes after the JSON.")


class InputTensor(LooseRequest):
    """An input. Its elements are in `data`, or follow the JSON as bytes."""

    name: str = Field(max_length=100)
    datatype: str = Field(max_length=20)
    shape: list[Annotated[int, Field(ge=0, le=1 << 31)]] = Field(max_length=8)
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class RequestedOutput(LooseRequest):
    """A requested output."""

    name: str = Field(max_length=100)
    parameters: TensorParameters = TensorParameters()


class InferParameters(LooseRequest):
    """Parameters of the whole request: also any input that is no file, by its name. Others are passed over."""

    model_config = ConfigDict(extra="allow")

    binary_data_output: bool = Field(
        False, description="Send outputs as bytes after the JSON; `binary_data` of an output overrides it."
    )


class InferRequest(LooseRequest):
    """An inference request. `GET /v2/models/{name}` lists the inputs and outputs."""

    id: str = Field("", max_length=200)
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(max_length=len(inference.INPUTS))
    outputs: list[RequestedOutput] = Field([], max_length=len(inference.OUTPUTS))


async def infer_body(request: Request) -> tuple[InferRequest, Wish]:
    """Reads the request and what it asks for. Its inputs are in the JSON or follow it as bytes."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    length = request.headers.get(JSON_LENGTH)
    if media_type not in ("application/json", "application/octet-stream", *(("",) if length else ())):
        raise HTTPException(415, "send the body as application/json or application/octet-stream")
    body = await read_body(request)
    if length is not None and not _is_length(length, len(body)):
        raise InvalidRequest("must be the length of the JSON part in bytes", field=JSON_LENGTH)
    end = len(body) if length is None else int(length)
    value = parse_json(body[:end])
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    infer = validated(InferRequest, value)
    inputs = _read_inputs(infer.inputs, body[end:])
    names = inference.select_outputs([output.name for output in infer.outputs])
    return infer, Wish(inputs, names, infer.parameters.model_extra or {})


def _is_length(text: str, most: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10 and int(text) <= most


def _read_inputs(tensors: list[InputTensor], binary: bytes) -> list[Input]:
    """Reads the inputs; `binary` is what follows the JSON."""
    found = []
    for tensor in tensors:
        name, shape = inference.check_input_name(tensor.name), tuple(tensor.shape)
        size = tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise InvalidRequest("requires either data or binary_data_size", field=name)
        if size is None:
            found.append(input_from_list(name, tensor.datatype, shape, tensor.data or []))
            continue
        if size > len(binary):
            raise InvalidRequest("has a binary_data_size larger than the data sent", field=name)
        found.append(input_from_raw(name, tensor.datatype, shape, binary[:size]))
        binary = binary[size:]
    if binary:
        raise InvalidRequest("the body has more binary data than the inputs declare", field="inputs")
    return found


@router.get("/v2")
async def server_metadata() -> dict[str, Any]:
    """The server's name and version, and the protocol extensions it supports."""
    return {"name": inference.SERVER, "version": inference.VERSION, "extensions": list(inference.EXTENSIONS)}


@router.get("/v2/health/live")
async def server_live() -> dict[str, bool]:
    """Liveness: the process runs."""
    return {"live": True}


@router.get("/v2/health/ready")
async def server_ready(service: Service) -> dict[str, bool]:
    """Readiness: the queue server answers and at least one worker serves a model."""
    await service.ready()
    return {"ready": True}


@router.get("/v2/models/stats")
async def all_statistics(service: Service) -> dict[str, Any]:
    """Statistics of the models served now, as far as this gateway's inference calls go."""
    return {"model_stats": [extensions.statistics(service, card) for card in (await service.fleet()).cards]}


@router.get("/v2/models/{name}/versions/{version}/stats", responses=inference_errors(404))
@router.get("/v2/models/{name}/stats", responses=inference_errors(404))
async def model_statistics(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """Statistics of one model."""
    return {"model_stats": [extensions.statistics(service, await inference.find_model(service, name, version))]}


@router.get("/v2/models/{name}/versions/{version}/config", responses=inference_errors(404))
@router.get("/v2/models/{name}/config", responses=inference_errors(404))
async def model_config(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """A model's inputs and outputs, in the form of Triton's model configuration."""
    return extensions.configuration(await inference.find_model(service, name, version))


@router.post("/v2/repository/index")
async def repository_index(service: Service) -> list[dict[str, str]]:
    """The models served now, in the form of Triton's model repository. The body does not matter."""
    return [extensions.index_entry(card) for card in (await service.fleet()).cards]


@router.get("/v2/models/{name}/versions/{version}", responses=inference_errors(404))
@router.get("/v2/models/{name}", responses=inference_errors(404))
async def model_metadata(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """A model's inputs and outputs."""
    card = await inference.find_model(service, name, version)
    return {
        "name": card.name,
        "versions": [inference.MODEL_VERSION],
        "platform": inference.SERVER,
        "inputs": list(map(_to_json, inference.describe_inputs(card))),
        "outputs": list(map(_to_json, inference.describe_outputs(card))),
        "properties": inference.describe_bundle(card),
    }


@router.get("/v2/models/{name}/versions/{version}/ready", responses=inference_errors(404))
@router.get("/v2/models/{name}/ready", responses=inference_errors(404))
async def model_ready(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """Readiness of one model."""
    await service.ready()
    return {"name": (await inference.find_model(service, name, version)).name, "ready": True}


BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{InferRequest.__name__}"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
INFERRED = success(
    "application/json", "The outputs: in the JSON, or as bytes after it if requested.", {"type": "object"}
)
INFERRED[200]["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
ANSWERS = INFERRED | inference_errors(400, 404, 409, 429, *BODY)


@uploads.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=BODIES, responses=ANSWERS)
@uploads.post("/v2/models/{name}/infer", openapi_extra=BODIES, responses=ANSWERS)
async def model_infer(
    request: Request,
    service: Service,
    tenant: Tenant,
    name: str,
    body: Annotated[tuple[InferRequest, Wish], Depends(infer_body)],
    version: str = "",
) -> Response:
    """Generate pictures. Disconnecting cancels the job."""
    infer, wish = body
    card = await inference.find_model(service, name, version)
    outputs = await cancel_on_disconnect(request, inference.infer(service, tenant, card, wish))
    return _respond(infer, card.name, outputs)


def _respond(infer: InferRequest, model: str, outputs: list[Output]) -> Response:
    """JSON, followed by the bytes of the outputs that were requested as binary data."""
    requested = {output.name: output.parameters.binary_data for output in infer.outputs}
    described, binary = [], []
    for output in outputs:
        info = _to_json(TensorInfo(output.name, output.datatype, output.shape))
        as_binary = requested.get(output.name)
        if infer.parameters.binary_data_output if as_binary is None else as_binary:
            binary.append(output.raw)
            described.append(info | {"parameters": {"binary_data_size": len(output.raw)}})
        elif len(output.raw) > MAX_JSON_BYTES:
            raise InvalidRequest(f"{output.name} is too large for JSON: request it with binary_data", field="outputs")
        else:
            described.append(info | {"data": output.elements})
    content = {"model_name": model, "model_version": inference.MODEL_VERSION, "outputs": described}
    if infer.id:
        content["id"] = infer.id
    if not binary:
        return JSONResponse(content)
    head = json.dumps(content).encode()
    headers = {JSON_LENGTH: str(len(head))}
    return Response(b"".join((head, *binary)), headers=headers, media_type="application/octet-stream")


def _to_json(info: TensorInfo) -> dict[str, Any]:
    return {"name": info.name, "datatype": info.datatype, "shape": list(info.shape)}
