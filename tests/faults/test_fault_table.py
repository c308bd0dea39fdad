"""docs/faults.md names every row there is a test for, and nothing an operator sees that no test looks at."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE.parents[1] / "docs" / "faults.md").read_text("utf-8")
LINES = [line.split("|") for line in TEXT.splitlines() if re.match(r"\| \d", line)]
ROWS = {int(cells[1]): cells[4] for cells in LINES}
FILES = {path: path.read_text("utf-8") for path in HERE.glob("test_*.py")}
KITS = "".join(path.read_text("utf-8") for path in HERE.glob("*.py") if not path.name.startswith("test_"))


def row_tests() -> list[tuple[int, Path]]:
    """Each test of a row, and where it is."""
    found = []
    for path, text in FILES.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (row := re.match(r"test_row_(\d+)_", node.name)):
                found.append((int(row[1]), path))
    return found


def test_every_row_has_its_tests() -> None:
    assert sorted(ROWS) == list(range(1, 30))
    assert {row for row, _ in row_tests()} == set(ROWS)


@pytest.mark.parametrize("row", sorted(ROWS))
def test_what_an_operator_sees_is_looked_at(row: int) -> None:
    text = KITS + "".join(FILES[path] for path in {path for number, path in row_tests() if number == row})
    seen = re.findall(r"`([^`]+)`", ROWS[row])
    assert seen
    for name in seen:
        assert f'"{name}' in text, name
