"""The master of a replicated queue server dies, hangs, or is cut off: another one takes over, and no job is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from patchforge.service.soak.replicated import Node, Replicated
from tests.faults.gateways import SHORT, Gateway
from tests.faults.harness import IDLE, Stack
from tests.processes import Process, eventually, stop

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LONG = SHORT | {"steps": 200, "sampler": {"name": "dual_loop", "inner_steps": 4}}  # runs still when the master fails
SWITCHED = "another queue server is the master"


@pytest.fixture
def replicated(tmp_path: Path) -> Iterator[Replicated]:
    """A master that takes writes only while a replica follows it."""
    with Replicated(tmp_path, min_replicas_to_write=1, min_replicas_max_lag=2) as servers:
        yield servers
    for node in servers.nodes:
        print(f"--- {node.folder.name}\n{(node.folder / 'log').read_text()}")  # pytest shows it if the test failed


@pytest.fixture
def stack(tmp_path: Path, bundle_dir: Path, replicated: Replicated) -> Iterator[Stack]:
    """Jobs are accepted when one replica has them."""
    settings = {
        "redis_url": replicated.url,
        "redis_wait_replicas": 1,
        "claim_idle_seconds": IDLE,
        "max_waiting": 10_000,
    }
    with Stack(tmp_path / "stack", bundle_dir, **settings) as running:
        yield running


@contextmanager
def traffic(gateway: Gateway) -> Iterator[list[str]]:
    """Submits jobs from three clients, and lists those that were accepted."""
    accepted: list[str] = []
    quit_ = threading.Event()

    def keep_submitting() -> None:
        while not quit_.wait(0.5):
            answer = gateway.post(SHORT, key=str(uuid4()))
            if answer.status_code == 202:
                accepted.append(answer.json()["id"])
            else:
                assert refused(answer), answer.text

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(keep_submitting) for _ in range(3)]
        try:
            eventually(lambda: len(accepted) >= 10)
            yield accepted
        finally:
            quit_.set()
    assert [client.exception() for client in clients] == [None] * 3


def refused(answer: httpx.Response) -> bool:
    return answer.status_code == 503 and answer.json()["code"] == "unavailable" and "Retry-After" in answer.headers


def kill(replicated: Replicated, master: Node) -> None:
    master.kill()


def hang(replicated: Replicated, master: Node) -> None:
    stop(master.pid)


def part(replicated: Replicated, master: Node) -> None:
    """The gateway and the worker still reach the old master, and a Sentinel that believes in it."""
    replicated.cut_off(master.host)


def test_row_31_the_master_fails(stack: Stack, replicated: Replicated) -> None:
    gateway, worker = stack.start_pair(max_running=2)
    jobs: list[str] = []
    faults: list[Callable[[Replicated, Node], None]] = [kill, hang, part]
    for fault in faults:
        jobs.append(gateway.submit(LONG))
        gateway.until(jobs[-1], "preview")
        old = replicated.master
        before = {process: process.mark() for process in (gateway, worker)}
        with traffic(gateway) as accepted:
            fault(replicated, old)
            new = replicated.new_master(old)
            for process in (gateway, worker):
                process.wait_for(SWITCHED, after=before[process], port=new.port)
            taken(accepted)
            # The old one returns, and believes for a while that it is the master still.
            replicated.repair()
            replicated.settled()
            taken(accepted)
        jobs += accepted

    ended = [gateway.ended(job_id)["status"] for job_id in jobs]
    assert ended == ["completed"] * len(jobs)
    eventually(lambda: gateway.metric("patchforge_queue_replicas") == 2)
    assert len(worker.lines("worker ready")) == 1
    for process in (gateway, worker):
        followed(process, replicated)


def followed(process: Process, replicated: Replicated) -> None:
    """A process went only where most Sentinels went, in this order: never back to a stale master.

    On a busy machine, Sentinels may replace a master more often than the test harms one.
    """
    words = [(sentinel.folder / "log").read_text().splitlines() for sentinel in replicated.sentinels]
    switches = [[int(line.split()[-1]) for line in lines if "+switch-master" in line] for lines in words]
    elected = iter(max(switches, key=len))
    assert all(line["port"] in elected for line in process.lines(SWITCHED)), switches


def taken(accepted: list[str]) -> None:
    """Waits until more jobs are accepted."""
    before = len(accepted)
    eventually(lambda: len(accepted) >= before + 10, "jobs that the master accepts")
