"""The rule by which a bucket deletes what has expired."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from patchforge.service.cli.main import app

HOUR, DAY = 3600, 86400


@pytest.fixture(autouse=True)
def usual(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RESULT", "BATCH"):
        monkeypatch.delenv(f"PATCHFORGE_{name}_TTL_SECONDS", raising=False)
    monkeypatch.setenv("PATCHFORGE_RESULTS", "s3://pictures/of/cats")


def rule(*options: str) -> dict[str, Any]:
    ran = CliRunner().invoke(app, ["results-rule", *options])
    assert ran.exit_code == 0, ran.output
    [found] = json.loads(ran.stdout)["Rules"]
    return found


def test_it_is_what_s3_takes() -> None:
    assert rule() == {
        "ID": "patchforge-of-cats",
        "Status": "Enabled",
        "Filter": {"Prefix": "of/cats/"},
        "Expiration": {"Days": 3},
    }


def test_a_bucket_without_a_prefix_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_RESULTS", "s3://pictures")
    assert (rule()["ID"], rule()["Filter"]) == ("patchforge", {"Prefix": ""})


@pytest.mark.parametrize(
    ("window", "batch", "result", "days"),
    [
        (24, DAY, HOUR, 3),
        (23, DAY, HOUR, 2),  # exactly two days
        (23, DAY, HOUR + 1, 3),
        (1, 1, 1, 1),
        (999, 7 * DAY, HOUR, 49),
    ],
)
def test_nothing_expires_too_soon(
    monkeypatch: pytest.MonkeyPatch, window: int, batch: int, result: int, days: int
) -> None:
    monkeypatch.setenv("PATCHFORGE_BATCH_TTL_SECONDS", str(batch))
    monkeypatch.setenv("PATCHFORGE_RESULT_TTL_SECONDS", str(result))
    assert rule("--window", str(window))["Expiration"] == {"Days": days}


def test_it_can_be_a_file(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["results-rule", "--out", str(tmp_path / "rule.json")])
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert json.loads((tmp_path / "rule.json").read_text("utf-8"))["Rules"] == [rule()]


def test_pictures_on_the_queue_server_need_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHFORGE_RESULTS", "redis")
    ran = CliRunner().invoke(app, ["results-rule"])
    assert ran.exit_code == 1
    assert ran.stderr == "error: PATCHFORGE_RESULTS: is not s3://bucket/prefix, so nothing is in a bucket\n"
