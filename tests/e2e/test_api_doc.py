"""Every snippet of docs/api.md, run as it stands against a live server (only the ports differ)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from service.gateway.inference import INPUTS, OUTPUTS
from service.schemas import GenerationRequest
from tests.e2e.conftest import ROOT, Served
from tests.e2e.test_readme import ports_of

TEXT = (ROOT / "docs" / "api.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [text for kind, text in BLOCKS if kind == "sh"]
PYTHON = [text for kind, text in BLOCKS if kind == "python"]


def test_there_are_snippets() -> None:
    assert (len(SHELL), len(PYTHON), len(BLOCKS)) == (2, 3, 5)


@pytest.mark.parametrize("number", range(2))
def test_shell(served: Served, number: int, tmp_path: Path) -> None:
    command = ["bash", "-ec", ports_of(served, SHELL[number])]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0
    assert ('"status":"waiting"', '"savings_ratio"')[number] in ran.stdout


@pytest.mark.parametrize("number", range(3))
def test_python(served: Served, number: int, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ports_of(served, PYTHON[number])]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    [made] = tmp_path.glob("*.png")
    assert made.read_bytes().startswith(b"\x89PNG")


def test_every_field_and_tensor_is_named() -> None:
    for name in [*GenerationRequest.model_fields, *INPUTS, *OUTPUTS]:
        assert f"`{name}`" in TEXT, name
