"""Uvicorn as one part of a larger process: it leaves signals alone, tells its port, and will not wait for ever."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import h11
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.gateway.tls import Certificate
from service.settings import Settings

REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """Serves ``app`` from :meth:`start` to :meth:`stop`."""

    def __init__(self, app: FastAPI, settings: Settings, certificate: Certificate | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=ImpatientProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=max(1, round(settings.client_timeout_seconds)),
                timeout_graceful_shutdown=settings.drain_seconds,
                ssl_certfile=certificate.chain if certificate else None,
                ssl_keyfile=certificate.key if certificate else None,
            )
        )
        self._serving: asyncio.Task[None] | None = None
        self._bound = asyncio.Event()

    async def start(self, host: str, port: int) -> int:
        """Returns the port bound; 0 asks for any free one."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=1024)
        # asyncio does this only for sockets it made itself; without it, every answer waits 40 ms for a delayed ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serving = asyncio.create_task(self.serve([listening]))
        await self._bound.wait()
        bound: int = listening.getsockname()[1]
        return bound

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._bound.set()

    async def stop(self) -> None:
        """Accepts no more, waits for answers in progress, then cancels what is left and waits for that too."""
        if self._serving is None:
            return
        self.should_exit = True
        await self._serving
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ImpatientProtocol(H11Protocol):
    """HTTP/1.1 that hangs up on clients that dawdle: over a request's head, over the rest of a body that was answered
    unread, or over reading the answer.
    """

    _deadline: asyncio.TimerHandle | None = None
    _send_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_waiting()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or self._answered_early():
            self._start_waiting()
        else:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answered_early():
            self._start_waiting()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # it has been answered, or is being
            self.transport.close()
        if self.cycle is not None:  # its body turned out to be none, and whatever it asked for is of no use
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._send_deadline = self.loop.call_later(self.timeout_keep_alive, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_sending()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)

    def _answered_early(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _start_waiting(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.timeout_keep_alive, self._hang_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_sending(self) -> None:
        if self._send_deadline is not None:
            self._send_deadline.cancel()
            self._send_deadline = None

    def _hang_up(self) -> None:
        if not self.transport.is_closing():
            if self.conn.our_state is h11.IDLE:
                self.transport.write(REQUEST_TIMEOUT)
            self.transport.close()

    def _drop(self) -> None:
        # Closing would first wait for the client to read what is already written, which it does not do.
        self.transport.abort()
        log.info("dropped a client too slow to read its answer", path=self.scope["path"])
