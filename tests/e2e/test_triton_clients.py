"""Triton's own clients, in an environment of their own, against a live server: make test-clients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Served

ENVIRONMENT = Path(sys.prefix) / "triton"
WANTED = ["tritonclient[grpc,http]>=2.50", "protobuf<7"]


@pytest.fixture(scope="module")
def python() -> Path:
    """An interpreter with the clients; what is once installed stays."""
    interpreter = ENVIRONMENT / "bin" / "python"
    if not interpreter.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
    pip = [interpreter, "-m", "pip", "install", "--disable-pip-version-check", "-q", *WANTED]
    subprocess.run(pip, check=True)
    return interpreter


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tritons_clients(served: Served, python: Path) -> None:
    script = ROOT / "tests" / "e2e" / "triton_calls.py"
    command = [python, script, served.http.removeprefix("http://"), served.grpc]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("savings ")
