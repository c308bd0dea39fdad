"""Queue servers with any configuration."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from patchforge.service.embedded import find_binary, free_port
from patchforge.service.soak.replicated import Tls
from tests.patience import PATIENCE
from tests.processes import eventually, launch


@dataclass(frozen=True)
class Server:
    """A running server on `port`."""

    port: int
    process: subprocess.Popen[str]
    tls: Tls | None = None

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}"

    def client(self) -> Redis:
        secure = self.tls.client() if self.tls else {}
        return Redis(port=self.port, host="127.0.0.1", socket_timeout=PATIENCE, **secure)

    def answers(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        with contextlib.suppress(RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False


@contextlib.contextmanager
def served(folder: Path, *options: str | int, patient: bool = True, tls: Tls | None = None) -> Iterator[Server]:
    """Runs a server with these options; `patient` waits until it has loaded its data."""
    port = free_port()
    folder.mkdir(exist_ok=True)
    settings = {"port": port, "maxmemory-policy": "noeviction", "dir": folder, "logfile": folder / "log"}
    settings |= tls.server(port) if tls else {}
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    process = launch(tls.binary if tls else find_binary(), *words, *map(str, options))
    server = Server(port, process, tls)
    try:
        if patient:
            eventually(server.answers, "the server")
        yield server
    finally:
        process.kill()
        process.wait()
