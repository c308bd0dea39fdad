"""Settings as an operator writes them: in the environment, as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from patchforge.service.settings import Settings


@pytest.mark.parametrize("name", [*(f"PATCHFORGE_{name.upper()}" for name in Settings.model_fields), "REDIS_URL"])
def test_an_empty_variable_counts_as_unset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    usual = Settings()
    monkeypatch.setenv(name, "")
    assert Settings() == usual


@pytest.mark.parametrize("text", ["one,two", "one, two", "one two", '["one", "two"]'])
@pytest.mark.parametrize("name", ["models", "default_models", "cors_origins"])
def test_lists_are_words_or_json(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"PATCHFORGE_{name.upper()}", text)
    assert getattr(Settings(), name) == ["one", "two"]


@pytest.mark.parametrize("text", ["[", '["one", 2]', '{"one": "two"}'])
def test_an_invalid_list_is_refused_by_name(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_API_KEYS", text)
    with pytest.raises(ValidationError, match="api_keys"):
        Settings()


def test_paths_and_numbers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_TLS_CERT", "/etc/tls.pem")
    monkeypatch.setenv("PATCHFORGE_THREADS", "3")
    assert (Settings().tls_cert, Settings().threads) == (Path("/etc/tls.pem"), 3)


@pytest.mark.parametrize(
    ("text", "paths"), [("runs/a b,c", ["runs/a b,c"]), ("one:two/:shipped:", ["one", "two", "shipped"])]
)
def test_folders_of_bundles_are_separated_as_in_path(
    text: str, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATCHFORGE_BUNDLE_DIR", text)
    assert Settings().bundle_dir == [Path(path) for path in paths]
