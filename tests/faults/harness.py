"""Real gateways, workers and a queue server to break: start them, follow their logs and jobs, hurt them.

Everything a test starts belongs to one ``Stack`` and dies with it, or with pytest. Nothing here sleeps to synchronise:
a test waits for a log line, an event of a job, or an answer.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from redis import Redis

from service.embedded import EmbeddedServer
from tests.faults.gateways import Gateway
from tests.faults.processes import PATIENCE, Process

IDLE = 3.0  # seconds of silence after which a worker of the fixture `stack` is taken for dead
P = TypeVar("P", bound=Process)


class Stack:
    """A queue server and the processes around it. Starts empty; ``start_…`` adds to it; leaving ends them all."""

    def __init__(self, data: Path, bundles: Path, **settings: Any) -> None:
        """``settings`` are for every process, named as in ``service.settings``."""
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
            os.kill(self.server.pid, signal.SIGCONT)  # in case it was left paused
        self.server.stop()

    @property
    def redis(self) -> Redis:
        """A plain client, to look and to break things."""
        return Redis.from_url(self.server.url, socket_timeout=PATIENCE)

    @contextmanager
    def device_held(self) -> Iterator[None]:
        """Jobs on a `held_device` stand still once they have shown a preview, and go on afterwards."""
        self.curtain.touch()
        try:
            yield
        finally:
            self.curtain.unlink()

    def kill_server(self) -> None:
        """SIGKILL; ``server.start()`` brings it back on the same port with what its log holds."""
        self.server.kill()
        self.server.stop()

    def start_gateway(self, script: str | None = None, **settings: Any) -> Gateway:
        """Returns once its ports are open; it is ready when a worker is."""
        gateway = self._launch(Gateway, "gateway", script, settings)
        gateway.await_ports()
        return gateway

    def launch_worker(self, script: str | None = None, **settings: Any) -> Process:
        """Returns at once; ``script`` is a module of tests/faults that alters a thing or two and then runs the cli."""
        return self._launch(Process, "worker", script, settings)

    def start_worker(self, script: str | None = None, **settings: Any) -> Process:
        """Returns once it takes jobs."""
        worker = self.launch_worker(script, **settings)
        worker.wait_for("worker ready")
        return worker

    def start_pair(self, script: str | None = None, **settings: Any) -> tuple[Gateway, Process]:
        """A gateway and a worker, ready for requests."""
        worker = self.launch_worker(script, **settings)
        gateway = self.start_gateway(None, **settings)
        worker.wait_for("worker ready")
        gateway.await_ready()
        return gateway, worker

    def start_serve(self, data: Path, **settings: Any) -> Gateway:
        """`patchforge serve`, with a worker of its own and, unless ``redis_url`` is given, a queue server."""
        gateway = self._launch(Gateway, "serve", None, {"redis_url": None, **settings, "data_dir": data})
        gateway.await_ports()
        gateway.await_ready()
        return gateway

    def _launch(self, kind: type[P], role: str, script: str | None, settings: dict[str, Any]) -> P:
        arguments = ["-m", f"tests.faults.{script}" if script else "service.cli", role]
        process = kind(f"{role} {len(self._processes)}", arguments, self._environment(settings))
        self._processes.append(process)
        return process

    def _environment(self, settings: dict[str, Any]) -> dict[str, str]:
        known = {
            "http_port": 0,
            "grpc_port": 0,
            "worker_metrics_port": 0,
            "redis_url": self.server.url,
            "curtain": self.curtain,
            "bundle_dir": self._bundles,
            "models": ["tiny-class"],
            "threads": 1,
            "patch_budget": 4096,  # not profiled, which takes seconds and depends on what else the machine does
            "log_json": True,
            **self._settings,
            **settings,
        }
        ours = ("REDIS_URL", "PATCHFORGE_")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        for name, value in known.items():
            if value is not None:
                environment[f"PATCHFORGE_{name.upper()}"] = json.dumps(value) if isinstance(value, list) else str(value)
        return environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
