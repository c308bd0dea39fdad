"""Turns untrusted bytes into a validated message, or into an error that names the field and repeats no input."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from patchforge.service.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_FIELD_NAME = 64
MAX_INT_DIGITS = 20
MAX_EXACT = 2**53  # floats below this hold every integer exactly


def parse_json(raw: bytes) -> Any:
    """Parses UTF-8 JSON. No object may have the same key twice.

    NaN, infinities and very long integers become floats: the models refuse those and name the field. A number without a
    fraction is an integer however it is written, `1.0` too: to JSON the two are the same, and some languages have only
    floats.

    Raises:
        InvalidRequest: it is not such JSON.
    """
    try:
        return json.loads(
            raw.removeprefix(BOM_UTF8).decode("utf-8"),
            object_pairs_hook=_build_object,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError:
        raise InvalidRequest("the body is not valid JSON") from None


def validated(model: type[Model], value: Any) -> Model:
    """Returns `value` as a `model`.

    Raises:
        InvalidRequest: it does not fit; `field` names the first field that is not valid.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise describe(error.errors(include_url=False, include_input=False)) from None


def describe(errors: Sequence[Any], skip: int = 0) -> InvalidRequest:
    """Describes the first of pydantic's `errors` without repeating the input.

    `skip` drops that many leading parts of the field's location.
    """
    first = errors[0]
    parts = [str(part) for part in first["loc"][skip:]]
    if len(parts) > 2 and parts[0] == "sampler":
        del parts[1]  # the name of the union's variant, which pydantic adds
    field = printable(".".join(parts)) or None
    if first["type"] == "fields":  # our own rule over several fields names one of them
        field = first["ctx"]["field"]
    return InvalidRequest(_message(first), field=field)


def _message(error: Any) -> str:
    if error["type"] == "union_tag_invalid":  # pydantic's own message repeats the input
        return f"must be one of {error['ctx']['expected_tags']}"
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


def printable(name: str) -> str:
    """Returns a caller's field name as short ASCII, safe for any encoder and for gRPC's metadata.

    Callers may send lone surrogates, control characters or megabytes.
    """
    escaped = name[:MAX_FIELD_NAME].encode("unicode_escape").decode("ascii")
    return escaped if len(name) <= MAX_FIELD_NAME else f"{escaped}..."


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest("occurs more than once in its JSON object", field=printable(key))
        found[key] = value
    return found


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < MAX_INT_DIGITS else float(digits)


def _parse_float(digits: str) -> int | float:
    number = float(digits)
    return int(number) if number.is_integer() and abs(number) < MAX_EXACT else number
