"""The queue benchmark runs with few jobs, and its figures are consistent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from patchforge.service.bench.queue import Usage
from tests.processes import PATCHFORGE, run


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    few = ["--jobs", "2", "--clients", "1", "--fleet", "3", "--round-trip", "0.01", "--out", str(out)]
    shown = run(*PATCHFORGE, "bench", "queue", *few).stdout
    figures = json.loads(out.read_text())
    for name in ("plain", "streamed", "rest", "alone"):
        assert figures[name]["milliseconds"] > 0
    assert figures["plain"]["scripts"] >= 3, "submit, claim, finish"
    assert figures["near_seconds"] > 0
    assert "a job without previews" in shown


def test_usage_per_job() -> None:
    assert Usage(30.0, 12.0, 90.0).since(Usage(10.0, 2.0, 30.0), 1 / 10) == Usage(2.0, 1.0, 6.0)
