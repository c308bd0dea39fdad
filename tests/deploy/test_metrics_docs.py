"""The metrics table in docs/operation.md matches a live server, and the commands beside it exist.

`python -m tests.deploy.test_metrics_docs` writes the table anew.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from patchforge.service.gateway.metrics import GatewayMetrics
from patchforge.service.results.metrics import ResultMetrics
from patchforge.service.worker.metrics import WorkerMetrics
from tests.deploy.queries import rules
from tests.processes import run

ROOT = Path(__file__).parents[2]
OPERATION = ROOT / "docs" / "operation.md"
BEGIN, END = "<!-- metrics: made by python -m tests.deploy.test_metrics_docs -->\n", "<!-- end of metrics -->"


def registries() -> Iterator[tuple[str, CollectorRegistry]]:
    """The series of a gateway, and of a worker on a GPU, both with an object store."""
    import torch

    from patchforge.service.worker.device_metrics import DeviceMemory, register_host

    gateway, worker = CollectorRegistry(), CollectorRegistry()
    GatewayMetrics(gateway, max_waiting=1)
    ResultMetrics(gateway)
    WorkerMetrics(worker, {}, {})
    ResultMetrics(worker)
    register_host(worker, {torch.device("cpu")})
    worker.register(DeviceMemory(lambda: (1, 2, 3)))
    yield "gateway", gateway
    yield "worker", worker


def labels_of(registry: CollectorRegistry, metric: Metric) -> list[str]:
    """Declared collectors know their labels. Others are made at a scrape, and have none."""
    collector: Collector | None = registry._names_to_collectors.get(metric.name)
    return list(getattr(collector, "_labelnames", ()))


def metrics_table() -> str:
    rows = ["| metric | from | kind | labels | meaning |", "|---|---|---|---|---|"]
    for source, registry in registries():
        for metric in registry.collect():
            if metric.name.startswith("patchforge_"):
                name = metric.name + ("_total" if metric.type == "counter" else "")
                labels = ", ".join(labels_of(registry, metric))
                rows.append(f"| `{name}` | {source} | {metric.type} | {labels} | {metric.documentation} |")
    return "\n".join(rows) + "\n"


def with_metrics_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{metrics_table()}\n{END}{after}"


@pytest.mark.skipif(sys.platform != "linux", reason="a process's own memory is read from /proc")
def test_the_table_is_up_to_date() -> None:
    text = OPERATION.read_text("utf-8")
    assert text == with_metrics_table(text), "run: python -m tests.deploy.test_metrics_docs"


def test_every_alert_is_explained_and_no_other() -> None:
    assert {*re.findall(r"^\| `(Patchforge\w+)` \|", OPERATION.read_text("utf-8"), re.MULTILINE)} == {
        rule["alert"] for rule in rules()
    }


def deployment_commands() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```$", OPERATION.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.startswith(("docker ", "kubectl ", "promtool "))]


def test_the_files_and_targets_in_commands_exist() -> None:
    commands = deployment_commands()
    assert len(commands) >= 6
    dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
    for command in commands:
        run("bash", "-nc", command)
        for path in re.findall(r"deploy/\S+", command):
            assert (ROOT / path).exists(), command
        for target in re.findall(r"--target (\S+)", command):
            assert f" AS {target}\n" in dockerfile
        for service in re.findall(r"--scale (\S+)=", command):
            assert f"\n  {service}:\n" in (ROOT / "docker-compose.yml").read_text("utf-8")


if __name__ == "__main__":
    OPERATION.write_text(with_metrics_table(OPERATION.read_text("utf-8")), "utf-8")
