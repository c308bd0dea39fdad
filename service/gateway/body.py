"""How a request's body comes in: JSON only, in bounded time, validated before anything else happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import InvalidRequest
from service.gateway.validation import parse_json, validated

Model = TypeVar("Model", bound=BaseModel)


async def whole_body(request: Request) -> bytes:
    """The body, if it arrives in time."""
    async with in_time(request):
        return await request.body()


@asynccontextmanager
async def in_time(request: Request) -> AsyncIterator[None]:
    """Gives a client only so long to send what its block reads."""
    try:
        async with asyncio.timeout(request.app.state.settings.client_timeout_seconds):
            yield
    except TimeoutError:
        raise HTTPException(408, "the body did not arrive in time", {"Connection": "close"}) from None


def json_body(model: type[Model]) -> Callable[[Request], Awaitable[Model]]:
    """A dependency that reads the body as a ``model``.

    FastAPI's own body parameters are not used: they accept what :func:`parse_json` refuses.
    """

    async def read(request: Request) -> Model:
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise HTTPException(415, "send the body as application/json")
        value = parse_json(await whole_body(request))
        if not isinstance(value, dict):
            raise InvalidRequest("the body must be a JSON object")
        return validated(model, value)

    return read


def json_body_schema(model: type[BaseModel]) -> dict[str, Any]:
    """What an operation that uses :func:`json_body` adds to its OpenAPI description."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
