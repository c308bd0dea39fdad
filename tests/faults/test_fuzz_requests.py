"""Whatever a request is made of, it becomes a sound message, or an InvalidRequest that names a field."""

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

from service.errors import InvalidEventId, InvalidRequest
from service.events import Failed, ImageReady, Started
from service.gateway.convert import event_to_proto, generation_from_proto, generation_to_proto
from service.gateway.images_request import ImagesRequest
from service.gateway.jobs import check, fill
from service.gateway.rest import as_sse
from service.gateway.validation import parse_json, validated
from service.pb.patchforge.v1 import image_service_pb2 as pb
from service.queue import JobQueue
from service.queue_records import EVENT
from service.schemas import GenerationRequest, JobError
from service.settings import Settings
from tests.faults.fuzzing import ANYTHING, ODD_NUMBERS, ODD_TEXT, amounts, as_json, damaged, fuzz, little_memory
from tests.service.gateway.harness import CARDS
from tests.service.queue_kit import DONE, a_preview

SOUND: dict[str, Any] = {
    "model": st.sampled_from([card.name for card in CARDS]),
    "prompt": st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=50),
    "class_label": st.sampled_from(["cat", "grinning face"]),
    "n": st.integers(1, 10),
    "seed": st.integers(0, 2**63 - 11),
    "sampler": st.sampled_from(["adaptive", "euler", "heun", {"name": "dual_loop", "quantile": 0.5}, "look_ahead"]),
    "width": st.integers(16, 2048),
    "height": st.integers(16, 2048),
    "strength": st.floats(0.01, 1),
    "image": st.just("iVBORw0KGgo="),
    "mask": st.just("iVBORw0KGgo="),
    "deterministic": st.booleans(),
    "steps": st.integers(1, 200),
    "guidance": st.floats(0, 30),
    "output_format": st.sampled_from(["png", "webp", "jpeg"]),
    "output_compression": st.integers(0, 100),
    "previews": st.booleans(),
    "priority": st.sampled_from(["high", "normal", "low"]),
    "deadline_seconds": st.floats(1e-3, 86400),
}
OPENAI: dict[str, Any] = SOUND | {
    "previews": st.just(False),
    "size": st.sampled_from(["auto", "48x32", "16x16"]),
    "quality": st.sampled_from(["auto", "low", "hd"]),
    "response_format": st.just("b64_json"),
    "stream": st.booleans(),
    "partial_images": st.integers(0, 3),
    "user": st.text(max_size=10),
}
SAMPLERS = st.fixed_dictionaries(
    {"name": st.sampled_from(["adaptive", "dual_loop", "look_ahead", "multistep"]) | ODD_TEXT},
    optional={
        name: ODD_NUMBERS | ANYTHING for name in ("quantile", "inner_steps", "exact", "ratio", "exponent", "tolerance")
    },
)


def bodies(fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Requests of which most fields are sound, and some are anything."""
    mixed = {name: sound | sound | ANYTHING for name, sound in fields.items()}
    mixed["sampler"] = fields["sampler"] | SAMPLERS | ANYTHING
    known = st.fixed_dictionaries({}, optional=mixed)
    return st.one_of(known, known, st.builds(lambda one, two: one | two, known, st.dictionaries(ODD_TEXT, ANYTHING)))


def read(model: type[BaseModel], raw: bytes) -> BaseModel | None:
    """What the gateway makes of a body; None if it is refused as it should be."""
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
    """What is accepted is in bounds, survives storage, and converts to gRPC and back."""

    @fuzz(cases)
    @given(bodies(SOUND))
    @little_memory(64)
    def holds(body: dict[str, Any]) -> None:
        request = read(GenerationRequest, as_json(body))
        if isinstance(request, GenerationRequest):
            sound(request)

    holds()


def sound(request: GenerationRequest) -> None:
    assert 1 <= request.n <= 10
    assert request.steps is None or 1 <= request.steps <= 200
    assert (request.prompt is None) != (request.class_label is None)
    assert through_grpc(request) == request
    for card in CARDS:
        try:
            check(request, card)
        except InvalidRequest as error:
            well_told(error)
            continue
        filled = fill(request, card)
        assert GenerationRequest.model_validate_json(filled.model_dump_json()) == filled


def through_grpc(request: GenerationRequest) -> GenerationRequest:
    """There and back; what is told of a job does not repeat its pictures."""
    message = generation_to_proto(request)
    pictures = {name: value for name in ("image", "mask") if (value := getattr(request, name)) is not None}
    for name in pictures:
        setattr(message, name, b"x")
    return generation_from_proto(message).model_copy(update=pictures)


@amounts
def test_openai_requests(cases: int) -> None:
    @fuzz(cases)
    @given(bodies(OPENAI), st.sampled_from(CARDS))
    @little_memory(64)
    def holds(body: dict[str, Any], card: Any) -> None:
        request = read(ImagesRequest, as_json(body))
        if isinstance(request, ImagesRequest):
            try:
                generation = request.generation(card)
            except InvalidRequest as error:
                well_told(error)
            else:
                assert generation.model == card.name
                sound(generation)

    holds()


@amounts
def test_grpc_requests(cases: int) -> None:
    """Bytes off the wire, and messages with any value a field can hold."""
    numbers = st.integers(-(2**31), 2**31 - 1)
    text = st.text(st.characters(codec="utf-8"), max_size=30) | st.just("x" * 3000)
    messages = st.builds(
        pb.Generation,
        model=text | SOUND["model"],
        prompt=text,
        n=numbers | st.integers(0, 11),
        seed=st.integers(-(2**63), 2**63 - 1),
        dual_loop=st.none() | st.builds(pb.DualLoopSampler, quantile=st.floats(), inner_steps=numbers),
        steps=numbers | st.integers(0, 201),
        guidance=st.floats(),
        output_format=st.integers(-1, 5),
        priority=st.integers(-1, 5),
        output_compression=numbers,
        deadline_seconds=st.floats(),
    )
    whole = generation_to_proto(GenerationRequest(prompt="a red apple", n=2, seed=7, steps=9)).SerializeToString()

    @fuzz(cases)
    @given(messages | (damaged(whole) | st.binary(max_size=100)).map(message_from))
    @little_memory(64)
    def holds(message: pb.Generation | None) -> None:
        if message is not None:
            try:
                sound(generation_from_proto(message))
            except InvalidRequest as error:
                well_told(error)

    holds()


def message_from(raw: bytes) -> pb.Generation | None:
    try:
        return pb.Generation.FromString(raw)
    except DecodeError:
        return None


@amounts
@pytest.mark.parametrize("lines_of", [lambda frame: re.split("\r\n|\r|\n", frame), str.splitlines], ids=["sse", "py"])
def test_events_on_the_wire(cases: int, lines_of: Callable[[str], list[str]]) -> None:
    """One event is one frame, whatever text is in it: to the standard's parser, and to clients that split as Python."""
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
    """Either two numbers that Redis takes, or a refusal at once."""
    queue = JobQueue.connect("redis://127.0.0.1:1/0", Settings())  # never connected to
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
