"""A TCP proxy that makes the queue server seem far away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

CHUNK = 1 << 16


@dataclass
class Delay:
    """Forwards connections to a port of this machine; everything arrives half a round trip later."""

    target: int
    """Port to forward to."""
    port: int = 0
    """Port of the proxy itself."""
    round_trip: float = 0.0
    """Seconds; may be changed at any time."""
    _busy: set[asyncio.Task[None]] = field(default_factory=set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target)
        for source, sink in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._forward(source, sink))
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self.round_trip:
                    loop.call_later(self.round_trip / 2, _write, writer, chunk)
                else:
                    writer.write(chunk)
        loop.call_later(self.round_trip, writer.close)


def _write(writer: asyncio.StreamWriter, chunk: bytes) -> None:
    if not writer.is_closing():
        writer.write(chunk)


@asynccontextmanager
async def delayed(target: int) -> AsyncIterator[Delay]:
    """Runs a proxy to a port of this machine, at first without any delay."""
    delay = Delay(target)
    server = await asyncio.start_server(delay._serve, "127.0.0.1", 0)
    delay.port = server.sockets[0].getsockname()[1]
    try:
        yield delay
    finally:
        server.close()
        for task in list(delay._busy):
            task.cancel()
