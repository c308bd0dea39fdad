"""The benchmark of the gateway runs, on few requests, and its figures hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.bench.gateway import Costs, Latency

ROOT = Path(__file__).parents[3]


def test_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    few = ["--submits", "5", "--clients", "3", "--seconds", "0.5", "--watchers", "4", "--out", str(out)]
    command = [sys.executable, "-m", "service.cli", "bench", "gateway", *few]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    figures = json.loads(out.read_text())
    for name in ("accepted_ms", "claimed_ms", "loaded_claimed_ms"):
        assert 0 < figures[name]["p50"] <= figures[name]["p95"]
    assert figures["jobs_per_second"] == figures["jobs"] / 0.5
    for name in ("job_costs", "watched_job_costs"):
        assert all(cost >= 0 for cost in figures[name].values())
    assert 0 < figures["idle_mib"] <= figures["watched_mib"]
    assert "submit to claim" in ran.stdout


def test_costs_are_shared_out_among_the_jobs_since() -> None:
    assert Costs(130.0, 46.0).less(Costs(100.0, 40.0), 3) == Costs(pytest.approx(10.0), pytest.approx(2.0))


def test_percentiles() -> None:
    assert Latency.of([0.001 * number for number in range(101)]) == Latency(50.0, 95.0)
    assert Latency.of([0.25]) == Latency(250.0, 250.0)
