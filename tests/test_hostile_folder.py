"""Nothing is ever imported from the working directory.

The processes that others start (the worker of `serve`, the members of `bench gateway` and `soak`) are held to the same
where those are tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hostile import imported_from, write_hostile
from tests.patience import PATIENCE

pytestmark = pytest.mark.timeout(300)

SCRIPT = [str(Path(sys.executable).parent / "patchforge")]
MODULE = [sys.executable, "-m", "patchforge"]


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.endswith("REDIS_URL")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)


def test_the_folder_bites(tmp_path: Path) -> None:
    folder = write_hostile(tmp_path / "theirs")
    assert run([sys.executable, "-c", "import redis"], folder).returncode == 1
    assert run([sys.executable, "-c", "import model"], folder).returncode == 1
    assert imported_from(folder) == ["imported-model-__init__", "imported-theirs-redis"]


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--help", 0),
        ("serve --help", 0),
        ("gateway", 2),  # imports everything, then finds no queue server
        ("worker", 2),
        ("generate cat --bundle {bundles}/tiny-class --out pictures", 0),
        ("train model text --out run --data absent.npz", 1),
    ],
)
def test_nothing_there_is_imported(words: str, status: int, tmp_path: Path, bundle_dir: Path) -> None:
    """Uses `python -m`, which puts the folder first on the path, and rightly imports a `patchforge.py` from there."""
    folder = write_hostile(tmp_path / "theirs", spared="patchforge")
    ran = run([*MODULE, *words.format(bundles=bundle_dir).split()], folder)
    assert ran.returncode == status, ran.stderr
    assert "Traceback" not in ran.stderr
    assert imported_from(folder) == []


@pytest.mark.parametrize("start", [SCRIPT, [sys.executable, "-P", "-m", "patchforge"]], ids=["script", "child"])
def test_nor_is_a_patchforge_of_theirs(start: list[str], tmp_path: Path, bundle_dir: Path) -> None:
    folder = write_hostile(tmp_path / "theirs")
    words = "generate", "cat", "--seed", "0", "--out", "pictures", "--bundle", str(bundle_dir / "tiny-class")
    ran = run([*start, *words], folder)
    assert ran.returncode == 0, ran.stderr
    assert (folder / "pictures" / "cat-0.png").exists()
    assert imported_from(folder) == []
