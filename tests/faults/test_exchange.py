"""A model is exchanged while it is in use: its new bundle comes, its old one goes, and no request notices."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from patchforge.model.storage.bundle import Bundle, open_bundle, write_bundle
from tests.faults.gateways import Gateway
from tests.faults.harness import Stack
from tests.processes import eventually

CALLERS = 3


@pytest.fixture
def old(bundle_dir: Path) -> Bundle:
    return open_bundle(bundle_dir / "tiny-class")


@pytest.fixture
def new(old: Bundle, tmp_path: Path) -> Bundle:
    """The model after more training: other weights under the same name."""
    weights = {name: 1.01 * tensor for name, tensor in load_file(old.weights).items()}
    manifest = old.manifest.model_copy(update={"created": old.manifest.created + 1})
    write_bundle(tmp_path / "new" / "tiny-class", manifest, weights, autoencoder=old.autoencoder)
    return open_bundle(tmp_path / "new" / "tiny-class")


class Traffic:
    """Callers who ask for a picture, wait for it, and ask for the next."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.drawn: list[dict[str, Any]] = []
        """The jobs that ended, in this order."""
        self.refused: list[str] = []
        self._stop = threading.Event()

    @contextmanager
    def flowing(self) -> Iterator[None]:
        with ThreadPoolExecutor(CALLERS) as callers:
            going = [callers.submit(self._go_on) for _ in range(CALLERS)]
            try:
                yield
            finally:
                self._stop.set()
            for each in going:
                each.result()

    def await_more(self, digest: str, jobs: int = 4) -> None:
        """Waits until this bundle has drawn some more pictures."""
        already = self.digests().count(digest)
        eventually(lambda: self.digests().count(digest) >= already + jobs, f"pictures of {digest}")

    def digests(self) -> list[str]:
        return [job["report"]["model_digest"] for job in list(self.drawn) if job["status"] == "completed"]

    def _go_on(self) -> None:
        while not self._stop.is_set():
            answer = self.gateway.post({"class_label": "cat", "sampler": "euler", "steps": 4})
            if answer.status_code != 202:
                self.refused.append(answer.text)
                return
            self.drawn.append(self.gateway.ended(answer.json()["id"]))


def test_no_request_is_lost_while_a_bundle_replaces_another(stack: Stack, old: Bundle, new: Bundle) -> None:
    gateway, leaving = stack.start_pair()
    traffic = Traffic(gateway)
    with traffic.flowing():
        traffic.await_more(old.digest)
        stack.start_worker(bundle_dir=new.folder.parent)
        traffic.await_more(new.digest)
        gateway.wait_for("workers serve different bundles under one name", model="tiny-class")
        gateway.await_metric(2, "patchforge_model_digests", model="tiny-class")
        for bundle in (old, new):
            pinned = [gateway.submit(model_digest=bundle.digest) for _ in range(4)]
            assert {gateway.ended(job)["report"]["model_digest"] for job in pinned} == {bundle.digest}
        assert leaving.terminate() == 0
        gone_at = len(traffic.drawn)
        gateway.wait_for("workers serve one bundle under this name again", model="tiny-class")
        traffic.await_more(new.digest)

    assert traffic.refused == []
    assert {job["status"] for job in traffic.drawn} == {"completed"}
    assert {job["attempt"] for job in traffic.drawn} == {1}
    assert {*traffic.digests()} == {old.digest, new.digest}
    assert {*traffic.digests()[gone_at + CALLERS :]} == {new.digest}, "each caller may have seen one end late"
    gone = gateway.post({"class_label": "cat", "model_digest": old.digest})
    assert (gone.status_code, gone.json()["field"]) == (404, "model_digest")
    assert "claim lost" not in {line["event"] for line in leaving.log}


def test_a_pinned_job_waits_for_its_bundle_when_its_worker_dies(stack: Stack, old: Bundle, new: Bundle) -> None:
    gateway, dying = stack.start_pair("held_device")
    with stack.device_held():
        job_id = gateway.submit(model_digest=old.digest)
        gateway.until(job_id, "preview")
        dying.kill()
    other = stack.start_worker(bundle_dir=new.folder.parent)
    later = gateway.submit()
    assert gateway.ended(later)["report"]["model_digest"] == new.digest
    assert not other.lines("job started", job=job_id)
    stack.start_worker()
    job = gateway.ended(job_id)
    assert (job["attempt"], job["report"]["model_digest"]) == (2, old.digest)
    assert not other.lines("job started", job=job_id)
