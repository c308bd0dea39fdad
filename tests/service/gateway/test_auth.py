"""API keys in settings and headers. tests/faults/test_gateway_auth.py calls every endpoint with and without keys."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from patchforge.service.errors import Unauthenticated
from patchforge.service.gateway.auth import ApiKeys, is_open, make_entry, new_key
from patchforge.service.settings import Settings

KEY = "pf-secret"
OPEN = ("/", "/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready", "/playground/app.js")
CLOSED = ("", "/v1/models", "/openapi.json", "/v2", "/v2/health", "/v2/models/x/ready", "/docs", "/playground")
ENTRIES = [make_entry("alice", KEY), make_entry("bob", "another")]


@pytest.mark.parametrize(
    "text", [",".join(ENTRIES), ", ".join(ENTRIES), " ".join(ENTRIES) + ",", f'["{ENTRIES[0]}", "{ENTRIES[1]}"]']
)
def test_keys_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("PATCHFORGE_API_KEYS", text)
    assert Settings().api_keys == ENTRIES
    assert KEY not in repr(Settings())
    assert ENTRIES[0] not in repr(Settings())


@pytest.mark.parametrize(
    "text",
    [KEY, f"alice:{KEY}", f":{'0' * 64}", f"alice:{'0' * 63}", f"alice:{'0' * 65}", f"al ice:{'0' * 64}", f"[{KEY}"],
)
def test_a_bad_entry_stops_the_start_and_is_not_repeated(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A key pasted in place of its hash must not appear in the error."""
    monkeypatch.setenv("PATCHFORGE_API_KEYS", text)
    with pytest.raises(ValidationError, match="api_keys") as caught:
        Settings()
    assert KEY not in str(caught.value)


def test_without_entries_everyone_may_call() -> None:
    assert Settings(api_keys=[]).api_keys == []
    keys = ApiKeys([])
    assert keys.authenticate({}) is None
    assert keys.authenticate({"authorization": "Bearer unused"}) is None


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"BEARER   {KEY}"},
        {"x-api-key": KEY},
        {"x-api-key": f" {KEY} "},
        {"authorization": "Basic dTpw", "x-api-key": KEY},
        {"authorization": "Bearer ", "x-api-key": KEY},
    ],
)
def test_a_key_names_its_tenant(headers: dict[str, str]) -> None:
    assert ApiKeys(ENTRIES).authenticate(headers) == "alice"


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": KEY}, {"authorization": f"Bearer {KEY}x"}, {"x-api-key": b"\xff"}],
)
def test_anything_else_is_refused(headers: dict[str, str | bytes]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        ApiKeys(ENTRIES).authenticate(headers)
    assert KEY not in str(caught.value)


def test_new_keys_are_all_different_and_admitted() -> None:
    made = {new_key() for _ in range(100)}
    assert len(made) == 100
    key = made.pop()
    assert ApiKeys([make_entry("x", key)]).authenticate({"x-api-key": key}) == "x"


def test_only_what_is_listed_is_open() -> None:
    assert [path for path in OPEN if not is_open(path)] == []
    for path in (*CLOSED, *(f"{path}/" for path in OPEN[1:-1]), *(f"/{path}" for path in OPEN)):
        assert not is_open(path)
