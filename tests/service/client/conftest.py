"""The gateway's fixtures for client tests, and a connection that tests can cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from patchforge.service.gateway.app import Gateway
from tests.patience import PATIENCE
from tests.service.gateway.conftest import gateway, settings, url, worker

__all__ = ["gateway", "settings", "url", "worker"]


class Wire:
    """A TCP relay to a port of this machine. Tests can hold or cut its connections."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.port = 0
        self.open = asyncio.Event()
        self.open.set()
        self._connected = asyncio.Semaphore(0)
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """Cuts all connections; new ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()

    async def connected(self) -> None:
        """Wait for the next new connection."""
        await asyncio.wait_for(self._connected.acquire(), PATIENCE)

    async def relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream, upward = await asyncio.open_connection("127.0.0.1", self.target)
        self._writers |= {writer, upward}
        for task in (self._pump(reader, upward, wait=False), self._pump(upstream, writer, wait=True)):
            self._tasks.add(asyncio.create_task(task))
        self._connected.release()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, wait: bool) -> None:
        try:
            while data := await reader.read(65536):
                if wait:
                    await self.open.wait()
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def end(self) -> None:
        self.cut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, *(each.wait_closed() for each in self._writers), return_exceptions=True)


@pytest.fixture
async def wire(gateway: Gateway) -> AsyncIterator[Wire]:
    """A relay between a client and the gateway."""
    relay = Wire(gateway.http_port)
    server = await asyncio.start_server(relay.relay, "127.0.0.1", 0)
    relay.port = server.sockets[0].getsockname()[1]
    yield relay
    server.close()
    await relay.end()
