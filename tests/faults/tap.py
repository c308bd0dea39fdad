"""A connection to the queue server that reports a certain request before the server gets it."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit


class Tap:
    """Passes bytes between clients and a server. Runs a callback once, when a client sends the expected bytes."""

    def __init__(self, server_url: str) -> None:
        self._server = urlsplit(server_url)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listening.getsockname()[1]}/0"
        self._wanted: bytes | None = None
        self._callback: Callable[[], None] = lambda: None
        self._on_answer = False
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def once(self, wanted: bytes, callback: Callable[[], None]) -> None:
        """Runs the callback when the next request with these bytes comes, and then passes it on."""
        self._wanted, self._callback, self._on_answer = wanted, callback, False

    def once_answered(self, wanted: bytes, callback: Callable[[], None]) -> None:
        """Runs the callback when the server has answered the next request with these bytes, before the client knows.

        If the server does not have the request's script yet, the client sends it again; only the second answer counts.
        """
        self._wanted, self._callback, self._on_answer = wanted, callback, True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        """Copies bytes until either side closes. Bytes sent before that still arrive."""
        address = str(self._server.hostname), self._server.port or 0
        with contextlib.suppress(OSError), client, socket.create_connection(address) as server:
            answering: bytes | None = None
            while True:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(1 << 16)
                    if not data:
                        return
                    if source is client and self._wanted is not None and self._wanted in data:
                        self._wanted, answering = None, self._wanted if self._on_answer else None
                        if not self._on_answer:
                            self._callback()
                    elif source is server and answering is not None:
                        if data.startswith(b"-NOSCRIPT "):
                            self._wanted = answering
                        else:
                            self._callback()
                        answering = None
                    (server if source is client else client).sendall(data)


@contextlib.contextmanager
def tapped(server_url: str) -> Iterator[Tap]:
    tap = Tap(server_url)
    try:
        yield tap
    finally:
        tap.close()
