"""HEAD requests: the headers that GET would have, and no body."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadMiddleware:
    """ASGI middleware that asks the application for GET and leaves out the body. A stream ends with its headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        inner = dict(scope) | {"method": "GET"}
        enough = asyncio.Event()
        answering = asyncio.ensure_future(self.app(inner, receive, _Headers(send, enough)))
        ending = asyncio.create_task(enough.wait())
        try:
            await asyncio.wait({answering, ending}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
        finally:
            scope["route"] = inner.get("route")  # for the metrics
            answering.cancel()
            ending.cancel()
            await asyncio.gather(answering, ending, return_exceptions=True)


class _Headers:
    """Sends what the application sends, without its body; sets `enough` when an endless one begins."""

    def __init__(self, send: Send, enough: asyncio.Event) -> None:
        self._send = send
        self._enough = enough
        self._ended = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._send(message)
            if "content-length" not in Headers(raw=message["headers"]):
                await self._end()
                self._enough.set()
        elif not message.get("more_body", False):
            await self._end()

    async def _end(self) -> None:
        if not self._ended:
            self._ended = True
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
