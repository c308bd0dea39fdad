"""The gateway benchmark runs with few requests, and its figures are consistent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchforge.service.bench.gateway import Costs, Latency
from tests.hostile import imported_from, write_hostile
from tests.processes import PATCHFORGE, run


def test_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    few = ["--submits", "5", "--clients", "3", "--seconds", "0.5", "--watchers", "4", "--out", str(out)]
    folder = write_hostile(tmp_path / "theirs")
    shown = run(*PATCHFORGE, "bench", "gateway", *few, cwd=folder).stdout
    assert imported_from(folder) == []
    figures = json.loads(out.read_text())
    for name in ("accepted_ms", "claimed_ms", "loaded_claimed_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p95"]
    assert figures["jobs_per_second"] == figures["jobs"] / 0.5
    for name in ("job_costs", "watched_job_costs"):
        assert all(cost >= 0 for cost in figures[name].values())
    assert 0 < figures["idle_mib"] <= figures["watched_mib"]
    assert "submit to claim" in shown


def test_costs_per_job() -> None:
    assert Costs(130.0, 46.0).per_job(Costs(100.0, 40.0), 3) == Costs(pytest.approx(10.0), pytest.approx(2.0))


def test_percentiles() -> None:
    assert Latency.of([0.001 * number for number in range(101)]) == Latency(50.0, 95.0)
    assert Latency.of([0.25]) == Latency(250.0, 250.0)
