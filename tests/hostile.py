"""A working directory where every name of ours, and of our dependencies, is taken by a hostile file."""

from __future__ import annotations

from pathlib import Path

MODULES = ("model", "service", "patchforge", "redis", "torch", "fastapi", "pydantic", "httpx", "structlog", "ctypes")
PACKAGES = ("model", "service", "proto")
HOSTILE = """
import pathlib
here = pathlib.Path(__file__)
(pathlib.Path({folder!r}) / f"imported-{{here.parent.name}}-{{here.stem}}").touch()
raise RuntimeError("this file is not Patchforge's")
"""


def write_hostile(folder: Path, *, spared: str = "") -> Path:
    """Creates modules and packages that leave a mark and raise when imported, except `spared`."""
    folder.mkdir(exist_ok=True)
    program = HOSTILE.format(folder=str(folder))
    for name in MODULES:
        if name != spared:
            (folder / f"{name}.py").write_text(program)
    for name in PACKAGES:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(program)
    return folder


def imported_from(folder: Path) -> list[str]:
    """Returns the marks of what was imported."""
    return sorted(path.name for path in folder.glob("imported-*"))
