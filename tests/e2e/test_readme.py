"""Every snippet of the README, run as it stands against a live server (only the ports differ)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Served

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
SHELL = [text for kind, text in BLOCKS if kind == "sh" and "curl" in text]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def ports_of(served: Served, text: str) -> str:
    return text.replace("http://127.0.0.1:8000", served.http).replace("127.0.0.1:50051", served.grpc)


def test_there_are_snippets() -> None:
    assert len(SHELL) >= 1
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("text", SHELL, ids=lambda text: text.split()[0])
def test_shell(served: Served, text: str, tmp_path: Path) -> None:
    ran = subprocess.run(["bash", "-ec", ports_of(served, text)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0
    assert '"status":"waiting"' in ran.stdout


@pytest.mark.parametrize("text", PYTHON, ids=["openai", "grpc"])
def test_python(served: Served, text: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ports_of(served, text)]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    [made] = tmp_path.glob("*.png")
    assert made.read_bytes().startswith(b"\x89PNG")
