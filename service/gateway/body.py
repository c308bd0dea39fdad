"""Reads request bodies: within limits of size and time, decompressed, and validated before anything else happens."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from patchforge.service.errors import InvalidRequest, PayloadTooLarge
from patchforge.service.gateway.prefix import route_path
from patchforge.service.gateway.problems import Problem
from patchforge.service.gateway.validation import parse_json, validated

Model = TypeVar("Model", bound=BaseModel)

MIN_BYTES_PER_SECOND = 8 << 10
"""A body that arrives more slowly than this, after a first `PATCHFORGE_CLIENT_TIMEOUT_SECONDS`, is given up."""
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "x-gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class BodySizeMiddleware:
    """ASGI middleware that refuses bodies announced as too large, and tells the others' readers the limit."""

    def __init__(self, app: ASGIApp, most: int, most_upload: int, uploads: Iterable[re.Pattern[str]]) -> None:
        """`most` bytes, or `most_upload` for paths that match one of `uploads`."""
        self.app = app
        self.most = most
        self.most_upload = most_upload
        self.uploads = tuple(uploads)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            path = route_path(scope)
            is_upload = scope["method"] == "POST" and any(pattern.match(path) for pattern in self.uploads)
            limit = self.most_upload if is_upload else self.most
            scope.setdefault("state", {})["body_limit"] = limit
            announced = Headers(scope=scope).get("content-length", "")
            if announced.isdigit() and int(announced) > limit:
                await Problem.of(_too_large(limit)).response(scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def read_body(request: Request) -> bytes:
    """Reads the whole body; raises what `read_chunks` raises."""
    return b"".join([chunk async for chunk in read_chunks(request)])


async def read_chunks(request: Request) -> AsyncGenerator[bytes, None]:
    """Yields the body, decompressed, as it arrives.

    Raises:
        HTTPException: 408, if it arrives too slowly or not at all; 415, if its encoding is not known.
        PayloadTooLarge: it has too many bytes, as sent or decompressed.
        InvalidRequest: it is not what its encoding says.
    """
    limit: int = request.state.body_limit
    decompress = _choose_decompressor(request.headers.get("content-encoding", ""), limit)
    sent = 0
    async for chunk in _in_time(request):
        sent += len(chunk)
        if sent > limit:
            raise _too_large(limit)
        yield decompress(chunk) if decompress else chunk
    if decompress is not None:
        decompress.finish()


async def _in_time(request: Request) -> AsyncGenerator[bytes, None]:
    """Yields the body as it is sent.

    Each wait for more is limited, and the whole body too: a client gets more time for what it has sent, so that a slow
    line passes, and one that sends a byte now and then does not.
    """
    seconds = request.app.state.settings.client_timeout_seconds
    loop = asyncio.get_running_loop()
    start, received, chunks = loop.time(), 0, aiter(request.stream())
    while True:
        latest = start + seconds + received / MIN_BYTES_PER_SECOND
        try:
            async with asyncio.timeout_at(min(latest, loop.time() + seconds)):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError:
            message = f"the request body did not arrive: nothing came for {seconds:g} seconds, or too little"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        received += len(chunk)
        yield chunk


class _Decompressor:
    """Decompresses gzip or zlib data, piece by piece."""

    def __init__(self, window: int, limit: int) -> None:
        self._window = window
        self._limit = limit
        self._total = 0
        self._stream = zlib.decompressobj(window)

    def __call__(self, data: bytes) -> bytes:
        pieces = []
        while data:
            if self._stream.eof:  # gzip files may follow each other
                self._stream = zlib.decompressobj(self._window)
            try:
                piece = self._stream.decompress(data, self._limit - self._total + 1)
            except zlib.error:
                raise InvalidRequest("the body is not compressed as Content-Encoding says") from None
            self._total += len(piece)
            if self._total > self._limit:
                raise _too_large(self._limit)
            pieces.append(piece)
            data = self._stream.unconsumed_tail or self._stream.unused_data
        return b"".join(pieces)

    def finish(self) -> None:
        if not self._stream.eof:
            raise InvalidRequest("the compressed body ends too early")


def _choose_decompressor(encoding: str, limit: int) -> _Decompressor | None:
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return None
    if name not in _WINDOWS:
        message = "send the body uncompressed, or with Content-Encoding gzip or deflate"
        raise HTTPException(415, message, {"Accept-Encoding": "gzip, deflate, identity"})
    return _Decompressor(_WINDOWS[name], limit)


def _too_large(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the request body has more than {limit} bytes")


def media_type(request: Request) -> str:
    """The media type of the body in lower case, without parameters; empty if the client named none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """Makes a FastAPI dependency that reads the JSON body as a `model`.

    FastAPI's own body parameters accept input that `parse_json` refuses, so they are not used.
    """

    async def read(request: Request) -> Model:
        if media_type(request) != "application/json":
            raise HTTPException(415, "send the body as application/json")
        value = parse_json(await read_body(request))
        if not isinstance(value, dict):
            raise InvalidRequest("the body must be a JSON object")
        return validated(model, value)

    return read


def json_body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI request body of an operation that uses `json_body`."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
