"""The processes of a soak: its own gateways, workers and queue servers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx

from patchforge.service.embedded import free_port, tied_to_parent
from patchforge.service.errors import Unavailable
from patchforge.service.soak.servers import ReplicatedServers, Servers, SingleServer
from patchforge.service.soak.versions import TODAY, Version

READY_SECONDS = 180.0  # a worker may load its models this slowly on a busy machine
STOP_SECONDS = 40.0
RESULT_TTL = 120  # seconds in which the audit must see every job
CLAIM_IDLE = 5.0
DRAIN = 5
STARTED = {"gateway": b'"gateway is listening"', "worker": b'"worker ready"'}  # in the log, in any version


@dataclass
class Member:
    """A gateway or a worker; it keeps its ports and its log when it is started again."""

    name: str
    role: Literal["gateway", "worker"]
    environment: dict[str, str]
    log: Path
    http: str = ""
    grpc: str = ""
    version: Version = TODAY
    life: int = 1
    """Which of its versions this is, if it is replaced."""
    spared: bool = False
    """Never killed, so that its memory can be measured from start to end."""
    disturbed: bool = False
    """A fault is in progress, so the process may be down."""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _began: int = 0

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._began = log.tell()
            command = tied_to_parent([*self.version.command, self.role], signal.SIGKILL)
            self.process = subprocess.Popen(
                command,
                env=self.environment | self.version.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def label(self) -> str:
        """Its name and, if it was replaced, a number."""
        return self.name if self.life == 1 else f"{self.name} ({self.life})"

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        if self.process is None:
            raise Unavailable(f"{self.name} was not started")
        return self.process.pid

    def send(self, signum: signal.Signals) -> None:
        """Send a signal; do nothing if the process has ended."""
        if self.process is not None:
            self.process.send_signal(signum)

    async def wait(self) -> int | None:
        """Wait until it ends; its exit status, or None if it does not end in time."""
        give_up = time.monotonic() + STOP_SECONDS
        while True:
            status = None if self.process is None else self.process.poll()
            if status is not None or time.monotonic() > give_up:
                return status
            await asyncio.sleep(0.05)

    async def started(self) -> bool:
        """Wait until its log says that it serves; False if it ends before, or is not ready in time."""
        give_up = time.monotonic() + READY_SECONDS
        while self.running and time.monotonic() < give_up:
            with self.log.open("rb") as log:
                log.seek(self._began)
                if STARTED[self.role] in log.read():
                    return True
            await asyncio.sleep(0.2)
        return False

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Fleet:
    """All processes; entry starts and exit ends them. Use it from the main thread: they end with their thread."""

    def __init__(
        self,
        folder: Path,
        bundle_dir: Path,
        *,
        sentinels: bool = False,
        version: Version = TODAY,
        gateways: int = 2,
        workers: int = 2,
    ) -> None:
        """`sentinels`: the queue server has replicas and Sentinels. `version` is that of all gateways and workers."""
        self.folder = folder
        self.servers: Servers = ReplicatedServers(folder) if sentinels else SingleServer(folder)
        self.server_disturbed = False
        self.servers.start()
        self.gateways = [self._member("gateway", bundle_dir, number) for number in range(1, gateways + 1)]
        self.workers = [self._member("worker", bundle_dir, number) for number in range(1, workers + 1)]
        for first in (self.gateways[0], self.workers[0]):
            first.spared = True
        for member in self.members:
            member.version = version

    @property
    def members(self) -> list[Member]:
        return [*self.gateways, *self.workers]

    async def __aenter__(self) -> Fleet:
        try:
            for member in self.members:
                member.start()
            await self.wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    async def __aexit__(self, *reason: object) -> None:
        for member in self.members:
            member.send(signal.SIGTERM)
        for member in self.members:
            await member.wait()
        self.close()

    async def wait_until_ready(self) -> None:
        """Wait until every gateway accepts requests.

        Raises:
            Unavailable: a gateway was not ready in time.
        """
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            for gateway in self.gateways:
                await self._wait_for(client, gateway)

    async def _wait_for(self, client: httpx.AsyncClient, gateway: Member) -> None:
        give_up = time.monotonic() + READY_SECONDS
        while time.monotonic() < give_up:
            try:
                if (await client.get(f"{gateway.http}/readyz")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.2)
        raise Unavailable(f"{gateway.name} was not ready in {READY_SECONDS:.0f} s; see {gateway.log}")

    async def scrape(self) -> None:
        """Have every gateway compute its metrics."""
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client:
            for gateway in self.gateways:
                with contextlib.suppress(httpx.TransportError):
                    await client.get(f"{gateway.http}/metrics")

    async def restore(self) -> None:
        """Resume paused processes, and start killed ones."""
        await self.servers.restore()
        self.server_disturbed = False
        for member in self.members:
            member.send(signal.SIGCONT)
            member.disturbed = False
            if not member.running:
                member.start()

    def close(self) -> None:
        for member in self.members:
            member.close()
        self.servers.stop()

    def _member(self, role: Literal["gateway", "worker"], bundle_dir: Path, number: int) -> Member:
        http, grpc = free_port(), free_port()
        settings = {
            "REDIS_URL": self.servers.url,
            "HOST": "127.0.0.1",
            "HTTP_PORT": http,
            "GRPC_PORT": grpc,
            "WORKER_METRICS_PORT": 0,
            "BUNDLE_DIR": bundle_dir.resolve(),
            "RESULT_TTL_SECONDS": RESULT_TTL,
            "IDEMPOTENCY_TTL_SECONDS": RESULT_TTL,
            "CLAIM_IDLE_SECONDS": CLAIM_IDLE,
            "DRAIN_SECONDS": DRAIN,
            "MAX_WAITING": 24,
            "LOG_JSON": "true",
            "THREADS": os.environ.get("PATCHFORGE_THREADS", "1"),
            **self.servers.settings,
        }
        # Leave out the settings of the user's own service: keys, certificate, models.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PATCHFORGE_")}
        environment = kept | {f"PATCHFORGE_{name}": str(value) for name, value in settings.items()}
        name = f"{role}-{number}"
        log = self.folder / f"{name}.log"
        return Member(name, role, environment, log, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}")
