"""Any tensors over the Open Inference Protocol become a valid request, or an error that names the input."""

from __future__ import annotations

import asyncio
import json
import struct
from types import SimpleNamespace
from typing import Any

from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException
from starlette.requests import Request

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.inference.protocol import FILES, INPUTS, OUTPUTS, Wish, build_generation
from patchforge.service.gateway.inference.rest import JSON_LENGTH, infer_body
from patchforge.service.gateway.inference.rpc import CONTENTS, read_request
from patchforge.service.gateway.inference.tensors import BYTES, CODES
from patchforge.service.messages.schemas import GenerationRequest
from patchforge.service.pb.inference import grpc_inference_service_pb2 as pb
from patchforge.service.settings import Settings
from tests.faults.fuzzing import ANYTHING, ODD_TEXT, amounts, as_json, damaged, fuzz, little_memory
from tests.faults.odd_requests import INT32, INT64, NONE, SAMPLER, SIZE, SOUND, SUBJECT, TEXT, Fields, some_of, united
from tests.faults.test_fuzz_requests import sound, well_told
from tests.service.gateway.harness import CARDS

Body = tuple[bytes, dict[str, str]]
"""A request body, and its headers."""

CARD = CARDS[0]
VALUES: Fields = {
    "prompt": SUBJECT["prompt"],
    "sampler": SAMPLER["sampler"],
    **{name: SOUND[name] for name in ("n", "seed", "steps")},
    "guidance": st.floats(0, 30, width=32),
    **SIZE,
    "strength": st.floats(0.015625, 1, width=32),
    "image": st.just("iVBORw=="),
    "mask": st.just("iVBORw=="),
}
"""Values of each input as in a native request. Numbers fit into FP32."""
SOUND_FIELDS = united(
    some_of(
        {name: VALUES[name] for name in ("sampler", "n", "seed", "steps", "guidance")}, {"prompt": VALUES["prompt"]}
    ),
    NONE | some_of({}, SIZE),
    NONE | some_of({name: VALUES[name] for name in ("mask", "strength")}, {"image": VALUES["image"]}),
)


def element(name: str, value: Any) -> Any:
    """The single element of a tensor with the same meaning: a number, or bytes."""
    if INPUTS[name] != BYTES:
        return value
    if name in FILES:
        return b"\x89PNG"
    return (json.dumps(value) if isinstance(value, dict) else value).encode()


def raw(name: str, value: Any) -> bytes:
    """The tensor's bytes."""
    one = element(name, value)
    return struct.pack("<I", len(one)) + one if isinstance(one, bytes) else struct.pack(f"<{CODES[INPUTS[name]]}", one)


def head(name: str, **how: Any) -> dict[str, Any]:
    return {"name": name, "datatype": INPUTS[name], "shape": [1], **how}


def as_lists(fields: dict[str, Any]) -> Body:
    """Everything as JSON."""
    elements = {name: element(name, value) for name, value in fields.items()}
    elements |= {name: fields[name] for name in fields.keys() & {*FILES}}  # JSON has no bytes: they stay base64
    listed = {name: one.decode() if isinstance(one, bytes) else one for name, one in elements.items()}
    body = as_json({"inputs": [head(name, data=[one]) for name, one in listed.items()]})
    return body, {"content-type": "application/json"}


def as_bytes(fields: dict[str, Any]) -> Body:
    """All tensors as bytes after the JSON."""
    tensors = {name: raw(name, value) for name, value in fields.items()}
    inputs = [head(name, parameters={"binary_data_size": len(tensor)}) for name, tensor in tensors.items()]
    return with_tail({"inputs": inputs}, b"".join(tensors.values()))


def with_tail(said: Any, tail: bytes) -> Body:
    told = as_json(said)
    return told + tail, {"content-type": "application/octet-stream", JSON_LENGTH.lower(): str(len(told))}


def as_contents(fields: dict[str, Any]) -> pb.ModelInferRequest:
    """Typed lists in a gRPC message."""
    inputs = []
    for name, value in fields.items():
        contents = pb.InferTensorContents(**{CONTENTS[INPUTS[name]]: [element(name, value)]})
        inputs.append(pb.ModelInferRequest.InferInputTensor(**head(name), contents=contents))
    return pb.ModelInferRequest(inputs=inputs)


def as_raw(fields: dict[str, Any]) -> pb.ModelInferRequest:
    """Bytes in a gRPC message."""
    inputs = [pb.ModelInferRequest.InferInputTensor(**head(name)) for name in fields]
    return pb.ModelInferRequest(inputs=inputs, raw_input_contents=[raw(*each) for each in fields.items()])


def posted(body: Body) -> Wish:
    """Reads what the gateway takes in over REST."""
    content, headers = body

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    settings = Settings()
    app = SimpleNamespace(state=SimpleNamespace(settings=settings))
    told = [(name.encode(), value.encode("utf-8", "surrogatepass")) for name, value in headers.items()]
    scope = {"type": "http", "app": app, "headers": told, "state": {"body_limit": settings.max_upload_bytes}}
    _, wish = asyncio.run(infer_body(Request(scope, receive)))
    assert set(wish.outputs) <= set(OUTPUTS)
    return wish


@amounts
def test_a_request_is_the_same_however_its_tensors_travel(cases: int) -> None:
    @fuzz(cases)
    @given(SOUND_FIELDS)
    def holds(fields: dict[str, Any]) -> None:
        meant = GenerationRequest.model_validate(fields | {"model": CARD.name, "previews": False})
        for way in (as_lists, as_bytes):
            assert build_generation(CARD, posted(way(fields))) == meant
        for message in (as_contents(fields), as_raw(fields)):
            assert build_generation(CARD, read_request(message)) == meant

    holds()


