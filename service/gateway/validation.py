"""From bytes a stranger sent to a validated message, or to an error that names the field and repeats nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from service.errors import InvalidRequest

Model = TypeVar("Model", bound=BaseModel)

MAX_FIELD_NAME = 64
MAX_INT_DIGITS = 20


def parse_json(raw: bytes) -> Any:
    """Parses UTF-8 JSON in which no object has a key twice.

    NaN, infinities and endless integers pass as floats: the models refuse them, and know the field's name.
    """
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_object, parse_int=_number)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    except ValueError:
        raise InvalidRequest("the body is not valid JSON") from None


def validated(model: type[Model], value: Any) -> Model:
    """``value`` as a ``model``; :class:`InvalidRequest` names the first field at fault."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise describe(error.errors(include_url=False, include_input=False)) from None


def describe(errors: Sequence[Any], skip: int = 0) -> InvalidRequest:
    """The first of pydantic's ``errors``, without the input; ``skip`` drops leading parts of its location."""
    first = errors[0]
    parts = [str(part) for part in first["loc"][skip:]]
    if len(parts) > 2 and parts[0] == "sampler":
        del parts[1]  # the union's tag, which no caller has written
    field = printable(".".join(parts)) or None
    if first["type"] == "fields":  # a rule over several, which names the one at fault
        field = first["ctx"]["field"]
    return InvalidRequest(_message(first), field=field)


def _message(error: Any) -> str:
    if error["type"] == "union_tag_invalid":  # pydantic's own message repeats the input
        return f"expected one of {error['ctx']['expected_tags']}"
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


def printable(name: str) -> str:
    """A field name fit for any encoder and for gRPC's metadata, in ASCII: callers may send lone surrogates, control
    characters, or megabytes.
    """
    escaped = name[:MAX_FIELD_NAME].encode("unicode_escape").decode("ascii")
    return escaped if len(name) <= MAX_FIELD_NAME else f"{escaped}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InvalidRequest("the key occurs twice", field=printable(key))
        found[key] = value
    return found


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) < MAX_INT_DIGITS else float(digits)
