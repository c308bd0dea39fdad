"""A name for each request, in its answer and in the log: the caller's own `x-request-id`, or a new one."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-request-id"
_VALID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")


def choose_id(sent: str | None) -> str:
    """Returns the caller's id, or a new one if there is none or it could harm a log."""
    return sent if sent and _VALID.fullmatch(sent) else secrets.token_hex(16)


def id_of_call(metadata: Sequence[tuple[str, Any]] | None) -> str:
    """The same for a gRPC call."""
    sent = dict(metadata or ()).get(HEADER)
    return choose_id(sent if isinstance(sent, str) else None)


class RequestIdMiddleware:
    """ASGI middleware that puts the id into `request.state`, all log lines of the request, and the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = choose_id(Headers(scope=scope).get(HEADER))
        scope.setdefault("state", {})["request_id"] = request_id

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=request_id):
            await self.app(scope, receive, named_send)
