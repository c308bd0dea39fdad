"""Reads and writes what lies on the queue server, where processes of other versions read and write too.

Reading ignores unknown fields. If it fails, the error does not repeat the input, because errors are logged. Writing
leaves out unset fields, so an older version can read a message as long as nobody uses what is new.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from patchforge.service.messages.base import Message

T = TypeVar("T")


class Unreadable(Exception):
    """A message from another process cannot be read here. The text says why, without repeating the input."""


def read(kind: TypeAdapter[T], text: bytes, what: str) -> T:
    """Parses the JSON in `text`; `what` names it in errors.

    Raises:
        Unreadable: the text is not such a message.
    """
    try:
        return kind.validate_json(text, extra="ignore")
    except ValidationError as error:
        raise Unreadable(_reason(error, what)) from None


def written(message: Message) -> str:
    """Returns `message` as JSON, without optional fields that are None."""
    return message.model_dump_json(exclude=_unset(message))


def _reason(error: ValidationError, what: str) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join([what, *map(str, first["loc"])])
    # For a tagged union, the message would repeat the tag, which is part of the input.
    message = "is of an unknown kind" if first["type"] == "union_tag_invalid" else first["msg"]
    return f"{place}: {message}"


def _unset(message: Message) -> dict[Any, Any]:
    """Returns what to leave out, in the notation of pydantic's `exclude`."""
    found: dict[Any, Any] = {}
    for name, field in type(message).model_fields.items():
        value = getattr(message, name)
        if value is None and not field.is_required():
            found[name] = True
        elif isinstance(value, Message):
            found[name] = _unset(value)
        elif isinstance(value, list) and value and isinstance(value[0], Message):
            found[name] = {index: _unset(each) for index, each in enumerate(value)}
    return {name: inner for name, inner in found.items() if inner}