NAMES = st.sampled_from(sorted(INPUTS))
TYPES = st.sampled_from([*CODES, BYTES]) | ODD_TEXT
SIZES = st.sampled_from([0, 1, 8, 9, 2**31, -1, 10**30])
TENSORS = some_of(
    {"data": st.lists(ANYTHING, max_size=3) | ANYTHING, "parameters": some_of({"binary_data_size": SIZES | ANYTHING})},
    {"name": NAMES | ODD_TEXT, "datatype": TYPES, "shape": st.just([1]) | st.lists(SIZES, max_size=9) | ANYTHING},
)
OUTPUT = st.sampled_from([*OUTPUTS])
NAMED = some_of({"parameters": some_of({"binary_data": st.booleans() | ANYTHING})}, {"name": OUTPUT})
SAID = some_of(
    {
        "id": ODD_TEXT,
        "outputs": st.lists(NAMED, max_size=8) | ANYTHING,
        "parameters": some_of({"binary_data_output": st.booleans() | ANYTHING}) | ANYTHING,
    },
    {"inputs": st.lists(TENSORS, max_size=4) | ANYTHING},
)


@st.composite
def odd_bodies(draw: st.DrawFn) -> Body:
    """A valid body with one more tensor, or damaged, or with a wrong length; or a random body."""
    fields = draw(SOUND_FIELDS)
    content, headers = draw(st.sampled_from([as_lists, as_bytes]))(fields)
    match draw(st.sampled_from(["damaged", "another", "length", "anything"])):
        case "damaged":
            content = draw(damaged(content))
        case "another":
            said = {"inputs": [head(name, data=[value]) for name, value in fields.items()] + [draw(TENSORS)]}
            content, headers = with_tail(said, draw(st.binary(max_size=20)))
        case "length":
            headers = headers | {JSON_LENGTH.lower(): draw(st.integers(-1, len(content) + 1).map(str) | ODD_TEXT)}
        case _:
            content, headers = with_tail(draw(SAID), draw(st.binary(max_size=40)))
    return content, headers


@amounts
def test_bodies(cases: int) -> None:
    accepted: list[GenerationRequest] = []
    statuses = set[int]()

    @fuzz(cases)
    @given(odd_bodies(), st.sampled_from(CARDS))
    @little_memory(64)
    def holds(body: Body, card: Any) -> None:
        try:
            generation = build_generation(card, posted(body))
        except InvalidRequest as error:
            well_told(error)
        except HTTPException as error:
            statuses.add(error.status_code)
        else:
            sound(generation)
            accepted.append(generation)

    holds()
    assert not statuses, "the type and the encoding are as they should be"
    assert len(accepted) > cases / 50


CONTENT_LISTS: Fields = {
    "bool_contents": st.lists(st.booleans(), max_size=3),
    "int_contents": st.lists(INT32, max_size=3),
    "int64_contents": st.lists(INT64, max_size=3),
    "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=3),
    "uint64_contents": st.lists(st.integers(0, 2**64 - 1), max_size=3),
    "fp32_contents": st.lists(st.floats(width=32), max_size=3),
    "fp64_contents": st.lists(st.floats(), max_size=3),
    "bytes_contents": st.lists(st.binary(max_size=20), max_size=3),
}
MESSAGE_TENSORS = st.builds(
    pb.ModelInferRequest.InferInputTensor,
    name=NAMES | TEXT,
    datatype=st.sampled_from([*CODES, BYTES]) | TEXT,
    shape=st.just([1]) | st.lists(INT64, max_size=9),
    contents=some_of(CONTENT_LISTS).map(lambda lists: pb.InferTensorContents(**lists)),
)
OUTPUT_TENSORS = st.builds(pb.ModelInferRequest.InferRequestedOutputTensor, name=OUTPUT | TEXT)


@st.composite
def odd_messages(draw: st.DrawFn) -> pb.ModelInferRequest | None:
    """A valid message with one more tensor, output or byte, or damaged; None if it cannot be parsed any more."""
    message = draw(st.sampled_from([as_contents, as_raw]))(draw(SOUND_FIELDS))
    if draw(st.booleans()):
        message.inputs.append(draw(MESSAGE_TENSORS))
    if draw(st.booleans()):
        message.outputs.append(draw(OUTPUT_TENSORS))
    if message.raw_input_contents or draw(st.integers(0, 9)) == 0:
        message.raw_input_contents.extend(draw(st.lists(st.binary(max_size=20), max_size=2)))
    if draw(st.integers(0, 2)):
        return message
    try:
        return pb.ModelInferRequest.FromString(draw(damaged(message.SerializeToString())))
    except DecodeError:
        return None


@amounts
def test_messages(cases: int) -> None:
    accepted: list[GenerationRequest] = []

    @fuzz(cases)
    @given(odd_messages(), st.sampled_from(CARDS))
    @little_memory(64)
    def holds(message: pb.ModelInferRequest | None, card: Any) -> None:
        if message is None:
            return
        try:
            wish = read_request(message)
            generation = build_generation(card, wish)
        except InvalidRequest as error:
            well_told(error)
        else:
            assert set(wish.outputs) <= set(OUTPUTS)
            sound(generation)
            accepted.append(generation)

    holds()
    assert len(accepted) > cases / 50
