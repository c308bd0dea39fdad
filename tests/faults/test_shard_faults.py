"""Fault row 34: of several queue servers, one is killed or silent."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patchforge.service.embedded import EmbeddedServer
from patchforge.service.queue.ids import server_of
from tests.faults.gateways import SHORT, Gateway
from tests.faults.harness import Stack
from tests.processes import eventually

LONG = SHORT | {"steps": 200, "sampler": {"name": "dual_loop", "inner_steps": 4}}
AWAY = "queue server cannot be used"


def sent(gateway: Gateway, body: dict[str, Any]) -> str:
    """Submits without a key, so that the job may go to any server."""
    answer = gateway.post(body)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


@pytest.fixture
def second(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path / "second") as server:
        yield server
        if server.running:
            os.kill(server.pid, signal.SIGCONT)  # it may still be paused


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["killed", "silent"])
def test_row_34_one_of_two_queue_servers_is_away(stack: Stack, second: EmbeddedServer, fault: str) -> None:
    urls = [stack.server.url, second.url]
    gateway, worker = stack.start_pair(max_running=4, redis_urls=urls)
    running = next(job for job in iter(lambda: sent(gateway, LONG), None) if server_of(job) == 1)
    gateway.until(running, "preview")
    before = worker.mark()
    if fault == "killed":
        second.kill()
        second.stop()
    else:
        os.kill(second.pid, signal.SIGSTOP)
    worker.wait_for(AWAY, after=before, server=1)
    # Whatever is not there works, its server's jobs get 503, and nothing else fails.
    assert gateway.http.get(f"/v1/jobs/{running}").status_code == 503
    eventually(lambda: gateway.metric("patchforge_queue_up", server="1") == 0)
    assert gateway.metric("patchforge_queue_up", server="0") == 1
    gateway.await_ready()
    others = [sent(gateway, SHORT) for _ in range(6)]
    assert {server_of(job) for job in others} == {0}
    assert {gateway.ended(job)["status"] for job in others} == {"completed"}

    if fault == "killed":
        second.start()
    else:
        os.kill(second.pid, signal.SIGCONT)
    eventually(lambda: gateway.http.get(f"/v1/jobs/{running}").status_code == 200)
    assert gateway.ended(running)["status"] == "completed"
    eventually(lambda: gateway.metric("patchforge_queue_up", server="1") == 1)
    eventually(lambda: server_of(sent(gateway, SHORT)) == 1)
