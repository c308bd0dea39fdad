"""How a form with files comes in, as OpenAI's clients send edits: bounded, and read into the same models as JSON is."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import InvalidRequest
from service.gateway.body import in_time
from service.gateway.validation import parse_json, printable, validated

Model = TypeVar("Model", bound=BaseModel)

FILES = {"image": "image", "image[]": "image", "mask": "mask"}
MAX_FIELDS = 64
MAX_TEXT = 64 << 10
NESTED = re.compile(r"(\w+)\[(\w+)\]")


def form_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads a ``multipart/form-data`` body as a ``model``, files in base64."""
    texts = {name for name, field in model.model_fields.items() if _is_text(field.annotation)}

    async def read(request: Request) -> Model:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "multipart/form-data":
            raise HTTPException(415, "send the body as multipart/form-data")
        async with in_time(request):
            form = await request.form(max_files=len(FILES), max_fields=MAX_FIELDS, max_part_size=MAX_TEXT)
        try:
            return validated(model, await _fields(form, texts))
        finally:
            await form.close()

    return read


def form_body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What an operation that uses :func:`form_body` adds to its OpenAPI description."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def _fields(form: FormData, texts: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in form.multi_items():
        name, inner = FILES.get(key, key), None
        if nested := NESTED.fullmatch(name):
            name, inner = nested.groups()
        if (isinstance(value, UploadFile)) != (name in FILES):
            raise InvalidRequest("must be a file" if name in FILES else "must not be a file", field=printable(name))
        content = await _content(value, is_text=name in texts or inner == "name")
        inside = found.setdefault(name, {}) if inner else found
        if not isinstance(inside, dict) or (inner or name) in inside:
            raise InvalidRequest("can be given only once", field=printable(name))
        inside[inner or name] = content
    return found


async def _content(value: UploadFile | str, *, is_text: bool) -> Any:
    """A form knows only text: what is a number, a switch or an object is told as in JSON."""
    if isinstance(value, UploadFile):
        return b64encode(await value.read()).decode("ascii")
    if is_text:
        return value
    try:
        return parse_json(value.encode("utf-8", "replace"))
    except InvalidRequest:
        return value


def _is_text(annotation: Any) -> bool:
    """Whether nothing but text will do for a field."""
    kinds = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(kind, str) for kind in kinds)
    if get_origin(annotation) is Annotated:
        return _is_text(kinds[0])
    if isinstance(annotation, UnionType) or kinds:
        return all(_is_text(kind) for kind in kinds if kind is not NoneType)
    return isinstance(annotation, type) and issubclass(annotation, str | StrEnum)
