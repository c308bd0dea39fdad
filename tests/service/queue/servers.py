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
from tests.patience import PATIENCE
from tests.processes import eventually, launch


@dataclass(frozen=True)
class Server:
    """A running server on `port`."""

    port: int
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def client(self) -> Redis:
        return Redis(port=self.port, host="127.0.0.1", socket_timeout=PATIENCE)

    def answers(self) -> bool:
        assert self.process.poll() is None, "the server ended"
        with contextlib.suppress(RedisError, OSError), self.client() as client:
            return bool(client.ping())
        return False


@contextlib.contextmanager
def served(folder: Path, *options: str | int, patient: bool = True, port: int = 0) -> Iterator[Server]:
    """Runs a server with these options; `patient` waits until it has loaded its data."""
    port = port or free_port()
    folder.mkdir(exist_ok=True)
    kept = "--maxmemory-policy", "noeviction", "--dir", folder, "--logfile", folder / "log"
    process = launch(find_binary(), "--port", str(port), *kept, *map(str, options))
    server = Server(port, process)
    try:
        if patient:
            eventually(server.answers, "the server")
        yield server
    finally:
        process.kill()
        process.wait()
