"""The drawings in docs/images match their sources; `make diagrams` draws them again. The test needs no Graphviz."""

from __future__ import annotations

import subprocess
from hashlib import sha256
from pathlib import Path

import pytest

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SOURCES = sorted(IMAGES.glob("*.dot"))


def stamp_of(source: Path) -> str:
    """The comment that ends a drawing and names the exact source it was drawn from."""
    return f"<!-- {source.name}, SHA-256 {sha256(source.read_bytes()).hexdigest()} -->\n"


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_a_drawing_was_made_from_its_source_as_it_is(source: Path) -> None:
    assert source.with_suffix(".svg").read_text("utf-8").endswith(stamp_of(source)), "run: make diagrams"


def test_there_is_no_drawing_without_a_source() -> None:
    assert SOURCES
    assert {path.stem for path in IMAGES.glob("*.svg")} == {path.stem for path in SOURCES}


if __name__ == "__main__":
    for source in SOURCES:
        drawn = subprocess.run(["dot", "-Tsvg", source], check=True, capture_output=True, text=True).stdout
        source.with_suffix(".svg").write_text(drawn + stamp_of(source), "utf-8")
