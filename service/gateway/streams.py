"""Server-sent events, and noticing that a client has hung up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from service.errors import PatchforgeError
from service.settings import Settings

T = TypeVar("T")


class EventStream(EventSourceResponse):
    """An SSE response that lives inside ``scope_of_life``: a run to cancel if the client leaves, or the drain."""

    def __init__(
        self,
        events: AsyncIterator[ServerSentEvent],
        scope_of_life: AbstractAsyncContextManager[object],
        settings: Settings,
    ) -> None:
        super().__init__(events, ping=settings.sse_ping_seconds, sep="\n")
        self._scope_of_life = scope_of_life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with self._scope_of_life:
                await super().__call__(scope, receive, watched_send)
        except PatchforgeError:  # draining, or the queue went away
            if not started:
                raise
            # A proper end, after which the client comes back, here or elsewhere.
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled if the client of ``request`` hangs up first."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
