"""Reads a file of requests from a body, and what is said beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from patchforge.service.errors import InvalidRequest
from patchforge.service.gateway.body import media_type, read_body
from patchforge.service.gateway.openai.multipart import NESTED, read_form
from patchforge.service.gateway.validation import parse_json, printable
from patchforge.service.messages.batches import MAX_REQUESTS, FileOptions

Model = TypeVar("Model", bound=BaseModel)

JSON_LINES = ("application/jsonl", "application/x-jsonlines", "application/jsonlines", "application/x-ndjson")
FORM = "multipart/form-data"
FILE_SCHEMA = {"type": "string", "format": "binary", "description": "One request a line, as JSON."}


@dataclass(frozen=True)
class Upload:
    """A file of requests, and the other fields of its form or query, not yet validated."""

    lines: list[bytes]
    """What is between its line feeds."""
    filename: str
    fields: dict[str, Any]


async def read_upload(request: Request) -> Upload:
    """Reads a file of requests: a form with the file in `file`, or the file itself as JSON lines.

    Raises:
        HTTPException: 400, if the form is broken; 415, if it is neither; those of `read_chunks`.
        InvalidRequest: the file has no requests, or too many.
    """
    kind = media_type(request)
    if kind in JSON_LINES:
        asked: dict[str, Any] = {}
        for name, text in request.query_params.multi_items():
            _add_field(asked, name, text)
        return Upload(split_lines(await read_body(request)), "batch.jsonl", asked)
    if kind != FORM:
        raise HTTPException(415, f"send the file as {JSON_LINES[0]}, or as {FORM} with the field `file`")
    form = await read_form(request)
    try:
        fields: dict[str, Any] = {}
        file: UploadFile | None = None
        for key, value in form.multi_items():
            if isinstance(value, UploadFile):
                if key != "file" or file is not None:
                    raise InvalidRequest("send one file, in the field `file`", field=printable(key))
                file = value
            elif value != "":
                _add_field(fields, key, value)
        if file is None:
            raise InvalidRequest("send the file in this field", field="file")
        filename = printable(file.filename or "batch.jsonl")
        return Upload(split_lines(await file.read()), filename, fields)
    finally:
        await form.close()


def split_lines(data: bytes) -> list[bytes]:
    """Returns what is between the line feeds of a file of requests.

    Raises:
        InvalidRequest: it is no such file. A line that is wrong in another way is refused later, alone.
    """
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidRequest("is not UTF-8 text: send one JSON object a line", field="file") from None
    lines = data.split(b"\n")
    requests = sum(1 for line in lines if line.strip())
    if requests > MAX_REQUESTS:
        raise InvalidRequest(f"has {requests} requests; at most {MAX_REQUESTS} are possible", field="file")
    if not any(line.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") for line in lines):
        raise InvalidRequest("has no requests: send one JSON object a line", field="file")
    return lines


def upload_schema(options: type[BaseModel], *, also_json: type[BaseModel] | None = None) -> dict[str, Any]:
    """The OpenAPI request body of an operation that uses `read_upload`; `also_json` may be sent instead of a file."""
    form = options.model_json_schema(ref_template="#/components/schemas/{model}")
    form.pop("$defs", None)
    form["properties"] = {"file": FILE_SCHEMA, **form["properties"]}
    form["required"] = ["file", *form.get("required", ())]
    content: dict[str, Any] = {FORM: {"schema": form}}
    if also_json is not None:
        content["application/json"] = {"schema": {"$ref": f"#/components/schemas/{also_json.__name__}"}}
    if options is not FileOptions:
        content[JSON_LINES[0]] = {"schema": FILE_SCHEMA}
    return {"requestBody": {"required": True, "content": content}}


def _add_field(fields: dict[str, Any], key: str, value: str) -> None:
    """Adds a field of a form or query. These have only text: `a[b]` may be a number, and an object may be JSON."""
    nested = NESTED.fullmatch(key)
    if nested is not None and nested[2]:
        inner = fields.setdefault(nested[1], {})
        if isinstance(inner, dict):
            inner[nested[2]] = int(value) if value.isascii() and value.isdigit() and len(value) < 12 else value
    else:
        fields[key] = parse_json(value.encode("utf-8", "replace")) if value.startswith("{") else value
