"""A gateway whose log cannot be written: it serves as ever, and counts the lines that were lost."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from patchforge.service.embedded import free_port
from tests.faults.gateway_kit import APPLE, Stage, raw
from tests.patience import PATIENCE
from tests.processes import PATCHFORGE, Stream, eventually, launch

CLOSED = ("/bin/sh", "-c", 'exec "$@" 2>&-', "sh")


@contextmanager
def gateway_with(stage: Stage, *before: str, stderr: Stream = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A gateway that writes its log to `stderr`, and its URL."""
    port = free_port()
    variables = stage._variables({"http_port": port})
    process = launch(*before, *PATCHFORGE, "gateway", stderr=stderr, **variables)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=PATIENCE).status_code == 200
    except httpx.TransportError:
        return False


def works(process: subprocess.Popen[str], url: str) -> float:
    """Serves a request, and stops when told; the number of log lines that it lost until then."""
    eventually(lambda: answers(url) or process.poll() is not None, "the gateway to be ready")
    assert process.poll() is None
    accepted = httpx.post(f"{url}/v1/jobs", json=APPLE, timeout=PATIENCE)
    assert accepted.status_code == 202
    metrics = httpx.get(f"{url}/metrics", params={"workers": False}, timeout=PATIENCE).text
    name = 'patchforge_log_lines_dropped_total{process="gateway"} '
    [lost] = [float(line.removeprefix(name)) for line in metrics.splitlines() if line.startswith(name)]
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    return lost


def test_a_full_disk(stage: Stage) -> None:
    with Path("/dev/full").open("wb") as full, gateway_with(stage, stderr=full) as (process, url):
        assert works(process, url) > 0


def test_a_reader_that_is_gone(stage: Stage) -> None:
    reading, writing = os.pipe()
    with gateway_with(stage, stderr=writing) as (process, url):
        os.close(writing)
        os.read(reading, 1)  # as `| head -1` does
        os.close(reading)
        assert works(process, url) > 0


def test_a_closed_stderr(stage: Stage) -> None:
    with gateway_with(stage, *CLOSED) as (process, url):
        assert works(process, url) == 0  # they go to the null device
    with gateway_with(stage, *CLOSED) as (process, url):
        eventually(lambda: answers(url))
        for number in (0, 1, 2):
            assert not os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("socket:")
        assert os.readlink(f"/proc/{process.pid}/fd/2") == os.devnull


def test_a_reader_that_does_not_read(stage: Stage) -> None:
    """Once the pipe is full, who writes waits: a supervisor that hangs, or Ctrl-S in a terminal."""
    reading, writing = os.pipe()
    try:
        with gateway_with(stage, stderr=writing) as (process, url):
            os.close(writing)
            eventually(lambda: answers(url))
            stage_gateway = type("", (), {"url": url})
            for _ in range(600):
                with raw(stage_gateway) as connection:
                    connection.sendall(b"nonsense\r\n\r\n")
                    assert b" 400 " in connection.recv(4096)
            works(process, url)
    finally:
        os.close(reading)
