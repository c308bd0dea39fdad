"""The queue server of a soak, alone or replicated, and its faults."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from redis import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.soak.replicated import Node, Replicated
from patchforge.service.threads import in_thread

TIMEOUT = 2.0
LOOK_SECONDS = 0.1
LONGEST_SECONDS = 180.0  # of a failover, on a machine that does much else

Outage = Callable[[], Awaitable[None]]
Fault = Callable[[Outage], Awaitable[None]]


class Servers(Protocol):
    """One queue server, or several that replace each other."""

    faults: Sequence[Fault]
    """Each awaits its argument while the server is away; its name is what is counted."""

    @property
    def url(self) -> str: ...

    @property
    def settings(self) -> dict[str, int]:
        """What gateways and workers need in addition to the URL."""

    def client(self) -> Redis:
        """A client of the server that is used now: another one after a failover.

        Raises:
            Unavailable: none is, at the moment.
        """

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def revive(self) -> list[str]:
        """Starts what ended by itself; says what it was."""

    async def restore(self) -> None:
        """Repairs what a fault left behind."""


class SingleServer:
    """One embedded server."""

    def __init__(self, folder: Path) -> None:
        self._server = EmbeddedServer(folder)
        self.faults: Sequence[Fault] = (self.kill_server, self.kill_server, self.stop_server, self.pause_server)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def settings(self) -> dict[str, int]:
        return {}

    def client(self) -> Redis:
        return self._client

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        self._server.stop()

    def revive(self) -> list[str]:
        if self._server.running:
            return []
        self._restart()
        return ["the queue server"]

    async def restore(self) -> None:
        if self._server.running:
            os.kill(self._server.pid, signal.SIGCONT)
        else:
            self._restart()

    async def kill_server(self, outage: Outage) -> None:
        await in_thread(self._server.kill)
        await outage()
        self._restart()

    async def stop_server(self, outage: Outage) -> None:
        os.kill(self._server.pid, signal.SIGTERM)
        await outage()
        self._restart()

    async def pause_server(self, outage: Outage) -> None:
        os.kill(self._server.pid, signal.SIGSTOP)
        await outage()
        os.kill(self._server.pid, signal.SIGCONT)

    def _restart(self) -> None:
        """With the same port and data."""
        self._server.stop()
        self._server.start()

    @cached_property
    def _client(self) -> Redis:
        return Redis.from_url(self.url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)


class ReplicatedServers:
    """Three servers and three Sentinels on loopback addresses of their own (on Linux only).

    Every fault is one that makes another server the master. It lasts until the old one follows the new one.
    """

    def __init__(self, folder: Path) -> None:
        self._servers = Replicated(folder, min_replicas_to_write=1, min_replicas_max_lag=2)
        self._clients: dict[int, Redis] = {}
        self._harmed: Node | None = None
        self.faults: Sequence[Fault] = (self.kill_master, self.pause_master, self.cut_off_master)

    @property
    def url(self) -> str:
        return self._servers.url

    @property
    def settings(self) -> dict[str, int]:
        return {"REDIS_WAIT_REPLICAS": 1}

    def client(self) -> Redis:
        master = self._servers.master
        if master.port not in self._clients:
            timeouts = {"socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT}
            self._clients[master.port] = self._servers.client(master, **timeouts)
        return self._clients[master.port]

    def start(self) -> None:
        self._servers.__enter__()

    def stop(self) -> None:
        self._servers.close()

    def revive(self) -> list[str]:
        dead = [node for node in self._servers.nodes if not node.running]
        for node in dead:
            node.start()
        return [node.folder.name for node in dead]

    async def restore(self) -> None:
        """Ends a failover that has begun before it brings the old master back, which may lack what was accepted."""
        if (old := self._harmed) is not None:
            await _until(lambda: self._servers.replaced(old))
        self._servers.repair()
        await _until(self._servers.whole)
        self._harmed = None

    async def kill_master(self, outage: Outage) -> None:
        await self._replace(outage, lambda master: master.kill())

    async def pause_master(self, outage: Outage) -> None:
        await self._replace(outage, lambda master: os.kill(master.pid, signal.SIGSTOP))

    async def cut_off_master(self, outage: Outage) -> None:
        """Parts it from its replicas and two Sentinels, while gateways and workers still reach it."""
        await self._replace(outage, lambda master: self._servers.cut_off(master.host))

    async def _replace(self, outage: Outage, harm: Callable[[Node], None]) -> None:
        self._harmed = await in_thread(lambda: self._servers.master)
        harm(self._harmed)
        old = self._harmed
        await _until(lambda: self._servers.replaced(old))
        await outage()
        await self.restore()


async def _until(reached: Callable[[], bool]) -> None:
    """Looks until it is so.

    Raises:
        TimeoutError: it never is.
    """
    async with asyncio.timeout(LONGEST_SECONDS):
        while True:
            if await in_thread(reached):
                return
            await asyncio.sleep(LOOK_SECONDS)
