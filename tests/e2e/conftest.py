"""`patchforge serve` as a user starts it, once for all end-to-end tests: real processes, shipped models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue

import pytest

ROOT = Path(__file__).parents[2]
READY_SECONDS = 120


@dataclass
class Served:
    """A running `patchforge serve`."""

    process: subprocess.Popen[str]
    http: str
    grpc: str
    log: list[dict[str, object]] = field(default_factory=list)

    def children(self) -> list[int]:
        """Process ids of the worker and the queue server."""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in listed.split()]

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def start(data_dir: Path, cwd: Path = ROOT, **settings: str) -> Served:
    """Start on free ports and wait until requests can be served."""
    environment = {key: value for key, value in os.environ.items() if key != "REDIS_URL"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "PATCHFORGE_HTTP_PORT": "0",
        "PATCHFORGE_GRPC_PORT": "0",
        "PATCHFORGE_WORKER_METRICS_PORT": "0",
        "PATCHFORGE_DATA_DIR": str(data_dir),
        "PATCHFORGE_LOG_JSON": "true",
        "PATCHFORGE_PREVIEW_SHARE": "1",  # tests see previews however fast or slow the machine is
        **settings,
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "service.cli", "serve"], cwd=cwd, env=environment, stderr=subprocess.PIPE, text=True
    )
    lines: Queue[dict[str, object] | None] = Queue()
    threading.Thread(target=_read_log, args=(process, lines), daemon=True).start()
    served = Served(process, "", "")
    while True:
        line = lines.get(timeout=READY_SECONDS)
        if line is None:
            raise RuntimeError(f"serve ended with {process.wait()}: {served.log}")
        served.log.append(line)
        if line["event"] == "gateway is listening":
            served.http, served.grpc = str(line["http"]), str(line["grpc"])
        if line["event"] == "ready for requests":
            return served


def _read_log(process: subprocess.Popen[str], lines: Queue[dict[str, object] | None]) -> None:
    if process.stderr is not None:
        with process.stderr as stream:
            for text in stream:
                if text.startswith("{"):
                    lines.put(json.loads(text))
    lines.put(None)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server most tests share."""
    running = start(tmp_path_factory.mktemp("data"))
    yield running
    running.process.kill()
    running.process.wait()
