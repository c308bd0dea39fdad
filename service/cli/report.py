"""Reports of what a command measured: tables on the terminal, tables in a page, figures as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from patchforge.service.errors import InvalidRequest


def print_table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], width: int = 150) -> None:
    """Print a table on stdout, `width` characters wide at most."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=width).print(table)


def write_table(page: Path, name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Replace the text between `<!-- begin: name -->` and `<!-- end: name -->` by a Markdown table.

    So no measured figure in the page is typed by hand.

    Raises:
        InvalidRequest: the page cannot be read, or has no such marks.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"{page} cannot be read: {error.strerror}", field="doc") from error
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise InvalidRequest(f"{page} has no marks {begin.strip()} and {end}", field="doc")
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    table = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns), *lines]
    page.write_text(before + begin + "\n".join(table) + "\n" + end + after, encoding="utf-8")


def write_json(path: Path, figures: Any) -> None:
    """Write the figures to a file; make its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def check_names(given: Collection[str] | None, known: Collection[str], field: str) -> None:
    """Check the values of an option that takes names.

    Raises:
        InvalidRequest: a name is not known.
    """
    if unknown := sorted(set(given or ()) - set(known)):
        raise InvalidRequest(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}", field=field)
