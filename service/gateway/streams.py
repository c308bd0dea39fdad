"""Server-sent events, and work that stops when its client disconnects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, TypeVar

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from patchforge.service.errors import PatchforgeError
from patchforge.service.settings import Settings

T = TypeVar("T")
IS_EVENT_STREAM = "is_event_stream"
"""Set in the scope's `state`, which the HTTP server sees: comments may be put between the messages of this answer."""


class EventStream(EventSourceResponse):
    """A response of server-sent events that runs inside the context `lifetime`.

    `lifetime` ends the stream or its job: a `Run` cancels its job if the client disconnects, and
    `JobService.until_drained` interrupts the stream at shutdown.
    """

    def __init__(
        self,
        events: AsyncIterator[ServerSentEvent],
        lifetime: AbstractAsyncContextManager[object],
        settings: Settings,
    ) -> None:
        super().__init__(events, ping=settings.sse_ping_seconds, sep="\n")
        self._lifetime = lifetime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        scope.setdefault("state", {})[IS_EVENT_STREAM] = True

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with self._lifetime:
                await super().__call__(scope, receive, watched_send)
        except PatchforgeError:  # draining, or the queue went away
            if not started:
                raise
            # Ends the response properly: the client will reconnect, here or to another gateway.
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def cancel_on_disconnect(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, or cancels it when the client of `request` disconnects.

    Raises:
        ClientDisconnect: the client disconnected first.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_wait_for_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
