"""Streams whose reader does not keep up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sse_starlette import ServerSentEvent

from service.gateway.streams import EventStream
from service.settings import Settings


async def test_a_client_too_slow_to_read_is_dropped() -> None:
    produced, left = 0, False

    async def events() -> AsyncIterator[ServerSentEvent]:
        nonlocal produced
        while True:
            produced += 1
            yield ServerSentEvent("x" * 1000)

    @asynccontextmanager
    async def life() -> AsyncIterator[None]:
        nonlocal left
        try:
            yield
        finally:
            left = True

    async def stuck(message: Any = None) -> Any:
        if message is None or message["type"] == "http.response.body":
            await asyncio.Event().wait()

    stream = EventStream(events(), life(), Settings(client_timeout_seconds=0.05))
    async with asyncio.timeout(5):
        await stream({"type": "http", "method": "GET", "path": "/v1/jobs/x/events"}, stuck, stuck)
    assert left, "its run would be cancelled"
    assert produced == 1, "nothing piles up for it"
