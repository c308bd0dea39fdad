"""Settings as an operator writes them: in the environment, as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


@pytest.mark.parametrize("name", [*(f"PATCHFORGE_{name.upper()}" for name in Settings.model_fields), "REDIS_URL"])
def test_an_empty_variable_is_as_good_as_none(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = Settings()
    monkeypatch.setenv(name, "")
    assert Settings() == usual


@pytest.mark.parametrize("text", ["one,two", "one, two", "one two", '["one", "two"]'])
@pytest.mark.parametrize("name", ["models", "cors_origins"])
def test_lists_are_words_or_json(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PATCHFORGE_{name.upper()}", text)
    assert getattr(Settings(), name) == ["one", "two"]


@pytest.mark.parametrize("text", ["[", '["one", 2]', '{"one": "two"}'])
def test_what_is_no_list_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_API_KEYS", text)
    with pytest.raises(ValidationError, match="api_keys"):
        Settings()


def test_paths_and_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_TLS_CERT", "/etc/tls.pem")
    monkeypatch.setenv("PATCHFORGE_THREADS", "3")
    assert (Settings().tls_cert, Settings().threads) == (Path("/etc/tls.pem"), 3)
