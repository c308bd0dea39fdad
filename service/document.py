"""Puts what a command measured into a page, between two marks, so that no figure there is typed by hand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from service.errors import InvalidRequest


def replace_between(page: Path, name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Replace what lies between ``<!-- begin: name -->`` and ``<!-- end: name -->`` by a Markdown table.

    Raises:
        InvalidRequest: the page is missing, or lacks the marks.
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
