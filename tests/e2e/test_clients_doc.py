"""Every snippet of docs/clients.md, run as it stands against a live server (only the ports differ)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Served
from tests.e2e.test_readme import ports_of

TEXT = (ROOT / "docs" / "clients.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = {"sh": ["bash", "-ec"], "python": [sys.executable, "-c"]}


def test_there_are_snippets_of_both_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == COMMANDS.keys()


@pytest.mark.parametrize(("kind", "text"), BLOCKS, ids=[f"{kind}-{number}" for number, (kind, _) in enumerate(BLOCKS)])
def test_a_snippet(served: Served, kind: str, text: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": path}
    ran = subprocess.run(
        [*COMMANDS[kind], ports_of(served, text)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    pictures = list(tmp_path.rglob("*.png"))
    assert bool(pictures) == any(word in text for word in ("save(", "--server"))
