"""Reads multipart forms with files, as OpenAI's clients send them: limited, and validated like JSON bodies."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from enum import Enum, StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import structlog
from pydantic import BaseModel
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from patchforge.service.errors import InvalidRequest, Unavailable
from patchforge.service.gateway.body import json_body, media_type, read_chunks
from patchforge.service.gateway.validation import parse_json, printable, validated

log = structlog.get_logger(__name__)
Model = TypeVar("Model", bound=BaseModel)

FILES = ("image", "mask")
SWITCHES = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
"""How programs and pages write booleans into forms; Python's `str(True)` has a capital letter."""
MAX_FILES = 4
MAX_FIELDS = 64
MAX_TEXT = 64 << 10
NESTED = re.compile(r"(\w+)\[(\w*)\]")


class Kind(Enum):
    """What a field takes, as far as it decides how a form's text is read."""

    TEXT = "text"
    SWITCH = "switch"
    OTHER = "other"


def form_or_json_body(form: type[Model], json: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """Makes a FastAPI dependency that reads a JSON body as a `json`, and any other as `form_body` does."""
    as_form, as_json = form_body(form), json_body(json)

    async def read(request: Request) -> Model:
        return await (as_json if media_type(request) == "application/json" else as_form)(request)

    return read


def form_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """Makes a FastAPI dependency that reads a `multipart/form-data` body as a `model`, with files in base64."""
    kinds = {name: _kind(field.annotation) for name, field in model.model_fields.items()}

    async def read(request: Request) -> Model:
        if media_type(request) != "multipart/form-data":
            raise HTTPException(415, "send the body as multipart/form-data or application/json")
        form = await read_form(request)
        try:
            return validated(model, await _read_fields(form, kinds))
        finally:
            await form.close()

    return read


async def read_form(request: Request) -> FormData:
    """Splits the body into its parts.

    Raises:
        HTTPException: 400, if it is no such form; those of `read_chunks`.
        Unavailable: a large file cannot be put into the temporary folder.
    """
    limits = {"max_files": MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": MAX_TEXT}
    try:
        async with aclosing(read_chunks(request)) as chunks:
            return await MultiPartParser(request.headers, chunks, **limits).parse()
    except MultiPartException as error:
        raise HTTPException(400, error.message) from None
    except OSError as error:
        log.error("an upload cannot be stored: see the folder for temporary files", reason=error.strerror)
        raise Unavailable("the server has no room for uploads") from error


def form_or_json_body_schema(form: type[BaseModel], json: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI request body of an operation that uses `form_or_json_body`."""
    kinds = {"multipart/form-data": form, "application/json": json}
    content = {kind: {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}} for kind, model in kinds.items()}
    return {"requestBody": {"required": True, "content": content}}


async def _read_fields(form: FormData, kinds: dict[str, Kind]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in form.multi_items():
        if _is_empty(value):
            continue
        name, inner = _split_key(key)
        if (isinstance(value, UploadFile)) != (name in FILES):
            raise InvalidRequest("must be a file" if name in FILES else "must not be a file", field=printable(name))
        kind = Kind.TEXT if inner == "name" else kinds.get(name, Kind.OTHER)
        content = await _read_part(value, kind)
        inside = found.setdefault(name, {}) if inner else found
        if not isinstance(inside, dict) or (inner or name) in inside:
            only = ": only one picture is supported" if name in FILES else ""
            raise InvalidRequest(f"is given more than once{only}", field=printable(name))
        inside[inner or name] = content
    return found


def _is_empty(value: UploadFile | str) -> bool:
    """Whether nobody filled this part in: browsers and many SDKs send what was left empty, files included."""
    return value.size == 0 if isinstance(value, UploadFile) else value == ""


def _split_key(key: str) -> tuple[str, str | None]:
    """The field that a part belongs to, and the key inside it if the field is an object.

    `sampler[name]` is a key inside an object; `image[]` and `image[0]` are entries of a list, with one entry here.
    """
    nested = NESTED.fullmatch(key)
    if nested is None:
        return key, None
    name, inner = nested.groups()
    return name, inner if inner and not inner.isdigit() else None


async def _read_part(value: UploadFile | str, kind: Kind) -> Any:
    """Reads one part. Forms have only text, so numbers, booleans and objects are written as in JSON."""
    if isinstance(value, UploadFile):
        return b64encode(await value.read()).decode("ascii")
    if kind is Kind.TEXT:
        return value
    if kind is Kind.SWITCH:
        return SWITCHES.get(value.lower(), value)
    try:
        return parse_json(value.encode("utf-8", "replace"))
    except InvalidRequest:
        return value


def _kind(annotation: Any) -> Kind:
    """What a field of this type takes."""
    if annotation is bool:
        return Kind.SWITCH
    return Kind.TEXT if _is_text(annotation) else Kind.OTHER


def _is_text(annotation: Any) -> bool:
    """Whether a field takes only text."""
    kinds = get_args(annotation)
    if get_origin(annotation) is Literal:
        return all(isinstance(kind, str) for kind in kinds)
    if get_origin(annotation) is Annotated:
        return _is_text(kinds[0])
    if isinstance(annotation, UnionType) or kinds:
        return all(_is_text(kind) for kind in kinds if kind is not NoneType)
    return isinstance(annotation, type) and issubclass(annotation, str | StrEnum)
