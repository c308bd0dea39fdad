"""Gateways and workers of earlier versions, from their wheels, run with today's: what docs/operation.md promises."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from patchforge.service.queue import keys
from patchforge.service.soak.versions import TODAY, Version, other_version
from tests import released
from tests.faults.gateways import LONG, SHORT, Gateway
from tests.faults.harness import IDLE, Stack
from tests.processes import Process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Pair:
    """One gateway and one worker, of which one is older than the other."""

    stack: Stack
    versions: dict[str, Version]
    protocol: int
    """Of the older one."""
    gateway: Gateway
    worker: Process

    @property
    def old_worker(self) -> bool:
        return self.versions["worker"] is not TODAY

    @property
    def running(self) -> list[Process]:
        return [self.gateway, self.worker]


@pytest.fixture(scope="module", params=[(p, role) for p in released.WHEELS for role in ("gateway", "worker")], ids=str)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle_dir: Path) -> Iterator[Pair]:
    """The worker takes one job at a time, and its death fails that job."""
    protocol, role = request.param
    folder = tmp_path_factory.mktemp("versions")
    older = other_version(released.WHEELS[protocol], folder / "older")
    versions = {"gateway": TODAY, "worker": TODAY} | {role: older}
    settings = {"claim_idle_seconds": IDLE, "max_running": 1, "max_attempts": 1}
    with Stack(folder, readable_by_all(bundle_dir, folder / "bundles"), **settings) as stack:
        worker = stack.launch_worker(version=versions["worker"])
        gateway = stack.start_gateway(version=versions["gateway"])
        worker.wait_for("worker ready")
        gateway.await_ready()
        yield Pair(stack, versions, protocol, gateway, worker)


@pytest.fixture(autouse=True)
def unharmed(pair: Pair) -> Iterator[None]:
    yield
    for process in pair.running:
        assert process.running, f"{process.name} has ended"
        assert process.stray == [], f"a traceback of {process.name}?"
        assert [line for line in process.log if "exception" in line] == []


def readable_by_all(bundles: Path, folder: Path) -> Path:
    """Copies bundles without the fields of bundle.json that protocol 0 does not know."""
    shutil.copytree(bundles, folder)
    for path in folder.glob("tiny-*/bundle.json"):
        manifest = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({name: manifest[name] for name in manifest if name not in ("examples", "sizes")}))
    return folder


def kinds(gateway: Gateway, job_id: str) -> list[str]:
    return [event.type for event in gateway.events(job_id)]


def test_a_picture_and_its_events(pair: Pair) -> None:
    job_id = pair.gateway.submit(SHORT | {"n": 2})
    seen = kinds(pair.gateway, job_id)
    assert (seen[0], seen[1], seen[-1]) == ("queued", "started", "completed")
    assert {"preview", "image"} <= set(seen)
    assert pair.gateway.ended(job_id)["status"] == "completed"
    assert pair.gateway.picture(job_id, 1).shape == (32, 32, 3)
    picture = {"model": "tiny-class", "prompt": "cat", "n": 1}
    answer = pair.gateway.http.post("/v1/images/generations", json=picture)
    assert answer.status_code == 200, answer.text


def test_every_sampler(pair: Pair) -> None:
    names = ("adaptive", "dual_loop", "euler", "heun", "look_ahead", "multistep")
    jobs = [pair.gateway.submit(sampler=name) for name in names]
    assert [pair.gateway.ended(job_id)["status"] for job_id in jobs] == ["completed"] * len(names)


def test_a_stream_over_grpc(pair: Pair) -> None:
    wanted = pb.Generation(class_label="dog", steps=4, seed=1, previews=True)
    with pair.gateway.grpc() as stub:
        replies = list(stub.GenerateImage(pb.GenerateImageRequest(generation=wanted)))
        seen = [reply.event.WhichOneof("event") for reply in replies]
        assert (seen[0], seen[-1]) == ("queued", "completed")
        assert any(reply.event.image.data for reply in replies)
        watched = list(stub.WatchJob(pb.WatchJobRequest(job_id=replies[0].job_id)))
    assert [reply.event.id for reply in watched] == [reply.event.id for reply in replies]


def test_cancels_and_a_deadline(pair: Pair) -> None:
    gateway = pair.gateway
    running = gateway.submit(LONG)
    gateway.until(running, "preview")
    waiting, late = gateway.submit(), gateway.submit(deadline_seconds=0.5)
    assert gateway.cancel(waiting)["status"] == "cancelled"
    assert gateway.ended(late)["status"] == "expired"
    gateway.cancel(running)
    assert gateway.ended(running)["status"] == gateway.ended(waiting)["status"] == "cancelled"
    assert kinds(gateway, waiting) == ["queued", "cancelled"]


def test_the_same_submit_twice(pair: Pair) -> None:
    assert pair.gateway.submit(key="one key") == pair.gateway.submit(key="one key")


def test_what_the_worker_cannot_do_or_read(pair: Pair) -> None:
    """Protocol 0 can neither be asked for more than it does, nor read what it does not know."""
    gateway = pair.gateway
    if pair.protocol == 0:
        answer = gateway.post(SHORT | {"budget": 100})
        assert answer.status_code == (501 if pair.old_worker else 422), answer.text
        return
    running = gateway.submit(LONG)
    gateway.until(running, "started")
    job_id = gateway.submit()
    with pair.stack.redis as redis:
        known = json.loads(redis.hget(keys.job(job_id), "request") or "")
        redis.hset(keys.job(job_id), "request", json.dumps(known | {"sampler": {"name": "of a later version"}}))
    gateway.cancel(running)
    [end] = [event.data for event in gateway.events(job_id) if event.type == "failed"]
    assert end["error"]["code"] == "unsupported"
    assert "of a later version" not in pair.worker.transcript() + json.dumps(end)


def test_a_worker_dies(pair: Pair) -> None:
    gateway = pair.gateway
    fatal = gateway.submit(LONG)
    gateway.until(fatal, "preview")
    pair.worker.kill()
    pair.worker = pair.stack.start_worker(version=pair.versions["worker"])
    ended = gateway.ended(fatal)
    assert (ended["status"], ended["error"]["code"]) == ("failed", "dead_letter")
    assert gateway.ended(gateway.submit())["status"] == "completed"
