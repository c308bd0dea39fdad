"""docs/compatibility.md is complete: every client has its row, every row its test, and nothing is known to fail."""

from __future__ import annotations

import re

import pytest

from tests.clients.matrix import BEGIN, CLIENTS, END, PAGE, SCRIPTS, TITLES, Client, Outcome
from tests.processes import ROOT

TEXT = PAGE.read_text("utf-8")


def table() -> dict[str, list[str]]:
    """The cells of each client's row."""
    rows = [line for line in TEXT.partition(BEGIN)[2].partition(END)[0].splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {title: rest for title, *rest in cells[1:]}


def test_every_client_has_its_row() -> None:
    assert list(table()) == TITLES, "run: make test-clients"


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_the_row_tells_of_every_check(client: Client) -> None:
    checks = re.findall(r'check\(f?["`](?:\{\w+\})?([^"`{$]+)', (SCRIPTS / client.script).read_text("utf-8"))
    _, works, fails = table()[client.title]
    assert [check for check in checks if check not in works] == []
    assert fails == "–"


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/.]+)`", TEXT)
    assert named
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_what_scripts_print_becomes_a_row() -> None:
    printed = (
        '{"versions": {"a": "1"}}\n{"check": "x", "works": true}\n{"check": "y", "works": false, "why": "E: no"}\n'
    )
    outcome = Outcome.read("A", printed)
    assert outcome.fails == {"y": "E: no"}
    assert outcome.row == "| A | a 1 | x | y |"
