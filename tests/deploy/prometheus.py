"""A real Prometheus with our configuration and short intervals, which scrapes what a test runs."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from patchforge.service.embedded import free_port
from tests.deploy.queries import RULES
from tests.patience import PATIENCE
from tests.processes import eventually, launch

PROMETHEUS = shutil.which("prometheus")


@contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, Sequence[str]], seconds: int) -> Iterator[httpx.Client]:
    """Yields a client of its API when it has scraped all targets.

    `targets` are addresses by the name of their job; other jobs have none. `seconds`: between scrapes, and for one.
    """
    if PROMETHEUS is None:
        pytest.skip("no prometheus here (Debian: apt install prometheus)")
    shutil.copytree(RULES.parent, folder / "rules")
    config: dict[str, Any] = yaml.safe_load((RULES.parents[1] / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"}
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [*targets.get(job["job_name"], ())]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    port = free_port()
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with (folder / "log").open("wb") as log:
        address = f"--web.listen-address=127.0.0.1:{port}"
        process = launch(PROMETHEUS, *arguments, address, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=PATIENCE) as client:
            eventually(lambda: up(client) == sum(map(len, targets.values())), "all targets to be scraped")
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)


def ask(client: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = client.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


def up(client: httpx.Client) -> int:
    try:
        return len(ask(client, "up == 1"))
    except (httpx.TransportError, ValueError):  # not listening yet, or not yet answering in JSON
        return 0
