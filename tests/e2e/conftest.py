"""`patchforge serve` as a user starts it, shared by all end-to-end tests: real processes, shipped models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hostile import imported_from, write_hostile
from tests.processes import PATCHFORGE, ROOT, Process


class Served(Process):
    """A running `patchforge serve` and its addresses."""

    http = grpc = ""


def start(data_dir: Path, cwd: Path = ROOT, **settings: str) -> Served:
    """Start on free ports and wait until requests can be served."""
    usual = {
        "PATCHFORGE_HTTP_PORT": "0",
        "PATCHFORGE_GRPC_PORT": "0",
        "PATCHFORGE_WORKER_METRICS_PORT": "0",
        "PATCHFORGE_DATA_DIR": str(data_dir),
        "PATCHFORGE_LOG_JSON": "true",
        "PATCHFORGE_THREADS": "1",
        "PATCHFORGE_DEGRADE": "false",  # nor does its load change what is drawn
        "PATCHFORGE_PREVIEW_SHARE": "1",  # tests see previews on any machine
    }
    served = Served("serve", *PATCHFORGE, "serve", cwd=cwd, **usual | settings)
    listening = served.wait_for("gateway is listening")
    served.http, served.grpc = listening["http"], listening["grpc"]
    served.wait_for("ready for requests")
    return served


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The server that most tests share. Its folder has hostile files, which no process may import."""
    folder = write_hostile(tmp_path_factory.mktemp("cwd") / "theirs")
    running = start(tmp_path_factory.mktemp("data"), cwd=folder)
    yield running
    running.close()
    assert imported_from(folder) == []
