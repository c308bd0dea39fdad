"""A door to one server that can be shut for some of its callers, as a broken cable would."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable

LOOK_SECONDS = 0.05  # how often a connection learns that its cable broke


class Relay:
    """Passes bytes from `address` to the server behind it, except for callers that `cut_off` names.

    Their connections stay open and carry nothing; new ones are accepted and carry nothing. When the cable is whole
    again, these connections are closed.
    """

    def __init__(self, host: str, cut_off: Callable[[str], bool]) -> None:
        self.host = host
        self.server_port = _free_port(host)
        self._cut_off = cut_off
        self._listening = socket.create_server((host, 0), backlog=128)
        self.port = int(self._listening.getsockname()[1])
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, (caller, _) = self._listening.accept()
                threading.Thread(target=self._carry, args=(client, caller), daemon=True).start()

    def _carry(self, client: socket.socket, caller: str) -> None:
        with contextlib.suppress(OSError), client:
            if self._waited_for_repair(caller):
                return
            with socket.create_connection((self.host, self.server_port)) as server:
                while not self._closed.is_set():
                    ready = select.select([client, server], [], [], LOOK_SECONDS)[0]
                    if self._waited_for_repair(caller):
                        return
                    for source in ready:
                        if not (data := source.recv(1 << 16)):
                            return
                        (server if source is client else client).sendall(data)

    def _waited_for_repair(self, caller: str) -> bool:
        broken = self._cut_off(caller)
        while self._cut_off(caller) and not self._closed.wait(LOOK_SECONDS):
            pass
        return broken


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port
