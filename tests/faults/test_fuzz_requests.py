"""Any request becomes a valid message, or an InvalidRequest that names a field."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from patchforge.service.errors import InvalidEventId, InvalidRequest
from patchforge.service.gateway.defaults import check_fits_model, fill_defaults
from patchforge.service.gateway.openai.requests import EditRequest, ImagesRequest, OpenAIRequest
from patchforge.service.gateway.rest import as_sse
from patchforge.service.gateway.rpc.convert import event_to_proto, generation_from_proto, generation_to_proto
from patchforge.service.gateway.validation import parse_json, validated
from patchforge.service.messages.events import Failed, ImageReady, Started
from patchforge.service.messages.schemas import GenerationRequest, JobError
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import JobQueue
from patchforge.service.queue.records import EVENT
from patchforge.service.settings import Settings
from tests.faults.fuzzing import ODD_TEXT, amounts, as_json, damaged, fuzz, little_memory
from tests.faults.odd_requests import FROM_PICTURE, MESSAGES, NATIVE, NONE, OPENAI, bodies, united
from tests.service.gateway.harness import CARDS
from tests.service.queue.kit import DONE, a_preview


def read(model: type[BaseModel], raw: bytes) -> BaseModel | None:
    """Parses a body as the gateway does. Returns None if it is properly refused."""
    try:
        value = parse_json(raw)
        if not isinstance(value, dict):
            return None
        return validated(model, value)
    except InvalidRequest as error:
        well_told(error)
        return None


def well_told(error: InvalidRequest) -> None:
    assert len(error.message) < 300
    assert error.field is None or (error.field.isprintable() and error.field.isascii())
    assert error.field is None or len(error.field) < 1000
    json.dumps({"detail": error.message, "field": error.field}, ensure_ascii=False).encode()  # fit to be sent


@amounts
def test_bytes_that_may_be_json(cases: int) -> None:
    whole = as_json({"prompt": "a red apple", "n": 2, "sampler": {"name": "dual_loop", "quantile": 0.4}, "seed": 7})

    @fuzz(cases)
    @given(st.binary(max_size=200) | damaged(whole) | damaged(b"[[[[" * 50) | damaged(b'{"n": 1e5, "n": -0}'))
    @little_memory(64)
    def holds(raw: bytes) -> None:
        read(GenerationRequest, raw)
        read(ImagesRequest, raw)

    holds()


@amounts
def test_native_requests(cases: int) -> None:
    """An accepted request is within limits, survives storage, and converts to gRPC and back."""
    accepted: list[GenerationRequest] = []

    @fuzz(cases)
    @given(bodies(NATIVE))
    @little_memory(64)
    def holds(body: dict[str, Any]) -> None:
        request = read(GenerationRequest, as_json(body))
        if isinstance(request, GenerationRequest):
            sound(request)
            accepted.append(request)

    holds()
    assert len(accepted) > cases / 50


def sound(request: GenerationRequest) -> None:
    assert 1 <= request.n <= 10
    assert request.steps is None or 1 <= request.steps <= 200
    assert request.strength is None or 0.01 <= request.strength <= 1, "less would be no step at all"
    assert (request.prompt is None) != (request.class_label is None)
    # Over gRPC, an empty model means none.
    assert through_grpc(request) == request.model_copy(update={"model": request.model or None})
    for card in CARDS:
        try:
            check_fits_model(request, card)
        except InvalidRequest as error:
            well_told(error)
            continue
        filled = fill_defaults(request, card)
        assert GenerationRequest.model_validate_json(filled.model_dump_json()) == filled


def through_grpc(request: GenerationRequest) -> GenerationRequest:
    """Converts there and back. What is told about a job does not repeat its pictures."""
    message = generation_to_proto(request)
    pictures = {name: value for name in ("image", "mask") if (value := getattr(request, name)) is not None}
    for name in pictures:
        setattr(message, name, b"x")
    return generation_from_proto(message).model_copy(update=pictures)


@amounts
@pytest.mark.parametrize("model", [ImagesRequest, EditRequest])
def test_openai_requests(cases: int, model: type[OpenAIRequest]) -> None:
    pictures = FROM_PICTURE if model is EditRequest else NONE
    accepted: list[GenerationRequest] = []

    @fuzz(cases)
    @given(bodies(united(OPENAI, pictures)), st.sampled_from(CARDS))
    @little_memory(64)
    def holds(body: dict[str, Any], card: Any) -> None:
        request = read(model, as_json(body))
        if isinstance(request, OpenAIRequest):
            try:
                generation = request.generation(card)
            except InvalidRequest as error:
                well_told(error)
            else:
                assert generation.model == card.name
                sound(generation)
                accepted.append(generation)

    holds()
    assert len(accepted) > cases / 50


@amounts
def test_grpc_requests(cases: int) -> None:
    """Random bytes, and messages with every value that a field can hold."""
    whole = generation_to_proto(GenerationRequest(prompt="a red apple", n=2, seed=7, steps=9)).SerializeToString()
    accepted: list[GenerationRequest] = []

    @fuzz(cases)
    @given(MESSAGES | (damaged(whole) | st.binary(max_size=100)).map(message_from))
    @little_memory(64)
    def holds(message: pb.Generation | None) -> None:
        if message is not None:
            try:
                request = generation_from_proto(message)
            except InvalidRequest as error:
                well_told(error)
            else:
                sound(request)
                accepted.append(request)

    holds()
    assert len(accepted) > cases / 50


def message_from(raw: bytes) -> pb.Generation | None:
    try:
        return pb.Generation.FromString(raw)
    except DecodeError:
        return None


@amounts
@pytest.mark.parametrize("lines_of", [lambda frame: re.split("\r\n|\r|\n", frame), str.splitlines], ids=["sse", "py"])
def test_events_on_the_wire(cases: int, lines_of: Callable[[str], list[str]]) -> None:
    """One event is one frame, with any text: for the standard's parser, and for clients that split like Python."""
    text = ODD_TEXT.filter(lambda text: not re.search("[\ud800-\udfff]", text))
    events = st.one_of(
        st.builds(lambda code, message: Failed(error=JobError(code=code, message=message)), text, text),
        st.builds(Started, attempt=st.integers(0, 2**31 - 1), steps=st.integers(0, 2**31 - 1)),
        st.builds(ImageReady, index=st.integers(0, 9)),
        st.builds(a_preview, st.integers(0, 100), size=st.just(12)),
        st.just(DONE),
    )

    @fuzz(cases)
    @given(events)
    def holds(event: Any) -> None:
        frame = as_sse("1-2", event).encode().decode()
        fields = dict(line.split(": ", 1) for line in lines_of(frame) if line)
        assert frame.endswith("\n\n")
        assert fields.keys() == {"id", "event", "data"}
        assert EVENT.validate_json(fields["data"]) == event
        assert event_to_proto("1-2", event).id == "1-2"

    holds()


@amounts
def test_event_ids(cases: int) -> None:
    """Either two numbers that Redis accepts, or a refusal at once."""
    queue = JobQueue.connect("redis://127.0.0.1:1/0", Settings())  # never connects
    ids = st.from_regex(r"[0-9٣²+\-. ]{0,20}(-[0-9]{0,20})?\n?", fullmatch=True) | ODD_TEXT

    @fuzz(cases)
    @given(ids)
    def holds(event_id: str) -> None:
        try:
            queue.watch("0" * 26, event_id)
        except InvalidEventId:
            return
        numbers = event_id.split("-")
        assert len(numbers) <= 2
        assert all(number.isascii() and number.isdigit() and int(number) < 2**64 for number in numbers)

    holds()
