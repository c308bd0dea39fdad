"""A live server for all clients, and the page that their results go to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.matrix import Outcome, write_rows
from tests.e2e.conftest import Served, start


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    running = start(tmp_path_factory.mktemp("data"))
    yield running
    running.close()


@pytest.fixture(scope="session")
def outcomes() -> Iterator[list[Outcome]]:
    """Filled by the tests; written into docs/compatibility.md at the end."""
    tried: list[Outcome] = []
    yield tried
    if tried:
        write_rows(tried)
