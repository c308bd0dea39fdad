"""Real gateways, workers and a queue server to break: start them, follow their logs and jobs, and harm them.

Everything a test starts belongs to one `Stack` and dies with it, or with pytest. Nothing here sleeps to synchronise:
a test waits for a log line, an event of a job, or an answer.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from redis import Redis

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.soak.versions import TODAY, Version
from tests.faults.gateways import Gateway
from tests.patience import PATIENCE
from tests.processes import Process

IDLE = 3.0  # seconds of silence after which the fixture `stack` considers a worker dead
P = TypeVar("P", bound=Process)


class Stack:
    """A queue server and the processes around it. `start_…` adds processes; leaving the block ends all of them."""

    def __init__(self, data: Path, bundles: Path, **settings: Any) -> None:
        """`settings` apply to every process, and have the names of `patchforge.service.settings`."""
        self.server = EmbeddedServer(data)
        self.curtain = data / "curtain"
        self._bundles = bundles
        self._settings = settings
        self._processes: list[Process] = []

    def __enter__(self) -> Self:
        self.server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.close()
            print(process.transcript())  # pytest shows it if the test failed
        if self.server.running:
            os.kill(self.server.pid, signal.SIGCONT)  # it may still be paused
        self.server.stop()

    @property
    def redis(self) -> Redis:
        """A plain client, to inspect and to break things."""
        return Redis.from_url(self.server.url, socket_timeout=PATIENCE)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Jobs on a `held_device` pause after their first preview until the block ends."""
        self.curtain.touch()
        try:
            yield
        finally:
            self.curtain.unlink()

    def kill_server(self) -> None:
        """Kills the server. `server.start()` starts it again on the same port, with the data in its log."""
        self.server.kill()
        self.server.stop()

    def start_gateway(self, script: str | None = None, *, version: Version = TODAY, **settings: Any) -> Gateway:
        """Starts a gateway and waits until its ports are open. It is ready when a worker is."""
        gateway = self._launch(Gateway, "gateway", script, settings, version)
        gateway.await_ports()
        return gateway

    def launch_worker(self, script: str | None = None, *, version: Version = TODAY, **settings: Any) -> Process:
        """Starts a worker without waiting. `script` is a module of tests/faults that runs the CLI with some changes."""
        return self._launch(Process, "worker", script, settings, version)

    def start_worker(self, script: str | None = None, *, version: Version = TODAY, **settings: Any) -> Process:
        """Starts a worker and waits until it takes jobs."""
        worker = self.launch_worker(script, version=version, **settings)
        worker.wait_for("worker ready")
        return worker

    def start_pair(self, script: str | None = None, **settings: Any) -> tuple[Gateway, Process]:
        """Starts a gateway and a worker, ready for requests."""
        worker = self.launch_worker(script, **settings)
        gateway = self.start_gateway(None, **settings)
        worker.wait_for("worker ready")
        gateway.await_ready()
        return gateway, worker

    def start_serve(self, data: Path, **settings: Any) -> Gateway:
        """Starts `patchforge serve`, with its own worker and, unless `redis_url` is given, its own queue server."""
        gateway = self._launch(Gateway, "serve", None, {"redis_url": None, **settings, "data_dir": data})
        gateway.await_ports()
        gateway.await_ready()
        return gateway

    def _launch(
        self, kind: type[P], role: str, script: str | None, settings: dict[str, Any], version: Version = TODAY
    ) -> P:
        command = (sys.executable, "-m", f"tests.faults.{script}") if script else version.command
        variables = self._variables(settings) | version.environment
        process = kind(f"{role} {len(self._processes)}", *command, role, **variables)
        self._processes.append(process)
        return process

    def _variables(self, settings: dict[str, Any]) -> dict[str, str]:
        known = {
            "http_port": 0,
            "grpc_port": 0,
            "worker_metrics_port": 0,
            "redis_url": self.server.url,
            "curtain": self.curtain,
            "bundle_dir": self._bundles,
            "models": ["tiny-class"],
            "threads": 1,
            "patch_budget": 4096,  # profiling takes seconds, and its result depends on the machine's load
            "log_json": True,
            "degrade": False,  # the machine's load must not change what is drawn
            **self._settings,
            **settings,
        }
        variables = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for name, value in known.items():
            if value is not None:
                variables[f"PATCHFORGE_{name.upper()}"] = json.dumps(value) if isinstance(value, list) else str(value)
        return variables
