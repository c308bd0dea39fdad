"""What Prometheus answers to the autoscalers' own queries, in every state of the table in docs/operation.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.deploy.prometheus import ask, running_prometheus
from tests.deploy.queries import ROOT, of_scaling
from tests.faults.gateways import Gateway
from tests.faults.harness import Stack
from tests.processes import Process, eventually

TEXT, CLASS = "emoji-text", "emoji-class"
QUERIES = {
    name: query.text
    for query in of_scaling()
    if (name := query.where.removeprefix("autoscaler of worker-")) in (TEXT, CLASS)
}
TABLE = re.findall(
    r"^\| (\d) \| [^|]+ \| (\d+|none) \| (\d+|none) \|",
    (ROOT / "docs" / "operation.md").read_text("utf-8"),
    re.MULTILINE,
)
EXPECTED = {int(state): {TEXT: first, CLASS: second} for state, first, second in TABLE}


class Cluster:
    """Two gateways, workers that come and go, and a Prometheus that sees only the gateways."""

    def __init__(self, stack: Stack, gateways: list[Gateway], prometheus: httpx.Client) -> None:
        self.stack = stack
        self.gateways = gateways
        self.prometheus = prometheus
        self._workers: list[Process] = []

    def start_worker(self, models: str, holds: int) -> Process:
        command = sys.executable, "-m", "tests.deploy.holding_worker", models, str(holds)
        variables = {"PATCHFORGE_REDIS_URL": self.stack.server.url, "PATCHFORGE_CLAIM_IDLE_SECONDS": "1"}
        worker = Process(f"holding {holds} of {models}", *command, **variables)
        self._workers.append(worker)
        worker.wait_for("worker ready")
        return worker

    def submit(self, model: str, jobs: int) -> list[str]:
        return [self.gateways[0].submit({"model": model, "prompt": "x"}) for _ in range(jobs)]

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
            print(worker.transcript())

    def answers(self) -> dict[str, str]:
        """What each target's query gives, as the table says it."""
        found = {model: ask(self.prometheus, query) for model, query in QUERIES.items()}
        return {model: f"{float(one[0]['value'][1]):.0f}" if one else "none" for model, one in found.items()}

    def await_value(self, value: float, query: str) -> None:
        eventually(lambda: [float(each["value"][1]) for each in ask(self.prometheus, query)] == [value], query)

    def check(self, state: int) -> None:
        eventually(lambda: self.answers() == EXPECTED[state], f"state {state}: {EXPECTED[state]}")


@pytest.fixture
def cluster(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Stack(tmp_path, tmp_path, remember_seconds=3600, claim_idle_seconds=1) as stack:
        gateways = [stack.start_gateway() for _ in range(2)]
        targets = {"patchforge-gateway": [gateway.url.removeprefix("http://") for gateway in gateways]}
        with running_prometheus(tmp_path_factory.mktemp("prometheus"), targets, seconds=1) as prometheus:
            cluster = Cluster(stack, gateways, prometheus)
            try:
                yield cluster
            finally:
                cluster.close()


def test_every_state_of_the_table(cluster: Cluster) -> None:
    assert sorted(EXPECTED) == list(range(1, 8))
    assert cluster.answers() == {TEXT: "none", CLASS: "none"}, "nobody knows these models yet"

    idle = cluster.start_worker(f"{TEXT},{CLASS}", holds=0)
    cluster.check(1)
    jobs = cluster.submit(TEXT, 3)
    cluster.check(2)
    busy = cluster.start_worker(TEXT, holds=4)
    jobs += cluster.submit(TEXT, 1)
    cluster.await_value(0, "max(sum by (instance) (patchforge_requests_waiting))")
    cluster.check(3)

    busy.kill()
    idle.kill()
    cluster.await_value(0, "max(patchforge_workers)")
    cluster.check(4)

    last = cluster.start_worker(f"{TEXT},{CLASS}", holds=0)
    for job in jobs:
        cluster.gateways[0].cancel(job)
        assert cluster.gateways[0].ended(job)["status"] == "cancelled"
    cluster.check(1)
    assert last.terminate() == 0
    cluster.await_value(0, "max(patchforge_workers)")
    assert cluster.answers() == EXPECTED[1], "scaled to zero, and idle"
    cluster.submit(TEXT, 1)
    cluster.check(5)
    assert cluster.gateways[1].ready().status_code == 200

    cluster.submit(CLASS, 5)
    cluster.start_worker(CLASS, holds=2)
    cluster.await_value(2, "max(sum by (instance) (patchforge_requests_held))")
    cluster.check(6)

    cluster.stack.kill_server()
    cluster.check(7)
    cluster.stack.server.start()
    cluster.check(6)
    for gateway in cluster.gateways:
        gateway.terminate()
    cluster.check(7)
