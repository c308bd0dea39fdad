"""Records of other versions are read as far as possible, and refused without repeating their content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from patchforge.service.messages.events import Completed, Event
from patchforge.service.messages.reading import Unreadable, read, written
from patchforge.service.messages.samplers import Adaptive
from patchforge.service.messages.schemas import GenerationRequest, SavingsReport
from tests.service.queue.kit import DONE, a_card, a_preview, a_request

SECRET = "the caller's own words"
EVENT: TypeAdapter[Event] = TypeAdapter(Event)
REQUEST = TypeAdapter(GenerationRequest)


def changed(text: str, **fields: Any) -> bytes:
    return json.dumps(json.loads(text) | fields).encode()


def test_unknown_fields_are_passed_over_however_deep() -> None:
    report = json.loads(DONE.report.model_dump_json()) | {"later": {"a": 1}}
    assert read(EVENT, changed(DONE.model_dump_json(), report=report, later=[]), "event") == DONE
    sampler = {"name": "adaptive", "tolerance": 0.25, "later": True}
    request = a_request(sampler=Adaptive(tolerance=0.25))
    assert read(REQUEST, changed(request.model_dump_json(), sampler=sampler, later=1), "request") == request


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe\x00",
        SECRET.encode(),
        json.dumps(SECRET).encode(),
        b"[" * 100_000,
        changed(a_request().model_dump_json(), sampler={"name": SECRET}),
        changed(a_request().model_dump_json(), output_format=SECRET),
        changed(a_request().model_dump_json(), prompt=[SECRET]),
        changed(a_request().model_dump_json(), steps=1_000_000),
        changed(a_request().model_dump_json(), class_label=SECRET),
    ],
)
def test_what_cannot_be_read_is_refused_in_words_that_repeat_nothing(text: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        read(REQUEST, text, "request")
    assert str(caught.value).startswith("request")
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


def test_the_public_api_stays_strict_and_its_errors_repeat_nothing() -> None:
    with pytest.raises(ValidationError) as caught:
        GenerationRequest.model_validate({"prompt": "a cat", "later": SECRET})
    assert SECRET not in str(caught.value)


def test_what_is_not_set_is_not_written() -> None:
    assert set(json.loads(written(a_request()))) == {
        *("model", "prompt", "n", "seed", "sampler", "steps", "guidance", "previews", "priority", "deterministic"),
        *("output_format", "output_compression"),
    }
    for message in (a_request(), a_card("a"), a_preview(3), DONE):
        assert type(message).model_validate_json(written(message)) == message


def test_what_every_reader_asks_for_is_written_though_it_is_none() -> None:
    """Readers of protocol 0 exit at a report without it."""
    report = DONE.report.model_copy(update={"time_to_first_preview_seconds": None})
    assert json.loads(written(Completed(report=report)))["report"]["time_to_first_preview_seconds"] is None
    assert SavingsReport.model_validate_json(written(report)) == report
