"""A minimal HTTP client for measurements, so that its own work hardly counts."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from patchforge.service.errors import Unavailable


class Connection:
    """One kept-alive connection; one request at a time.

    Raises:
        OSError: the connection failed.
        EOFError: the server closed it.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 80

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=1 << 20)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """Status and body of the answer."""
        self._send("GET", path, b"")
        return await self._read_answer()

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Send JSON; status and body of the answer."""
        self._send("POST", path, body)
        return await self._read_answer()

    async def follow(self, path: str) -> None:
        """Open a stream of server-sent events.

        Raises:
            Unavailable: the server refused it.
        """
        self._send("GET", path, b"")
        status = _parse_status(await self._reader.readuntil(b"\r\n\r\n"))
        if status != 200:
            raise Unavailable(f"{path}: status {status}")

    async def read_until(self, text: bytes) -> int:
        """Read a stream until this text; the number of bytes read."""
        tail, size = b"", 0
        while text not in tail:
            chunk = await self._reader.read(1 << 16)
            if not chunk:
                raise EOFError("the stream ended early")
            size += len(chunk)
            tail = tail[-len(text) :] + chunk
        return size

    def _send(self, method: str, path: str, body: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}\r\n"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"\r\n" + body)

    async def _read_answer(self) -> tuple[int, bytes]:
        head = await self._reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0] or 0)
        return _parse_status(head), await self._reader.readexactly(length)


def _parse_status(head: bytes) -> int:
    return int(head.split(b" ", 2)[1])
