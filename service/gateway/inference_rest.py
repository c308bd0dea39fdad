"""The Open Inference Protocol over HTTP, with its binary tensors, for the clients of KServe and Triton."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from pydantic import Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from service.errors import InvalidRequest
from service.gateway import inference
from service.gateway.answers import BODY, inference_errors, success
from service.gateway.body import whole_body
from service.gateway.dependencies import Service, Tenant
from service.gateway.inference import Meta
from service.gateway.streams import unless_gone
from service.gateway.tensors import Given, Made, from_list, from_raw
from service.gateway.validation import parse_json, validated
from service.messages import Message

router = APIRouter(tags=["open inference"], responses=inference_errors(401, 413, 500, 503))
uploads = APIRouter(tags=["open inference"], responses=inference_errors(401, 413, 500, 503))
"""Calls whose bodies carry pictures."""

HEAD_LENGTH = "Inference-Header-Content-Length"
MAX_LISTED = 1 << 20  # numbers of an output told as JSON; more are for binary data


class TensorParameters(Message):
    """How a tensor travels."""

    binary_data_size: int | None = Field(None, ge=0, description="Bytes of this input after the JSON.")
    binary_data: bool | None = Field(None, description="Whether this output is to follow the JSON as bytes.")


class InputTensor(Message):
    """An input; its elements are in ``data``, or follow the JSON."""

    name: str = Field(max_length=100)
    datatype: str = Field(max_length=20)
    shape: list[Annotated[int, Field(ge=0, le=1 << 31)]] = Field(max_length=8)
    parameters: TensorParameters = TensorParameters()
    data: list[Any] | None = None


class RequestedOutput(Message):
    """An output asked for."""

    name: str = Field(max_length=100)
    parameters: TensorParameters = TensorParameters()


class InferParameters(Message):
    """Of the request as a whole."""

    binary_data_output: bool = Field(False, description="Outputs follow the JSON as bytes unless they say otherwise.")


class InferRequest(Message):
    """What to infer: the inputs are listed at ``GET /v2/models/{name}``."""

    id: str = Field("", max_length=200)
    parameters: InferParameters = InferParameters()
    inputs: list[InputTensor] = Field(max_length=len(inference.INPUTS))
    outputs: list[RequestedOutput] = Field([], max_length=len(inference.OUTPUTS))


async def infer_body(request: Request) -> tuple[InferRequest, list[Given]]:
    """The request and its inputs, whichever of the two ways they came in."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    told = request.headers.get(HEAD_LENGTH)
    if media_type not in ("application/json", "application/octet-stream", *(("",) if told else ())):
        raise HTTPException(415, "send the body as application/json, or as application/octet-stream")
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "send the body as it is, not compressed")
    body = await whole_body(request)
    if told is not None and not (told.isascii() and told.isdigit() and len(told) < 10 and int(told) <= len(body)):
        raise InvalidRequest("must be the length of the JSON", field=HEAD_LENGTH)
    head = len(body) if told is None else int(told)
    value = parse_json(body[:head])
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    asked = validated(InferRequest, value)
    return asked, _inputs(asked.inputs, body[head:])


def _inputs(tensors: list[InputTensor], rest: bytes) -> list[Given]:
    found = []
    for tensor in tensors:
        name, shape, size = inference.known(tensor.name), tuple(tensor.shape), tensor.parameters.binary_data_size
        if (size is None) == (tensor.data is None):
            raise InvalidRequest("must come either as data or with a binary_data_size", field=name)
        if size is None:
            found.append(from_list(name, tensor.datatype, shape, tensor.data or []))
            continue
        if size > len(rest):
            raise InvalidRequest("has a binary_data_size of more than was sent", field=name)
        found.append(from_raw(name, tensor.datatype, shape, rest[:size]))
        rest = rest[size:]
    if rest:
        raise InvalidRequest("more binary data were sent than the inputs account for", field="inputs")
    return found


