"""Accepts connections of a listening socket, no more than this process has file descriptors for.

asyncio's own servers retry at once and log each failure with a traceback: thousands a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import time
from collections.abc import Callable

import structlog

AT_ONCE = 64  # connections accepted before the event loop does something else
PAUSE_SECONDS = 0.1  # before the next attempt when there was no room
LOG_SECONDS = 1.0
RESERVED_FILES = 96  # for Redis, gRPC and files: HTTP connections leave them, or at least half of a small limit
MAX_FILES = 1 << 16

log = structlog.get_logger(__name__)


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit: each connection takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS has further limits
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def most_connections() -> int:
    """HTTP connections that may be open together."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = MAX_FILES if soft == resource.RLIM_INFINITY else soft
    return max(1, files - min(RESERVED_FILES, files // 2))


class Acceptor:
    """Accepts connections until `close`; has the methods of `asyncio.Server` that uvicorn calls.

    While there is no room, clients wait in the kernel's queue, and nobody is refused.
    """

    def __init__(
        self,
        listening: socket.socket,
        protocol: Callable[[], asyncio.Protocol],
        count_open: Callable[[], int],
        tls: ssl.SSLContext | None,
    ) -> None:
        """`protocol` makes one for each connection; `count_open` counts the connections that have one."""
        listening.setblocking(False)
        self._listening = listening
        self._protocol = protocol
        self._count_open = count_open
        self._tls = tls
        self._most = most_connections()
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._logged = -LOG_SECONDS
        self._resume()

    def close(self) -> None:
        """Stops accepting."""
        self._loop.remove_reader(self._listening.fileno())
        if self._pause is not None:
            self._pause.cancel()

    async def wait_closed(self) -> None:
        """Ends TLS handshakes in progress."""
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            if self._count_open() + len(self._opening) >= self._most:
                self._wait(f"{self._most} are open, as many as the limit of open files allows")
                return
            try:
                connection, _ = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # no file descriptor, no memory
                self._wait(error.strerror or str(error))
                return
            connection.setblocking(False)
            task = self._loop.create_task(self._open(connection))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    def _wait(self, reason: str) -> None:
        self._loop.remove_reader(self._listening.fileno())
        self._pause = self._loop.call_later(PAUSE_SECONDS, self._resume)
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            log.warning("no room for more connections: new ones wait", reason=reason)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._protocol, connection, ssl=self._tls)
        except OSError:  # the client left, or does not speak TLS
            connection.close()
