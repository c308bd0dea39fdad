"""A live gateway and worker that have handled every kind of request, and what Prometheus finds at their ports."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from patchforge.service.embedded import free_port
from patchforge.service.messages.samplers import SAMPLERS
from patchforge.service.pb.patchforge.v1 import image_service_pb2 as pb
from tests.faults.gateways import Gateway
from tests.faults.harness import Stack
from tests.object_store import ObjectServer
from tests.patience import PATIENCE

collect_ignore = [] if sys.platform == "linux" else ["test_queries.py", "test_tracing.py"]  # processes watched by /proc
ADDED_BY_PROMETHEUS = {"job", "instance"}


@dataclass
class Live:
    """The processes' addresses, and how to make them work."""

    gateway: Gateway
    worker_metrics: str

    def traffic(self) -> None:
        """Sends jobs with every sampler and both models, over REST and gRPC, and some that are refused."""
        jobs = [
            self.gateway.submit(
                {"model": "tiny-class", "class_label": "cat", "sampler": sampler, "steps": 4, "guidance": 2.0}
            )
            for sampler in SAMPLERS
        ]
        jobs.append(self.gateway.submit({"model": "tiny-text", "prompt": "a cat"}))
        for job in jobs:
            assert self.gateway.ended(job)["status"] == "completed"
        self.gateway.http.get("/v1/jobs/none")
        with self.gateway.grpc() as stub:
            wanted = pb.Generation(model="tiny-class", class_label="dog")
            assert [answer.event for answer in stub.GenerateImage(pb.GenerateImageRequest(generation=wanted))]

    def expositions(self) -> list[str]:
        """Scrapes like deploy/prometheus: the gateway without its workers, and the worker itself."""
        return [
            self.gateway.http.get("/metrics", params={"workers": "false"}).text,
            httpx.get(self.worker_metrics, timeout=PATIENCE).text,
        ]


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory, bundle_dir: Path, object_server: ObjectServer) -> Iterator[Live]:
    port, settings = free_port(), {"models": ["tiny-class", "tiny-text"]}
    with Stack(tmp_path_factory.mktemp("live"), bundle_dir, **settings) as stack:
        with pytest.MonkeyPatch.context() as patch:  # for these processes, and for no later test
            for name, value in object_server.variables.items():
                patch.setenv(name, value)
            apart = object_server.variables["PATCHFORGE_RESULTS"]
            gateway, _ = stack.start_pair(worker_metrics_port=port, results=apart)
        running = Live(gateway, f"http://127.0.0.1:{port}/metrics")
        running.traffic()
        yield running


@pytest.fixture(scope="session")
def exposed(live: Live) -> dict[str, set[str]]:
    """Returns name → labels of each series that the live processes expose, and of those that only GPU workers have."""
    from patchforge.service.worker.device_metrics import DeviceMemory

    gpu = CollectorRegistry()
    gpu.register(DeviceMemory(lambda: (1, 2, 3)))
    labels: dict[str, set[str]] = defaultdict(set, up=set(ADDED_BY_PROMETHEUS))
    for text in [*live.expositions(), generate_latest(gpu).decode()]:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels[sample.name] |= {*sample.labels} | ADDED_BY_PROMETHEUS
    return dict(labels)
