"""Runs the examples of the Python clients with a running server."""

from __future__ import annotations

from pathlib import Path

import pytest

from patchforge import AsyncClient, Client
from tests.docstrings import run_examples
from tests.e2e.conftest import Served


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_examples(client: type, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_examples(client, tmp_path, monkeypatch, http=served.http)
    assert (client is AsyncClient) or (tmp_path / "apple.png").read_bytes().startswith(b"\x89PNG")
