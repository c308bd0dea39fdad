"""`patchforge soak` as an operator runs it, only shorter and with more going wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_half_a_minute_of_everything_at_once(bundle_dir: Path, tmp_path: Path) -> None:
    options = ["--minutes", "0.4", "--hurry", "4", "--clients", "6", "--bundles", str(bundle_dir)]
    command = [sys.executable, "-m", "service.cli", "soak", *options, "--keep", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=540)
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"accepted = [1-9]\d*, completed = [1-9]\d*,.* lost = 0,", run.stdout), run.stdout
    assert re.search(r"(kill|terminate|pause) (worker|gateway)", run.stdout), run.stdout
