"""The documentation agrees with the code about settings and lock files.

`python -m tests.test_docs` writes the settings table into docs/operation.md anew.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined

from patchforge.service.settings import GROUPS, Settings

ROOT = Path(__file__).parents[1]
OPERATION = ROOT / "docs" / "operation.md"
BEGIN, END = "<!-- settings: made by python -m tests.test_docs -->\n", "<!-- end of settings -->"
LOCK = ROOT / "requirements.lock"
PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;]+)", re.MULTILINE)
UNLOCKED = {"torch"}


def settings_table() -> str:
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for group in GROUPS:
        rows.append(f"| **{group.__doc__}** | | |")
        for name, field in group.model_fields.items():
            shown = "" if field.default in (None, [], PydanticUndefined) else f"`{field.default}`"
            also = " Also `REDIS_URL`." if name == "redis_url" else ""
            rows.append(f"| `PATCHFORGE_{name.upper()}` | {shown} | {field.description}{also} |")
    return "\n".join(rows) + "\n"


def with_settings_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{settings_table()}\n{END}{after}"


def test_the_settings_table_is_up_to_date() -> None:
    text = OPERATION.read_text("utf-8")
    assert text == with_settings_table(text), "run: python -m tests.test_docs"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described(name: str) -> None:
    assert Settings.model_fields[name].description


def test_the_lock_file_pins_what_was_tested_and_names_no_host() -> None:
    text = LOCK.read_text("utf-8")
    tested = {_plain(name): version for name, version in PIN.findall((ROOT / "constraints.txt").read_text("utf-8"))}
    locked = {_plain(name): version for name, version in PIN.findall(text)}
    assert {name: version for name, version in locked.items() if tested.get(name, version) != version} == {}
    assert not re.search(r"://|^-|@ ", text, re.MULTILINE)
    for entry in _entries(LOCK):
        assert "--hash=sha256:" in entry, entry.splitlines()[0]

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["server"], *extras["worker"], *extras["otel"], *extras["s3"]]
    names = {_plain(match[0]) for each in asked if (match := re.match(r"[A-Za-z0-9._-]+", each))}
    assert names - locked.keys() == UNLOCKED, "run: make lock"


def test_a_gateway_is_locked_to_the_same() -> None:
    entries = _entries(ROOT / "requirements-gateway.lock")
    assert {*entries} < {*_entries(LOCK)}, "run: make lock"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *extras["server"], *extras["otel"], *extras["s3"]]
    names = {_plain(match[0]) for each in asked if (match := re.match(r"[A-Za-z0-9._-]+", each))}
    assert names <= {_plain(entry.partition("==")[0]) for entry in entries}, "run: make lock"


def _entries(lock: Path) -> list[str]:
    """Returns each package with its version, marker and hashes."""
    return [entry.strip() for entry in re.split(r"\n(?=[a-zA-Z])", lock.read_text("utf-8"))[1:]]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    OPERATION.write_text(with_settings_table(OPERATION.read_text("utf-8")), "utf-8")
