"""Queue servers for fault tests: a new one for tests that break it, and one that all other tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.gateway_kit import Stage
from tests.faults.harness import IDLE, Stack
from tests.faults.shared import Shared

# Tests watch processes through /proc.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*_faults.py", "test_gateway_*.py"]


@pytest.fixture
def stack(tmp_path: Path, bundle_dir: Path) -> Iterator[Stack]:
    """Only the queue server runs. Claims are taken over after `IDLE` seconds of silence."""
    with Stack(tmp_path, bundle_dir, claim_idle_seconds=IDLE) as running:
        yield running


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, bundle_dir: Path) -> Iterator[Shared]:
    """Processes for faults that do not damage them."""
    with Stack(tmp_path_factory.mktemp("shared"), bundle_dir) as running:
        yield Shared.start(running)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A gateway and a scripted worker, shared by tests that leave them unchanged."""
    with Stage(tmp_path_factory.mktemp("stage"), max_waiting=8, sse_ping_seconds=1) as running:
        yield running


@pytest.fixture
def own_stage(tmp_path: Path) -> Iterator[Stage]:
    """The same for one test alone, which may break them."""
    with Stage(tmp_path, max_waiting=8, drain_seconds=5) as running:
        yield running
