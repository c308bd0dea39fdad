"""Uvicorn as part of a larger process: it handles no signals, reports its port, and limits how long it waits."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence

import h11
import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from patchforge.service.gateway.acceptor import Acceptor
from patchforge.service.gateway.addresses import listen
from patchforge.service.gateway.streams import IS_EVENT_STREAM
from patchforge.service.gateway.tls import Certificate
from patchforge.service.settings import Settings

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b": \n\n"
GRACE = 1.0  # seconds that a half-closed connection of HTTP/1.0 is kept
PROBES = (0.05, 0.5, 2.0, 5.0)  # seconds between probes of a half-closed connection; the last one repeats
REQUEST_TIMEOUT = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

log = structlog.get_logger(__name__)


class HttpServer(uvicorn.Server):
    """Serves `app` from `start` until `stop`."""

    def __init__(self, app: FastAPI, settings: Settings, certificate: Certificate | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimeLimitedProtocol,
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
        """Binds `host` and `port` and returns the port; 0 picks any free one. `::` takes IPv4 connections too.

        Raises:
            InvalidRequest: the address or the port cannot be used.
        """
        listening = listen(host, port, "PATCHFORGE_HTTP_PORT")
        # asyncio does this only for sockets it made. Without it, every response waits 40 ms for a delayed ACK.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._serving = asyncio.create_task(self.serve([listening]))
        await self._bound.wait()
        bound: int = listening.getsockname()[1]
        return bound

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Does what uvicorn's does without a lifespan, with acceptors in place of asyncio's servers."""
        await self.lifespan.startup()
        self.servers = [
            Acceptor(listening, self._make_protocol, lambda: len(self.server_state.connections), self.config.ssl)  # type: ignore[misc]
            for listening in sockets or ()
        ]
        self.started = True
        self._bound.set()

    def _make_protocol(self) -> asyncio.Protocol:
        return TimeLimitedProtocol(self.config, self.server_state, self.lifespan.state)

    async def stop(self) -> None:
        """Stops accepting, waits for responses in progress, then cancels the rest and waits for that too."""
        if self._serving is None:
            return
        self.should_exit = True
        await self._serving
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class TimeLimitedProtocol(H11Protocol):
    """HTTP/1.1 that disconnects slow clients.

    Three waits have a limit: for the head of a request, for the rest of a body that was answered before it was read,
    and for the client to read the response. `body.read_chunks` limits the fourth, for the body.

    A client may close its side of the connection after its request, as `nc -N` does, and still gets the answer. One
    that has gone altogether looks the same, so a half-closed connection is probed until the answer is there.
    """

    _read_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _probe_timer: asyncio.TimerHandle | None = None
    _half_closed = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_read_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or self._answered_before_body():
            self._start_read_timer()
        else:
            self._stop_read_timer()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection if an answer is due. TLS cannot be closed by halves."""
        if self.scheme == "https" or not self._owes_answer() or self.conn.their_state is h11.SEND_BODY:
            return False
        if not self._half_closed:
            self._half_closed = True
            delay = 0.0 if self.scope["http_version"] == "1.1" else GRACE
            self._probe_timer = self.loop.call_later(delay, self._probe, PROBES)
        return True

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._answered_before_body():
            self._start_read_timer()
        if self._half_closed and not self._owes_answer():
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response was sent, or is being sent
            self.transport.close()
        if self.cycle is not None:  # the body is malformed, so whoever handles the request should stop
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.timeout_keep_alive, self._abort_unread)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_write_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_read_timer()
        self._stop_write_timer()
        if self._probe_timer is not None:
            self._probe_timer.cancel()
        super().connection_lost(exc)

    def _owes_answer(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _probe(self, pauses: Sequence[float]) -> None:
        """Writes what every client ignores: if it has gone, its machine says so, and the next write fails."""
        if self.transport.is_closing() or not self._owes_answer():
            return
        if self.cycle.response_started:
            if self.scope["state"].get(IS_EVENT_STREAM):
                self.transport.write(self.conn.send(h11.Data(data=COMMENT)) or b"")
        elif self.scope["http_version"] == "1.1":
            self.transport.write(CONTINUE)
        else:
            self.transport.close()  # HTTP/1.0 has nothing to probe with
            return
        pause, *later = pauses
        self._probe_timer = self.loop.call_later(pause, self._probe, later or (pause,))

    def _answered_before_body(self) -> bool:
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    def _start_read_timer(self) -> None:
        if self._read_timer is None:
            self._read_timer = self.loop.call_later(self.timeout_keep_alive, self._close_unsent)

    def _stop_read_timer(self) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _close_unsent(self) -> None:
        if not self.transport.is_closing():
            if self.conn.our_state is h11.IDLE:
                self.transport.write(REQUEST_TIMEOUT)
            self.transport.close()

    def _abort_unread(self) -> None:
        # `close` would first wait for the client to read what is written, and the client does not read.
        self.transport.abort()
        log.info("disconnected a client that did not read its response", path=self.scope["path"])
