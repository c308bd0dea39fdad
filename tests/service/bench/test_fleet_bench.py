"""The fleet benchmark runs with few workers, and its figures are consistent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchforge.service.bench.fleet import Costs, FleetFigures, Scrapes, Size
from patchforge.service.bench.gateway import Latency
from tests.processes import PATCHFORGE, run


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("place", "servers"), [("--no-namespaces", 1), (None, 2)])
def test_from_the_command_line(tmp_path: Path, place: str | None, servers: int) -> None:
    out = tmp_path / "figures.json"
    few = ["--workers", "3", "--gateways", "2", "--queue-servers", str(servers), "--clients", "2", "--seconds", "1"]
    few += ["--out", str(out)]
    shown = run(*PATCHFORGE, "bench", "fleet", *few, *([place] if place else [])).stdout
    figures = json.loads(out.read_text())
    assert figures["size"] == {"workers": 3, "gateways": 2, "queue_servers": servers}
    assert figures["lone_submit_ms"]["p50"] > 0
    assert figures["lone_submit"]["gateways"] > 0
    assert figures["all"]["seconds"] > 0
    assert figures["own"]["bytes"] < figures["all"]["bytes"]
    assert "computed" in shown
    assert "network namespace" in shown or "loopback" in shown
    assert place is None or "loopback" in shown, "it says so"


def test_what_a_core_carries_is_computed_from_processor_times() -> None:
    latency, scrapes = Latency(1.0, 2.0), Scrapes(0.1, 10, 1.0, 5.0)
    figures = FleetFigures(
        *(Size(100, 2, 1), True, latency, Costs(1.0, 1.0, 1.0)),
        floor=Costs(10.0, 20.0, 0.0),
        rest=Costs(50.0, 20.0, 900.0),
        clients=8,
        seconds=10.0,
        jobs=400,
        submit_ms=latency,
        end_to_end_ms=latency,
        job=Costs(0.5, 2.0, 1.0),
        quiet_ms=1.0,
        own=scrapes,
        all=scrapes,
        cpus=2,
        load=0.0,
    )
    assert figures.jobs_per_second == 40.0
    assert figures.carried_by_queue_core(100) == pytest.approx((1000 - 50) / 0.5)
    assert figures.carried_by_queue_core(1000) == pytest.approx((1000 - 10 - 400) / 0.5), (
        "what workers add grows with them"
    )
    assert figures.carried_by_gateway_core() == pytest.approx((1000 - 10) / 2.0)