@router.get("/v2")
async def server_metadata() -> dict[str, Any]:
    """Who this is, and which extensions of the protocol it speaks."""
    return {"name": inference.SERVER, "version": inference.VERSION, "extensions": list(inference.EXTENSIONS)}


@router.get("/v2/health/live")
async def server_live() -> dict[str, bool]:
    """The process is alive."""
    return {"live": True}


@router.get("/v2/health/ready")
async def server_ready(service: Service) -> dict[str, bool]:
    """Pictures can be asked for."""
    await service.ready()
    return {"ready": True}


@router.get("/v2/models/{name}/versions/{version}", responses=inference_errors(404))
@router.get("/v2/models/{name}", responses=inference_errors(404))
async def model_metadata(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """What a model takes and makes."""
    card = await inference.find(service, name, version)
    return {
        "name": card.name,
        "versions": [inference.MODEL_VERSION],
        "platform": inference.SERVER,
        "inputs": list(map(_shown, inference.inputs_of(card))),
        "outputs": list(map(_shown, inference.outputs_of(card))),
    }


@router.get("/v2/models/{name}/versions/{version}/ready", responses=inference_errors(404))
@router.get("/v2/models/{name}/ready", responses=inference_errors(404))
async def model_ready(service: Service, name: str, version: str = "") -> dict[str, Any]:
    """A model can be asked for pictures."""
    await service.ready()
    return {"name": (await inference.find(service, name, version)).name, "ready": True}


BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": {"$ref": f"#/components/schemas/{InferRequest.__name__}"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
INFERRED = success("application/json", "The outputs; as bytes after the JSON, if asked for.", {"type": "object"})
INFERRED[200]["content"]["application/octet-stream"] = {"schema": {"type": "string", "format": "binary"}}
ANSWERS = INFERRED | inference_errors(400, 404, 409, 429, *BODY)


@uploads.post("/v2/models/{name}/versions/{version}/infer", openapi_extra=BODIES, responses=ANSWERS)
@uploads.post("/v2/models/{name}/infer", openapi_extra=BODIES, responses=ANSWERS)
async def model_infer(
    request: Request,
    service: Service,
    tenant: Tenant,
    name: str,
    body: Annotated[tuple[InferRequest, list[Given]], Depends(infer_body)],
    version: str = "",
) -> Response:
    """Draw pictures. Hanging up cancels the job."""
    asked, inputs = body
    card = await inference.find(service, name, version)
    names = inference.wanted([output.name for output in asked.outputs])
    made = await unless_gone(request, inference.draw(service, tenant, card, inputs, names))
    return _answer(asked, card.name, made)


def _answer(asked: InferRequest, model: str, made: list[Made]) -> Response:
    """JSON, and after it the bytes of those outputs that are to come so."""
    said = {output.name: output.parameters.binary_data for output in asked.outputs}
    outputs, tail = [], []
    for tensor in made:
        shown = _shown(Meta(tensor.name, tensor.datatype, tensor.shape))
        binary = said.get(tensor.name)
        if asked.parameters.binary_data_output if binary is None else binary:
            tail.append(tensor.raw)
            outputs.append(shown | {"parameters": {"binary_data_size": len(tensor.raw)}})
        elif len(tensor.raw) > MAX_LISTED:
            raise InvalidRequest(f"{tensor.name} is too large for JSON: ask for it as binary_data", field="outputs")
        else:
            outputs.append(shown | {"data": tensor.elements})
    answer = {"model_name": model, "model_version": inference.MODEL_VERSION, "outputs": outputs}
    if asked.id:
        answer["id"] = asked.id
    if not tail:
        return JSONResponse(answer)
    head = json.dumps(answer).encode()
    headers = {HEAD_LENGTH: str(len(head))}
    return Response(b"".join((head, *tail)), headers=headers, media_type="application/octet-stream")


def _shown(meta: Meta) -> dict[str, Any]:
    return {"name": meta.name, "datatype": meta.datatype, "shape": list(meta.shape)}
