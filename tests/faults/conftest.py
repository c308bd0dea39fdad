"""Queue servers to surround with processes: one to break for each test, and one that stays whole for all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.gateway_kit import Stage
from tests.faults.harness import IDLE, Stack
from tests.faults.shared import Shared

# What the tests do to processes they see through /proc.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*_faults.py", "test_gateway_*.py"]


@pytest.fixture
def stack(tmp_path: Path, bundle_dir: Path) -> Iterator[Stack]:
    """Nothing but the queue server runs yet. Claims are taken over after ``IDLE`` seconds of silence."""
    with Stack(tmp_path, bundle_dir, claim_idle_seconds=IDLE) as running:
        yield running


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, bundle_dir: Path) -> Iterator[Shared]:
    """Processes for faults that harm none of them."""
    with Stack(tmp_path_factory.mktemp("shared"), bundle_dir) as running:
        yield Shared.start(running)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A gateway and a scripted worker that tests share which leave them as they were."""
    with Stage(tmp_path_factory.mktemp("stage"), max_waiting=8, sse_ping_seconds=1) as running:
        yield running


@pytest.fixture
def own_stage(tmp_path: Path) -> Iterator[Stage]:
    """The same for one test alone, to break."""
    with Stage(tmp_path, max_waiting=8, drain_seconds=5) as running:
        yield running
